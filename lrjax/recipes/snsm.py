import optax
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from .. import subspaces as sub
from .._arguments import checks_trees
from ..subspaces import project_updates
from ..transforms import scale_by_subset_norm
from ._common import DecayMask, finish


@checks_trees
def snsm(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank | None = None,
    *,
    refresh_every: int | Array = 200,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
    where: sub.Where | None = None,
    precision: str | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SNSM: momentum in a subspace, one second moment for each row of the longer side.

    ``U = (P m̂ + (G − P Pᵀ G)) / (√v̂ + ε)`` with ``m ← b1 m + (1−b1) Pᵀ G``,
    bias-corrected and forgotten when the SVD renews ``P``, and the subset norms ``v̂`` of
    :func:`lrjax.scale_by_subset_norm`. A matrix of ``m <= n`` takes ``m r + r n + n``
    numbers. ``v̂`` holds sums, not means: rates are some ten times Adam's.

    Departure from the official code: the bias correction of ``m̂`` leaves alone what the
    basis leaves out, which the code multiplies by it too.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``; None stands for 128.
        refresh_every: the period of the SVD.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.
        where: which leaves to project; see :func:`lrjax.project_updates`. The others
            keep their momentum whole.
        precision: of the products with the gradient; see :func:`lrjax.project_updates`.
        key: source of the random numbers.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.project_updates`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.snsm(0.3, rank=2)
        >>> params = {"weight": jnp.zeros((8, 16))}
        >>> loss = lambda p: jnp.mean((p["weight"] - 1) ** 2)
        >>> step = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p))
        >>> state = tx.init(params)
        >>> for _ in range(20):
        ...     updates, state = step(params, state)
        ...     params = optax.apply_updates(params, updates)
        >>> print(loss(params) < 0.5)
        True

    Reference:
        T. Nguyen, H. L. Nguyen, "Subset-norm and subspace-momentum: faster
        memory-efficient adaptive optimization with convergence guarantees" (2024), arXiv
        2411.07120. At full rank, with the basis kept, it is :func:`lrjax.adam_sn`.
    """
    rank = 128 if rank is None else rank
    momentum = project_updates(
        optax.ema(b1),
        sub.SVD(rank),
        schedule=sub.Periodic(refresh_every),
        carry=sub.Reset(),
        lift=sub.Residual(),
        where=where,
        precision=precision,
        key=key,
    )
    tx = scale_by_subset_norm(b2, eps, numerator=momentum)
    return finish(tx, learning_rate, weight_decay, mask)

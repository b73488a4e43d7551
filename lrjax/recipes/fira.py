import optax
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from .. import subspaces as sub
from .._arguments import checks_trees
from ..subspaces import project_updates
from ._common import DecayMask, finish


@checks_trees
def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank | None = None,
    *,
    refresh_every: int | Array = 200,
    scale: ArrayLike = 0.25,
    max_growth: ArrayLike | None = 1.01,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
    where: sub.Where | None = None,
    precision: str | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Fira: GaLore that follows the rest of the gradient too.

    ``U = scale · P N + (G − P R) diag(φ)`` with ``R = Pᵀ G``, ``N = adam(R)`` and ``φ_j =
    ‖N_j‖/‖R_j‖`` for each column; the norm of the second term grows by at most ``growth``
    a step.

    Departures from the official code: the residual is ``G − P R``, as in the paper, where
    the code subtracts ``scale · P R``; the limiter sees the residual after Adam's bias
    correction, which the code applies behind it, so that the first steps are limited too.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``; None stands for a quarter of the short side.
        refresh_every: the period of the SVD.
        scale: factor of the subspace term of projected leaves.
        max_growth: the limit; None for none.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.
        where: which leaves to project; see :func:`lrjax.project_updates`. The others
            get plain Adam.
        precision: of the products with the gradient; see :func:`lrjax.project_updates`.
        key: source of the random numbers.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.project_updates`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.fira(0.3, rank=2)
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
        X. Chen et al., "Fira: can we achieve full-rank training of LLMs under low-rank
        constraint?" (2024), arXiv 2410.01623. At full rank it is :func:`lrjax.galore`.
    """
    rank = 0.25 if rank is None else rank
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.SVD(rank),
        schedule=sub.Periodic(refresh_every),
        lift=sub.ScaledResidual(scale, max_growth=max_growth),
        where=where,
        precision=precision,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay, mask)

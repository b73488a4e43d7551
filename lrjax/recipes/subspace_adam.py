import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from .. import subspaces as sub
from .._arguments import checks_trees
from ..subspaces import project_updates
from ._common import DecayMask, finish


@checks_trees
def subspace_adam(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank | None = None,
    *,
    blocks: int | None = None,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    max_growth: ArrayLike | None = 1.01,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
    where: sub.Where | None = None,
    precision: str | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam in a tracked subspace with a scaled residual: the recommended default.

    Every step turns an eighth of the basis by a power step and moves Adam's moments
    along, so that no step is slower than another and there is no SVD and no refresh
    period to choose. What the subspace leaves out is followed too, scaled as Adam scaled
    the rest, and the growth of its norm limited. Moments of an ``m × n`` matrix with ``m
    <= n`` take ``2 r n`` numbers and the basis ``m r``.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``; None stands for a quarter of the short side.
        blocks: over how many steps a sweep through the basis is spread; None stands
            for 8.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        max_growth: the limit on the growth of the residual's norm in a step; None for
            none.
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
        >>> tx = lrjax.subspace_adam(0.1, rank=2)
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
        T. Robert et al., "LDAdam: adaptive optimization from low-dimensional gradient
        statistics" (2024), arXiv 2410.16103, for the moments; X. Chen et al., "Fira: can
        we achieve full-rank training of LLMs under low-rank constraint?" (2024), arXiv
        2410.01623, for the residual. Special case: at full rank, where nothing is left
        out, Adam in a rotated basis.
    """
    blocks = 8 if blocks is None else blocks
    rank = 0.25 if rank is None else rank
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.Power(rank, blocks=blocks),
        schedule=sub.Always(when="after"),
        carry=sub.RotateVariance(b1, b2),
        lift=sub.ScaledResidual(max_growth=max_growth),
        where=where,
        precision=precision,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay, mask)

import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from ... import subspaces as sub
from ...transforms import project_updates
from ...transforms.subspace.project_updates import Where
from .._finish import finish


def subspace_adam(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank = 0.25,
    *,
    blocks: int = 8,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    growth: ArrayLike = 1.01,
    weight_decay: ArrayLike = 0.0,
    where: Where = sub.is_hidden_matrix,
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
            ``(path, (rows, columns))``.
        blocks: over how many steps a sweep through the basis is spread.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        growth: the limit on the growth of the residual's norm in a step.
        weight_decay: decoupled weight decay.
        where: which leaves to project; see :func:`lrjax.project_updates`. The others
            get plain Adam.
        key: source of the random numbers.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.project_updates`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.subspace_adam(1e-3, rank=2)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

    Reference:
        T. Robert et al., "LDAdam" (2024), arXiv 2410.16103, for the moments; X. Chen et
        al., "Fira" (2024), arXiv 2410.01623, for the residual. Special case: at full
        rank, where nothing is left out, Adam in a rotated basis.
    """
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.power(rank, blocks=blocks),
        schedule=sub.always(when="after"),
        carry=sub.rotate_variance(b1, b2),
        lift=sub.fira(growth=growth),
        where=where,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay)

import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from ... import subspaces as sub
from ...transforms import project_updates
from ...transforms.subspace.project_updates import Where
from .._finish import finish


def subtrack(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank = 0.25,
    *,
    refresh_every: int = 200,
    step_size: ArrayLike = 10.0,
    scale: ArrayLike = 0.25,
    growth: ArrayLike = 1.01,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    where: Where = sub.is_hidden_matrix,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SubTrack++: Fira whose subspace moves along geodesics instead of by SVDs.

    One SVD sets the basis; every ``refresh_every`` steps it takes a geodesic step of
    :func:`lrjax.subspaces.geodesic` and both moments follow.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``.
        refresh_every: the period of the basis.
        step_size: of the geodesic, in units of one over a squared gradient.
        scale: factor of the subspace term of projected leaves.
        growth: the limit on the growth of the residual's norm in a step.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
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
        >>> tx = lrjax.subtrack(1e-3, rank=2)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

    Reference:
        S. Rajabi, N. Nonta, S. Rambhatla, "SubTrack++" (2025), arXiv 2502.01586.
    """
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.geodesic(rank, step_size),
        schedule=sub.every(refresh_every),
        carry=sub.rotate_variance(b1, b2),
        lift=sub.fira(scale, growth=growth),
        where=where,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay)

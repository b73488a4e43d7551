import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from ... import subspaces as sub
from ...transforms import project_updates
from ...transforms.subspace.project_updates import Where
from .._finish import finish


def coap(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank = 0.25,
    *,
    refresh_every: int = 32,
    recalibrate: int = 5,
    scale: ArrayLike = 1.0,
    step_size: ArrayLike = 0.1,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    where: Where = sub.is_hidden_matrix,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """COAP: Adam in a subspace that follows the gradient and the momentum.

    Every ``refresh_every`` steps the basis takes a descent step of
    :func:`lrjax.subspaces.coap`, and every ``recalibrate`` times that a sketched SVD; ``U
    = scale · P adam(Pᵀ G)``, the first moment moved into the new basis.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``.
        refresh_every: the period of the basis.
        recalibrate: refreshes to one sketched SVD.
        scale: factor of the update of projected leaves.
        step_size: of the basis.
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
        >>> tx = lrjax.coap(1e-2, rank=2)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

    Reference:
        J. Xiao, S. Sang, T. Zhi et al., "COAP" (2024), arXiv 2412.00071.
    """
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.coap(rank, step_size, period=refresh_every, recalibrate=recalibrate),
        schedule=sub.every(refresh_every),
        carry=sub.rotate(),
        lift=sub.project(scale),
        where=where,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay)

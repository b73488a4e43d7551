import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from ... import subspaces as sub
from ...transforms import project_updates
from ...transforms.subspace.project_updates import Where
from .._finish import finish


def frugal(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank = 0.25,
    *,
    refresh_every: int = 200,
    residual: ArrayLike = 1.0,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    where: Where = sub.is_hidden_matrix,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """FRUGAL: Adam inside the subspace, sign descent outside.

    ``U = P adam(Pᵀ G) + residual · sign(G − P Pᵀ G)`` with the leading singular vectors
    ``P``; the first moment is moved into each new basis.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``.
        refresh_every: the period of the SVD.
        residual: learning rate outside over that inside.
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
        >>> tx = lrjax.frugal(1e-3, rank=2)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

    Reference:
        P. Zmushko et al., "FRUGAL" (2024), arXiv 2411.07837.
    """
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.svd(rank),
        schedule=sub.every(refresh_every),
        carry=sub.rotate(),
        lift=sub.sign_residual(residual),
        where=where,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay)

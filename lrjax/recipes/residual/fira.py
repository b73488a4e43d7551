import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from ... import subspaces as sub
from ...transforms import project_updates
from ...transforms.subspace.project_updates import Where
from .._finish import finish


def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank = 0.25,
    *,
    refresh_every: int = 200,
    scale: ArrayLike = 0.25,
    growth: ArrayLike = 1.01,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    where: Where = sub.is_hidden_matrix,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Fira: GaLore that follows the rest of the gradient too.

    ``U = scale · P N + (G − P R) diag(φ)`` with ``R = Pᵀ G``, ``N = adam(R)`` and ``φ_j =
    ‖N_j‖/‖R_j‖`` for each column; the norm of the second term grows by at most ``growth``
    a step.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``.
        refresh_every: the period of the SVD.
        scale: factor of the subspace term of projected leaves.
        growth: the limit.
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
        >>> tx = lrjax.fira(1e-2, rank=2)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

    Reference:
        X. Chen et al., "Fira" (2024), arXiv 2410.01623. At full rank it is
        :func:`lrjax.galore`.
    """
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.svd(rank),
        schedule=sub.every(refresh_every),
        lift=sub.fira(scale, growth=growth),
        where=where,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay)

import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from ... import subspaces as sub
from ...transforms import project_updates
from ...transforms.subspace.project_updates import Where
from .._finish import finish


def sara(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank = 0.25,
    *,
    refresh_every: int = 200,
    scale: ArrayLike = 0.25,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    where: Where = sub.is_hidden_matrix,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SARA: GaLore whose singular vectors are drawn, not taken from the top.

    Every ``refresh_every`` steps ``r`` of the left singular vectors are drawn without
    replacement, with weights ``σ_i``; ``U = scale · P adam(Pᵀ G)``. The dominant subspaces
    of successive refreshes overlap almost fully; drawn ones let every direction take its
    turn, so that it converges where GaLore stalls.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``.
        refresh_every: the period of the basis.
        scale: factor of the update of projected leaves.
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
        >>> tx = lrjax.sara(1e-2, rank=2)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

    Reference:
        H. Zhang et al., "Breaking the frozen subspace: importance sampling for low-rank
        optimization" (2025), arXiv 2502.05790. At full rank it is :func:`lrjax.galore`.
    """
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.sampled_svd(rank),
        schedule=sub.every(refresh_every),
        lift=sub.project(scale),
        where=where,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay)

from typing import Literal

import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from ... import subspaces as sub
from ...transforms import project_updates
from ...transforms.subspace.project_updates import Where
from .._finish import finish


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank = 0.25,
    *,
    refresh_every: int = 200,
    scale: ArrayLike = 0.25,
    method: Literal["svd", "randomized"] = "svd",
    side: sub.Side = "short",
    stagger: bool = True,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    where: Where = sub.is_hidden_matrix,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GaLore: Adam on the projection of each gradient to its dominant subspace.

    ``P`` holds the leading singular vectors of the gradient, renewed every
    ``refresh_every`` steps; ``U = scale · P adam(Pᵀ G)``. The moments are kept as they
    are. Projection alone can stall on noisy gradients: prefer
    :func:`lrjax.subspace_adam`.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``.
        refresh_every: the period of the basis.
        scale: factor of the update of projected leaves.
        method: a full SVD, or the randomized one: with ``"randomized"`` this is GaLore 2.
        side: the projected axis; see :class:`lrjax.subspaces.Basis`.
        stagger: spread the refreshes of the leaves over the period.
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
        >>> tx = lrjax.galore(1e-2, rank=2)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

    Reference:
        J. Zhao et al., "GaLore" (2024), arXiv 2403.03507; D. Su et al., "GaLore 2"
        (2025), arXiv 2504.20437. With ``side="long"``, ``scale=1`` it is
        ``optax.contrib.galore`` within a period.
    """
    bases = {"svd": sub.svd, "randomized": sub.randomized_svd}
    if method not in bases:
        raise ValueError(f"galore takes method 'svd' or 'randomized', got {method!r}.")
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        bases[method](rank, side=side),
        schedule=sub.every(refresh_every, stagger=stagger),
        lift=sub.project(scale),
        where=where,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay)

from typing import Literal

import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from ... import subspaces as sub
from ...transforms import project_updates
from ...transforms.subspace.project_updates import Where
from .._finish import finish


def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank = 0.25,
    *,
    refresh_every: int = 200,
    scale: ArrayLike = 1.0,
    over: Literal["channel", "tensor"] = "channel",
    growth: ArrayLike = 1.01,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    where: Where = sub.is_hidden_matrix,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO: plain gradients, with step sizes measured in a random subspace.

    ``U = scale · G diag(φ)``, ``φ_j = ‖N_j‖/‖R_j‖`` for each column (``over="channel"``)
    or one for the matrix, with ``R = Pᵀ G`` for a Gaussian ``P`` that is drawn again, not
    stored, and ``N = adam(R)``. Direction: the raw gradient, without momentum.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``.
        refresh_every: how long a random basis is used.
        scale: factor of the update of projected leaves.
        over: one ``φ`` for each column, or for the matrix.
        growth: limit on the growth of the update's norm in a step.
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
        >>> tx = lrjax.apollo(1e-2, rank=2)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

        APOLLO-Mini, with hardly more state than plain gradient descent:

        >>> tx = lrjax.apollo(1e-2, rank=1, over="tensor", scale=128**0.5)

    Reference:
        H. Zhu et al., "APOLLO" (2024), arXiv 2412.05270. With ``P = I`` it is Adam
        normalized by columns.
    """
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.gaussian(rank),
        schedule=sub.every(refresh_every),
        lift=sub.apollo(scale, over=over, growth=growth),
        where=where,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay)

from typing import Literal

import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from ... import subspaces as sub
from ...transforms import project_updates
from ...transforms.subspace.project_updates import Where
from .._finish import finish


def grass(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank = 0.25,
    *,
    refresh_every: int = 200,
    scale: ArrayLike = 0.25,
    choice: Literal["topk", "sampled", "uniform"] = "topk",
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    where: Where = sub.is_hidden_matrix,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Grass: Adam on a few rows of each gradient.

    The basis is a selection of ``r`` rows along the short side, so that projecting takes
    no arithmetic and the basis ``r`` indices. A refresh starts the moments anew, as if all
    gradients had been like the present one (:func:`lrjax.subspaces.seeded_reset`).

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``.
        refresh_every: the period of the selection.
        scale: factor of the update of projected leaves.
        choice: the rows of largest norm, drawn by their squared norms and scaled to be
            unbiased, or any; see :func:`lrjax.subspaces.rows`.
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
        >>> tx = lrjax.grass(1e-2, rank=2)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

    Reference:
        A. Muhamed, O. Li, D. Woodruff, M. Diab, V. Smith, "Grass" (2024), arXiv
        2406.17660. At full rank it is Adam.
    """
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.rows(rank, choice=choice),
        schedule=sub.every(refresh_every),
        carry=sub.seeded_reset(b1, b2),
        lift=sub.project(scale),
        where=where,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay)

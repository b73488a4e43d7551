from typing import cast

import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from ... import subspaces as sub
from ...transforms import project_updates
from ...transforms.subspace.project_updates import Where
from .._finish import finish


def online_subspace_descent(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank = 0.25,
    *,
    basis_rate: ArrayLike = 5.0,
    penalty: ArrayLike = 0.0,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    where: Where = sub.is_hidden_matrix,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Online subspace descent: the basis is trained by Adam along with the weights.

    ``P`` descends ``‖P Pᵀ G̃ − G̃‖² + λ‖PᵀP − I‖²``, ``G̃ = G/‖G‖``, by one Adam step
    with ``basis_rate`` times the learning rate; ``U = P adam(Pᵀ G)``. No refresh period.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``.
        basis_rate: learning rate of the basis over that of the weights.
        penalty: ``λ``.
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
        >>> tx = lrjax.online_subspace_descent(1e-3, rank=2)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

    Reference:
        K. Liang, B. Liu, L. Chen, Q. Liu (2024), arXiv 2408.12857.
    """
    if callable(learning_rate):
        rate = lambda count: basis_rate * learning_rate(count)
    else:
        rate = basis_rate * learning_rate
    rate = cast(optax.ScalarOrSchedule, rate)
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.oja(rank, optax.adam(rate, b1, b2, eps), penalty=penalty),
        schedule=sub.always(),
        where=where,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay)

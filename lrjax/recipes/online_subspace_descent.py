from typing import cast

import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from .. import subspaces as sub
from .._arguments import checks_trees
from ..subspaces import project_updates
from ._common import DecayMask, finish


@checks_trees
def online_subspace_descent(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank | None = None,
    *,
    basis_rate: ArrayLike = 5.0,
    penalty: ArrayLike = 0.0,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
    where: sub.Where | None = None,
    precision: str | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Online subspace descent: the basis is trained by Adam along with the weights.

    ``P`` descends ``‖P Pᵀ G̃ − G̃‖² + λ‖PᵀP − I‖²``, ``G̃ = G/‖G‖``, by one Adam step
    with ``basis_rate`` times the learning rate; ``U = P adam(Pᵀ G)``. No refresh period.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``; None stands for a quarter of the short side.
        basis_rate: learning rate of the basis over that of the weights.
        penalty: ``λ``.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.
        where: which leaves to project; see :func:`lrjax.project_updates`. The others
            get plain Adam.
        precision: of the products with the gradient; see :func:`lrjax.project_updates`.
        key: source of the random numbers.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.project_updates`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.online_subspace_descent(0.1, rank=2)
        >>> params = {"weight": jnp.zeros((8, 16))}
        >>> loss = lambda p: jnp.mean((p["weight"] - 1) ** 2)
        >>> step = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p))
        >>> state = tx.init(params)
        >>> for _ in range(20):
        ...     updates, state = step(params, state)
        ...     params = optax.apply_updates(params, updates)
        >>> print(loss(params) < 0.5)
        True

    Reference:
        K. Liang, B. Liu, L. Chen, Q. Liu, "Memory-efficient LLM training with online
        subspace descent" (2024), arXiv 2408.12857.
    """
    rank = 0.25 if rank is None else rank
    if callable(learning_rate):
        rate = lambda count: basis_rate * learning_rate(count)
    else:
        rate = basis_rate * learning_rate
    rate = cast(optax.ScalarOrSchedule, rate)
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.Oja(rank, optax.adam(rate, b1, b2, eps), penalty=penalty),
        schedule=sub.Always(),
        where=where,
        precision=precision,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay, mask)

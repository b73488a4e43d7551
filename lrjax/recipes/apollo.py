from typing import Literal

import optax
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from .. import subspaces as sub
from .._arguments import checks_trees
from ..subspaces import project_updates
from ._common import DecayMask, finish


@checks_trees
def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank | None = None,
    *,
    refresh_every: int | Array = 200,
    scale: ArrayLike = 1.0,
    over: Literal["channel", "tensor"] = "channel",
    max_growth: ArrayLike | None = 1.01,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
    where: sub.Where | None = None,
    precision: str | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO: plain gradients, with step sizes measured in a random subspace.

    ``U = scale · G diag(φ)``, ``φ_j = ‖N_j‖/‖R_j‖`` for each column (``over="channel"``)
    or one for the matrix, with ``R = Pᵀ G`` for a Gaussian ``P`` that is drawn again, not
    stored, and ``N = adam(R)``. Direction: the raw gradient, without momentum.

    Departures from the official code: ``scale`` multiplies the update, where the code takes
    the square root of its argument, and the limiter sees the update after Adam's bias
    correction, which the code applies behind it.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``; None stands for a quarter of the short side.
        refresh_every: how long a random basis is used.
        scale: factor of the update of projected leaves.
        over: one ``φ`` for each column, or for the matrix.
        max_growth: limit on the growth of the update's norm in a step; None for none.
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
        >>> tx = lrjax.apollo(0.1, rank=2)
        >>> params = {"weight": jnp.zeros((8, 16))}
        >>> loss = lambda p: jnp.mean((p["weight"] - 1) ** 2)
        >>> step = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p))
        >>> state = tx.init(params)
        >>> for _ in range(20):
        ...     updates, state = step(params, state)
        ...     params = optax.apply_updates(params, updates)
        >>> print(loss(params) < 0.5)
        True

        APOLLO-Mini, with hardly more state than plain gradient descent:

        >>> tx = lrjax.apollo(1e-2, rank=1, over="tensor", scale=128**0.5)

    Reference:
        H. Zhu et al., "APOLLO: SGD-like memory, AdamW-level performance" (2024), arXiv
        2412.05270. With ``P = I`` it is Adam normalized by columns.
    """
    rank = 0.25 if rank is None else rank
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.Gaussian(rank),
        schedule=sub.Periodic(refresh_every),
        lift=sub.ScaledGradient(scale, over=over, max_growth=max_growth),
        where=where,
        precision=precision,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay, mask)

import optax
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from .. import subspaces as sub
from .._arguments import checks_trees
from ..subspaces import project_updates
from ._common import DecayMask, finish


@checks_trees
def coap(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank | None = None,
    *,
    refresh_every: int | Array = 32,
    recalibrate: int | Array = 5,
    scale: ArrayLike = 1.0,
    step_size: ArrayLike = 0.1,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
    where: sub.Where | None = None,
    precision: str | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """COAP: Adam in a subspace that follows the gradient and the momentum.

    Every ``refresh_every`` steps the basis takes a descent step of
    :class:`~lrjax.subspaces.CorrelationDescent`, and every ``recalibrate`` times that a
    sketched SVD; ``U = scale · P adam(Pᵀ G)``, the first moment moved into the new basis.

    Departure from the official code: the second moment is kept as it is at a refresh, where
    the code, if told to restore moments, rotates the root of it and squares the outcome.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``; None stands for a quarter of the short side.
        refresh_every: the period of the basis.
        recalibrate: refreshes to one sketched SVD.
        scale: factor of the update of projected leaves.
        step_size: of the basis.
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
        >>> tx = lrjax.coap(0.1, rank=2)
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
        J. Xiao, S. Sang, T. Zhi et al., "COAP: memory-efficient training with
        correlation-aware gradient projection" (2024), arXiv 2412.00071.
    """
    rank = 0.25 if rank is None else rank
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.CorrelationDescent(
            rank, step_size, period=refresh_every, recalibrate=recalibrate
        ),
        schedule=sub.Periodic(refresh_every),
        carry=sub.Rotate(),
        lift=sub.Project(scale),
        where=where,
        precision=precision,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay, mask)

import optax
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from .. import subspaces as sub
from .._arguments import checks_trees
from ..subspaces import project_updates
from ._common import DecayMask, finish


@checks_trees
def frugal(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank | None = None,
    *,
    refresh_every: int | Array = 200,
    residual: ArrayLike = 1.0,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
    where: sub.Where | None = None,
    precision: str | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """FRUGAL: Adam inside the subspace, sign descent outside.

    ``U = P adam(Pᵀ G) + residual · sign(G − P Pᵀ G)`` with the leading singular vectors
    ``P``; the first moment is moved into each new basis.

    Departures from the official code: the first moment is moved into each new basis, where
    the code forgets both moments at a refresh, and entries of the residual that are nothing
    but rounding have no sign.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``; None stands for a quarter of the short side.
        refresh_every: the period of the SVD.
        residual: learning rate outside over that inside.
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
        >>> tx = lrjax.frugal(0.1, rank=2)
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
        P. Zmushko et al., "FRUGAL: memory-efficient optimization by reducing state
        overhead for scalable training" (2024), arXiv 2411.07837.
    """
    rank = 0.25 if rank is None else rank
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.SVD(rank),
        schedule=sub.Periodic(refresh_every),
        carry=sub.Rotate(),
        lift=sub.SignResidual(residual),
        where=where,
        precision=precision,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay, mask)

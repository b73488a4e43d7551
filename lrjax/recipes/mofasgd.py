import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from .. import subspaces as sub
from .._arguments import checks_trees
from ..transforms import factored_momentum
from ._common import DecayMask, elsewhere, finish


@checks_trees
def mofasgd(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank | None = None,
    *,
    momentum: ArrayLike = 0.95,
    fallback: optax.GradientTransformation | None = None,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
    where: sub.Where | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """MoFaSGD: spectrally normalized steps of a momentum that is kept as factors.

    ``W ← W − η U Vᵀ`` with the momentum ``U diag(s) Vᵀ`` of rank ``r`` as in
    :func:`lrjax.factored_momentum`. The momentum of an ``m × n`` matrix takes ``r (m + n
    + 1)`` numbers, there is no second moment, no basis to refresh and no large SVD after
    the first step.

    Args:
        learning_rate: a number or a schedule; the spectral norm of every update.
        rank: an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``; None stands for 32.
        momentum: decay of the momentum.
        fallback: transform of the leaves that are not chosen; Adam by default.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            matrices to treat.
        key: of the randomized SVD of the first gradient.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.factored_momentum`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.mofasgd(0.5, rank=2)
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
        P. Mahdavinia, M. Mahdavi, "Low-rank momentum factorization for memory efficient
        training" (2025), arXiv 2507.08091: the published update, where its code divides
        by singular values. Special case: a zero gradient repeats the last update.
    """
    rank = 32 if rank is None else rank
    tx = optax.chain(
        factored_momentum(rank, momentum, where=where, key=key),
        elsewhere(fallback, where),
    )
    return finish(tx, learning_rate, weight_decay, mask)

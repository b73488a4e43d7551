import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from ... import subspaces as sub
from ...transforms import factored_momentum
from ...transforms.subspace.project_updates import Where
from .._finish import finish
from ._others import elsewhere


def mofasgd(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank = 32,
    *,
    decay: ArrayLike = 0.95,
    others: optax.GradientTransformation | None = None,
    weight_decay: ArrayLike = 0.0,
    where: Where = sub.is_hidden_matrix,
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
            ``(path, (rows, columns))``.
        decay: of the momentum.
        others: transform of the leaves that are not chosen; Adam by default.
        weight_decay: decoupled weight decay.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            matrices to treat.
        key: of the randomized SVD of the first gradient.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.factored_momentum`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.mofasgd(1e-2, rank=2)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

    Reference:
        P. Mahdavinia, M. Mahdavi, "MoFaSGD" (2025), arXiv 2507.08091: the published
        update, where its code divides by singular values. Special case: a zero gradient
        repeats the last update.
    """
    tx = optax.chain(
        factored_momentum(rank, decay, where=where, key=key),
        elsewhere(others, where),
    )
    return finish(tx, learning_rate, weight_decay)

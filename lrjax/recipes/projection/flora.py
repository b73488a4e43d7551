import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from ... import subspaces as sub
from ...transforms import project_updates
from ...transforms.subspace.project_updates import Where
from .._finish import finish


def flora(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank = 128,
    *,
    refresh_every: int = 1000,
    b1: ArrayLike = 0.9,
    weight_decay: ArrayLike = 0.0,
    where: Where = sub.is_hidden_matrix,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Flora: Adafactor whose momentum is compressed by a random projection.

    The gradient is divided by Adafactor's factored root mean square and clipped to RMS 1.
    Its momentum lives in a Gaussian subspace drawn from the key, ``C ← b1 C + (1−b1) Pᵀ
    G``, moved to the next one by ``C ← P_newᵀ P_old C``; the update is ``b1 · P C_old +
    (1−b1) · G``. The paper's compressed accumulation of microbatches is
    :func:`lrjax.accumulate_gradients`, around this or any other optimizer.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``.
        refresh_every: how long a random basis is used.
        b1: decay of the momentum.
        weight_decay: decoupled weight decay.
        where: which leaves to project; see :func:`lrjax.project_updates`. The others
            get plain momentum.
        key: source of the random numbers.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.project_updates`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.flora(1e-2, rank=2)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

    Reference:
        Y. Hao, Y. Cao, L. Mou, "Flora" (2024), arXiv 2402.03293.
    """
    tx = project_updates(
        optax.ema(b1, debias=False),
        sub.gaussian(rank),
        schedule=sub.every(refresh_every),
        carry=sub.rotate(),
        lift=sub.blend(b1),
        where=where,
        key=key,
    )
    scaled = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), tx)
    return finish(scaled, learning_rate, weight_decay)

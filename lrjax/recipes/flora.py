import optax
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from .. import subspaces as sub
from .._arguments import checks_trees
from ..subspaces import project_updates
from ._common import DecayMask, finish


@checks_trees
def flora(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank | None = None,
    *,
    refresh_every: int | Array = 1000,
    b1: ArrayLike = 0.9,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
    where: sub.Where | None = None,
    precision: str | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Flora: Adafactor whose momentum is compressed by a random projection.

    The gradient is divided by Adafactor's factored root mean square and clipped to RMS 1.
    Its momentum lives in a Gaussian subspace drawn from the key, ``C ← b1 C + (1−b1) Pᵀ
    G``, moved to the next one by ``C ← P_newᵀ P_old C``; the update is ``b1 · P C_old +
    (1−b1) · G``. The paper's compressed accumulation of microbatches is
    :func:`lrjax.accumulate_gradients`, around this or any other optimizer.

    Departures from the official code: Adafactor's step relative to the root mean square of
    the parameter is left out, so that the learning rate means what it means for Adam; chain
    ``optax.scale_by_param_block_rms`` behind the recipe to have it.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``; None stands for 128.
        refresh_every: how long a random basis is used.
        b1: decay of the momentum.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.
        where: which leaves to project; see :func:`lrjax.project_updates`. The others
            get plain momentum.
        precision: of the products with the gradient; see :func:`lrjax.project_updates`.
        key: source of the random numbers.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.project_updates`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.flora(0.1, rank=2)
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
        Y. Hao, Y. Cao, L. Mou, "Flora: low-rank adapters are secretly gradient
        compressors" (2024), arXiv 2402.03293.
    """
    rank = 128 if rank is None else rank
    tx = project_updates(
        optax.ema(b1, debias=False),
        sub.Gaussian(rank),
        schedule=sub.Periodic(refresh_every),
        carry=sub.Rotate(),
        lift=sub.Blend(b1),
        where=where,
        precision=precision,
        key=key,
    )
    scaled = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), tx)
    return finish(scaled, learning_rate, weight_decay, mask)

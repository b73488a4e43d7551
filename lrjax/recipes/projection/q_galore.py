import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from ... import subspaces as sub
from ...transforms import project_updates, quantize_state
from ...transforms.subspace.project_updates import Where
from .._finish import finish


def q_galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank = 0.25,
    *,
    refresh_every: int = 200,
    scale: ArrayLike = 0.25,
    threshold: ArrayLike = 0.4,
    block: int = 256,
    min_size: int = 4096,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    where: Where = sub.is_hidden_matrix,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Q-GaLore: GaLore with a 4-bit basis, 8-bit moments and fewer and fewer SVDs.

    The basis is stored at four bits a number (:func:`lrjax.subspaces.quantized`), the
    moments at eight (:func:`lrjax.quantize_state`), both with one scale for each ``block``
    numbers. After each SVD of a leaf ``|⟨p₁_new, p₁_old⟩|`` is noted; when the last five
    average at least ``threshold``, the leaf's period doubles. Parameters of eight bits are
    the affair of whoever applies the updates.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``.
        refresh_every: the first period of the basis.
        scale: factor of the update of projected leaves.
        threshold: the mean overlap from which a period doubles.
        block: numbers that share a scale.
        min_size: smaller moments stay in full precision.
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
        >>> tx = lrjax.q_galore(1e-2, rank=2)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

    Reference:
        Z. Zhang et al., "Q-GaLore" (2024), arXiv 2407.08296.
    """
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.quantized(sub.svd(rank), bits=4, group=block),
        schedule=sub.adaptive(refresh_every, threshold=threshold),
        lift=sub.project(scale),
        where=where,
        key=key,
    )
    tx = quantize_state(tx, block=block, min_size=min_size)
    return finish(tx, learning_rate, weight_decay)

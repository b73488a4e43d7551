from typing import cast

import optax
from jaxtyping import ArrayLike, DTypeLike

from .._arguments import checks_trees
from ..transforms import scale_by_gradient_window
from ._common import DecayMask, finish


@checks_trees
def mfac(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    damping: ArrayLike = 1.0,
    relative: bool = True,
    momentum: ArrayLike = 0.9,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
    dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """M-FAC, the natural gradient of a window of past gradients.

    ``v ← b v + (1 − b) λ (λI + GᵀG/m)⁻¹ g`` with the last ``m`` gradients as rows of ``G``,
    :func:`lrjax.scale_by_gradient_window`. The state has ``m + 1`` numbers a parameter.

    Args:
        learning_rate: a number or a schedule, of the size of those of SGD with a relative
            damping.
        rank: ``m``, how many gradients are kept; None stands for 32.
        damping: ``λ``, relative to the mean of ``‖g‖²/m``, see ``relative``.
        relative: as for :func:`lrjax.scale_by_gradient_window`. The paper has an absolute
            ``λ = 1e-5``, ``m = 1024``, and a learning rate in units of ``λ``.
        momentum: ``b``.
        weight_decay: decoupled weight decay. The code of the paper adds it to the gradient,
            as ``optax.add_decayed_weights`` does in front of this.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.
        dtype: in which the window is kept.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.scale_by_gradient_window`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.mfac(10.0, rank=8)
        >>> params = {"weight": jnp.zeros((8, 16))}
        >>> loss = lambda p: jnp.mean((p["weight"] - 1) ** 2)
        >>> step = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p))
        >>> state = tx.init(params)
        >>> for _ in range(20):
        ...     updates, state = step(params, state)
        ...     params = optax.apply_updates(params, updates)
        >>> print(loss(params) < 0.9)
        True

    Reference:
        E. Frantar, E. Kurtic, D. Alistarh, "M-FAC: efficient matrix-free approximations of
        second-order information" (2021), arXiv 2107.03356.
    """
    tx = optax.chain(
        scale_by_gradient_window(
            32 if rank is None else rank, damping, relative=relative, dtype=dtype
        ),
        optax.ema(cast(float, momentum), debias=False),
    )
    return finish(tx, learning_rate, weight_decay, mask)

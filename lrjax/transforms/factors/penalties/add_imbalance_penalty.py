from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike

from ...._arguments import checks_trees
from ...._tree import check_has_nodes, check_params, like, map_nodes
from ....linalg import gram, times
from ....lowrank import LowRank
from ..._checks import check_non_negative


@checks_trees
def add_imbalance_penalty(
    strength: ArrayLike, *, ratio: ArrayLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Pull the Gram matrices of two factors to a given ratio.

    The gradient of ``λ ‖D‖_F²`` with ``D = rightᵀright − ρ leftᵀleft (r, r)`` is added::

        U_l ← U_l − 4λρ left D        U_r ← U_r + 4λ right D

    Of a LoRA pair, ``left = B (m, r)`` and ``rightᵀ = A (r, n)``, that is ``A Aᵀ ≈ ρ BᵀB``:
    with ``ρ = r/m`` the variance of activations depends on no width. With ``ρ = 1`` the
    factors become balanced, and to first order the product is not moved by it. Placed
    between Adam and the learning rate, as decoupled weight decay is, it is neither averaged
    nor normalized. No state, ``O((m + n) r²)``; what is no LowRank node is left alone.

    The gradient grows with the third power of the factors. Where ``4λ max(1, ρ) ‖D‖_F`` is
    above one the pull is divided by it: none is larger than weight decay of strength one.

    Args:
        strength: λ, non-negative.
        ratio: ρ, positive; None stands for ``r/m`` of each node.

    Returns:
        A stateless optax transform; ``update`` needs ``params``, and ``frozen`` where a
        factor is frozen.

    Raises:
        ValueError: at construction, for a negative strength or ratio; in ``init``, if the
            tree holds no LowRank node; in ``update``, without ``params``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.array([[2.0], [0.0]]), jnp.array([[1.0]]))
        >>> still = lrjax.LowRank(jnp.zeros((2, 1)), jnp.zeros((1, 1)))
        >>> tx = lrjax.add_imbalance_penalty(0.25)
        >>> step, _ = tx.update(still, tx.init(x), x)  # ρ = 1/2, D = 1 − 4/2
        >>> print(step.left.ravel(), step.right)
        [1. 0.] [[-1.]]

    Reference:
        Z. Zhu, Y. Wu, Q. Gu, V. Cevher, "Imbalance-regularized LoRA: a plug-and-play method
        for improving fine-tuning of foundation models" (2024), NeurIPS workshop. Special
        case: it is zero where :func:`lrjax.metrics.relative_imbalance` is.
    """
    check_non_negative("add_imbalance_penalty", "strength", strength)
    if ratio is not None:
        check_non_negative("add_imbalance_penalty", "ratio", ratio)

    def init(params):
        check_has_nodes("add_imbalance_penalty", params)
        return optax.EmptyState()

    def pull(u: LowRank, x: LowRank) -> LowRank:
        rho = x.rank / x.shape[-2] if ratio is None else ratio
        off = gram(x.right) - jnp.multiply(rho, gram(x.left))
        off = jnp.multiply(4 * strength, off)
        size = jnp.linalg.norm(off, axis=(-2, -1), keepdims=True)
        off = off / jnp.maximum(1, size * jnp.maximum(1, rho))
        both = (u.left, jnp.negative(rho), x.left), (u.right, 1, x.right)
        moved = lambda own, sign, x: own + sign * times(x.astype(off.dtype), off)
        return like(u, *(moved(*side) for side in both if side[0] is not None))

    def update(updates, state, params=None, *, frozen: Any = None, **extra):
        del extra
        check_params("add_imbalance_penalty", params)
        return map_nodes(pull, updates, params, frozen=frozen), state

    return optax.GradientTransformationExtraArgs(init, update)

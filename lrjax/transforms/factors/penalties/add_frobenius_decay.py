from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike

from ...._arguments import checks_trees
from ...._tree import Side, check_has_nodes, check_params, like, map_nodes, sides
from ....linalg import gram, times
from ....lowrank import LowRank
from ..._checks import check_non_negative


@checks_trees
def add_frobenius_decay(weight_decay: ArrayLike) -> optax.GradientTransformationExtraArgs:
    """Weight decay of the product of two factors, which is never formed.

    The gradient of ``½ λ ‖X‖_F²`` for ``X = left @ right.T`` is added::

        G_l ← G_l + λ left (rightᵀright)        G_r ← G_r + λ right (leftᵀleft)

    in ``O((m + n) r²)``. Decay of the factors by themselves is that of the nuclear norm,
    :func:`lrjax.add_nuclear_norm`; this one treats a layer in factors as a dense one is
    treated. Keep the factors out of ordinary decay, and start from the truncated SVD of a
    dense start, :func:`lrjax.truncate`. Leaves that are no LowRank nodes are not decayed.

    Args:
        weight_decay: λ, non-negative; a number or an array.

    Returns:
        A stateless optax transform; ``update`` needs ``params``, and ``frozen`` where a
        factor is frozen.

    Raises:
        ValueError: at construction, for a negative decay; in ``init``, if the tree holds no
            LowRank node; in ``update``, without ``params``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.array([[2.0]]), jnp.array([[3.0]]))
        >>> grad = lrjax.LowRank(jnp.zeros((1, 1)), jnp.zeros((1, 1)))
        >>> tx = lrjax.add_frobenius_decay(0.5)
        >>> step, _ = tx.update(grad, tx.init(x), x)
        >>> print(step.left, step.right)  # 0.5 · 2 · 9 and 0.5 · 3 · 4
        [[9.]] [[6.]]

    Reference:
        M. Khodak, N. Tenenholtz, L. Mackey, N. Fusi, "Initialization and regularization of
        factorized neural layers" (2021), arXiv 2105.01029.
    """
    check_non_negative("add_frobenius_decay", "weight_decay", weight_decay)

    def init(params):
        check_has_nodes("add_frobenius_decay", params)
        return optax.EmptyState()

    def slope(side: Side) -> Array:
        small = jnp.multiply(weight_decay, gram(side.partner))
        return times(side.factor.astype(small.dtype), small)

    def update(updates, state, params=None, *, frozen: Any = None, **extra):
        del extra
        check_params("add_frobenius_decay", params)

        def decay(g: LowRank, x: LowRank) -> LowRank:
            return like(g, *(side.gradient + slope(side) for side in sides(g, x)))

        return map_nodes(decay, updates, params, frozen=frozen), state

    return optax.GradientTransformationExtraArgs(init, update)

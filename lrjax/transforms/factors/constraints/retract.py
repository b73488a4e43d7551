from typing import Any

import optax

from ...._arguments import checks_trees
from ...._tree import check_has_nodes, check_params, like, map_nodes, sides
from ....lowrank import LowRank, retraction


@checks_trees
def retract() -> optax.GradientTransformationExtraArgs:
    """Move a product of two factors along its tangent, and back to the nearest of its rank.

    A step ``(A, B)`` of the factors of ``X = left @ right.T``, width ``r``, moves the
    product by ``A rightᵀ + left Bᵀ`` to first order and by ``A Bᵀ`` beyond. Here the
    product becomes ``SVD_r(X + A rightᵀ + left Bᵀ)``, the best approximation of the
    first-order step, at any length of the step: the metric-projection retraction. It
    does not depend on how ``X`` is factorized.

    The new factors are balanced, ``leftᵀleft = rightᵀright``, and of all balanced ones
    those nearest to the old, so that moments of the factors keep their meaning and a zero
    step of balanced factors moves nothing. Place it last in the chain, after the learning
    rate. ``O((m + n) r²)`` and an SVD of a ``2r × 2r`` matrix. A pair with a frozen factor
    takes the step as it is: its product keeps the rank by itself.

    Returns:
        A stateless optax transform; ``update`` needs ``params``, and ``frozen``
        where a factor is frozen.

    Raises:
        ValueError: in ``init``, if the tree holds no LowRank node; in ``update``, without
            ``params`` or for factors that are wider than the matrix.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> x = lrjax.LowRank(jnp.array([[2.0], [0.0]]), jnp.array([[2.0], [0.0]]))
        >>> step = lrjax.LowRank(jnp.array([[1.0], [0.0]]), jnp.array([[1.0], [0.0]]))
        >>> tx = lrjax.retract()
        >>> step, _ = tx.update(step, tx.init(x), x)
        >>> print(optax.apply_updates(x, step).materialize().round(4) + 0.0)
        [[8. 0.]
         [0. 0.]]

    Reference:
        P.-A. Absil, I. V. Oseledets, "Low-rank retractions: a survey and new results"
        (2015), Computational Optimization and Applications. Special case: 4 + 2 + 2
        above, where the factors by themselves give 9.
    """

    def init(params):
        check_has_nodes("retract", params)
        return optax.EmptyState()

    def update(updates, state, params=None, *, frozen: Any = None, **extra):
        del extra
        check_params("retract", params)

        def move(u: LowRank, x: LowRank) -> LowRank:
            if len(sides(u, x)) == 1:  # its product is linear in the factor that moves
                return u
            new = retraction(x, u)
            return like(u, new.left - x.left, new.right - x.right)

        return map_nodes(move, updates, params, frozen=frozen), state

    return optax.GradientTransformationExtraArgs(init, update)

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike

from ...._arguments import checks_trees
from ...._tree import check_has_nodes, check_params, map_factors
from ....lowrank import tail_squares
from ..._checks import check_non_negative


@checks_trees
def add_hierarchical_lasso(
    strength: ArrayLike, *, eps: ArrayLike = 1e-8
) -> optax.GradientTransformation:
    """Add the gradient of a penalty under which the last columns of factors die first.

    Of ``X = left @ right.T`` with columns from ``b`` on, ``left[:, b:]``, it is that of::

        strength · Σ_b (√(‖left[:, b:]‖² + eps²) + √(‖right[:, b:]‖² + eps²))

    so that column j has a share in j norms, and those that are needed least gather at the
    end, where :func:`lrjax.prune_columns` takes them away. ``O((m + n) r)``. Place it
    first in the chain. Leaves that are no LowRank nodes are not penalized.

    Args:
        strength: non-negative; a number or an array.
        eps: a length below which columns count as none; keeps the gradient of columns that
            are exactly zero finite.

    Returns:
        A stateless optax transform; ``update`` needs ``params``.

    Raises:
        ValueError: at construction, for a negative strength; in ``init``, if the tree holds
            no LowRank node; in ``update``, without ``params``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.array([[3.0, 4.0]]), jnp.array([[1.0, 0.0]]))
        >>> zero = lrjax.LowRank(jnp.zeros((1, 2)), jnp.zeros((1, 2)))
        >>> tx = lrjax.add_hierarchical_lasso(1.0)
        >>> step, _ = tx.update(zero, tx.init(x), x)
        >>> print(step.left, step.right)  # 3/5, 4/5 + 4/4; 1, 0
        [[0.6 1.8]] [[1. 0.]]

    Reference:
        S. Horváth, S. Laskaridis, S. Rajput, H. Wang, "Maestro: uncovering low-rank
        structures via trainable decomposition" (2023), arXiv 2308.14929; of groups in a
        hierarchy: P. Zhao, G. Rocha, B. Yu, "The composite absolute penalties family for
        grouped and hierarchical variable selection" (2009), arXiv 0909.0411.
    """
    check_non_negative("add_hierarchical_lasso", "strength", strength)

    def init(params):
        check_has_nodes("add_hierarchical_lasso", params)
        return optax.EmptyState()

    def slope(factor: Array) -> Array:
        squares = tail_squares(factor)
        inverse = 1 / jnp.sqrt(squares + jnp.asarray(eps, squares.dtype) ** 2)
        share = jnp.cumsum(inverse, axis=-1)[..., None, :]
        return jnp.asarray(strength, share.dtype) * share * factor.astype(share.dtype)

    def update(updates, state, params=None):
        check_params("add_hierarchical_lasso", params)
        return map_factors(lambda g, x: g + slope(x), updates, params), state

    return optax.GradientTransformation(init, update)

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike

from ...._arguments import checks_trees
from ...._tree import check_has_nodes, check_params, like, map_factors
from ....linalg import working_dtype
from ....lowrank import is_low_rank
from ..._checks import check_non_negative


@checks_trees
def scale_by_row_norms(most: ArrayLike = 2.0) -> optax.GradientTransformation:
    """Give each row of both factors a learning rate of its own, large where it is small.

    ``B = left (m, r)`` and ``A = rightᵀ (r, n)`` have ``m`` and ``r`` rows, as the two
    tensors of a LoRA pair are stored. The update of each row ``x`` is multiplied by::

        1 / √(‖x‖ + 1/most²)

    which is ``most`` where the row is zero, as all of B is at the start, and about
    ``‖x‖^(−½)`` where it is not small. Place it after Adam, which undoes any scale before
    it. Without state; what is no LowRank node is left alone.

    Args:
        most: the largest factor, non-negative.

    Returns:
        A stateless optax transform; ``update`` needs ``params``.

    Raises:
        ValueError: at construction, for a negative number; in ``init``, if the tree holds
            no LowRank node; in ``update``, without ``params``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.array([[0.0], [3.75]]), jnp.array([[15.75]]))
        >>> update = lrjax.LowRank(jnp.ones((2, 1)), jnp.ones((1, 1)))
        >>> tx = lrjax.scale_by_row_norms(2.0)
        >>> step, _ = tx.update(update, tx.init(x), x)
        >>> print(step.left.ravel(), step.right)
        [2.  0.5] [[0.25]]

    Reference:
        H. Huang, R. Balestriero, "ALLoRA: adaptive learning rate mitigates LoRA fatal
        flaws" (2024), arXiv 2410.09692.
    """
    check_non_negative("scale_by_row_norms", "most", most)

    def init(params):
        check_has_nodes("scale_by_row_norms", params)
        return optax.EmptyState()

    def scaled(u: Array, x: Array, axis: int) -> Array:
        x = x.astype(working_dtype(x.dtype))
        size = jnp.linalg.norm(x, axis=axis, keepdims=True)
        least = 1 / jnp.asarray(most, x.dtype) ** 2
        return u / jnp.sqrt(size + least)

    def update(updates, state, params=None):
        check_params("scale_by_row_norms", params)

        def scale(u: Any, x: Any) -> Any:
            if not is_low_rank(u) or not jax.tree.leaves(u):
                return u
            # The rows of A are the columns of the right factor.
            both = (u.left, x.left, -1), (u.right, x.right, -2)
            return like(u, *(scaled(*side) for side in both if side[0] is not None))

        whole = map_factors(lambda u, _: u, updates, params)  # refuses what was torn apart
        return jax.tree.map(scale, whole, params, is_leaf=is_low_rank), state

    return optax.GradientTransformation(init, update)

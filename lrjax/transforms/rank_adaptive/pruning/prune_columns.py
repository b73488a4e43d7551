from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Int, PyTree

from ...._arguments import checks_trees
from ...._tree import check_has_nodes, check_params, check_whole, like, map_nodes
from ....linalg import increment
from ....lowrank import LowRank, first_columns, is_low_rank, tail_squares


class PruneColumnsState(NamedTuple):
    """The state of :func:`prune_columns`.

    Attributes:
        count: the number of steps.
        rank: int32 ``(*b,)`` for each LowRank node, ``optax.MaskedNode()`` for each other
            leaf: the columns that are left.
    """

    count: Int[Array, ""]
    rank: PyTree


@checks_trees
def prune_columns(
    threshold: ArrayLike, *, period: int | Array = 1
) -> optax.GradientTransformation:
    """Take away the last columns of factors once all that is left of them is small.

    Of ``X = left @ right.T`` the importance ``‖left[:, b:]‖ ‖right[:, b:]‖`` falls with b.
    After every ``period``-th step the rank is how many of these are at least
    ``threshold``, never more than it was and never less than 1. Columns beyond are zeros
    in both factors from then on, whatever the step is, so that shapes stay and one program
    serves all ranks; ``lrjax.nn.compact`` cuts them off. Place it last in the chain.

    Args:
        threshold: in the units of the product.
        period: how many steps from one pruning to the next; may be traced.

    Returns:
        An optax transform; ``update`` needs ``params``.

    Raises:
        ValueError: for a period below 1; in ``init``, if the tree holds no LowRank node; in
            ``update``, without ``params``.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> tx = optax.chain(optax.sgd(1.0), lrjax.prune_columns(0.5))
        >>> x = lrjax.LowRank(jnp.eye(3), jnp.diag(jnp.array([2.0, 1.0, 0.1])))
        >>> updates, state = tx.update(
        ...     lrjax.LowRank(jnp.zeros((3, 3)), jnp.zeros((3, 3))), tx.init(x), x)
        >>> print(state[1].rank, optax.apply_updates(x, updates).right[2])
        2 [0. 0. 0.]

    Reference:
        S. Horváth, S. Laskaridis, S. Rajput, H. Wang, "Maestro: uncovering low-rank
        structures via trainable decomposition" (2023), arXiv 2308.14929.
    """
    if not isinstance(period, Tracer) and period < 1:
        raise ValueError(
            f"prune_columns needs a period of at least one step, got {period}."
        )

    def init(params):
        check_has_nodes("prune_columns", params)
        check_whole("prune_columns", params)
        rank = jax.tree.map(_width, params, is_leaf=is_low_rank)
        return PruneColumnsState(jnp.zeros((), jnp.int32), rank)

    def update(updates, state, params=None):
        check_params("prune_columns", params)
        count = increment(state.count)
        due = count % period == 0

        def prune(x: LowRank, old: Array) -> Array:
            squares = tail_squares(x.left) * tail_squares(x.right)
            large = jnp.sqrt(squares) >= jnp.asarray(threshold, squares.dtype)
            fewer = jnp.minimum(jnp.sum(large, axis=-1, dtype=jnp.int32), old)
            return jnp.where(due, jnp.maximum(fewer, 1), old)

        goal = map_nodes(_moved, updates, params)
        nodes, treedef = jax.tree.flatten(goal, is_leaf=is_low_rank)
        old = treedef.flatten_up_to(state.rank)
        rank = [prune(x, r) if _is_whole(x) else r for x, r in zip(nodes, old, strict=True)]
        kept = [
            first_columns(x, r) if _is_whole(x) else x
            for x, r in zip(nodes, rank, strict=True)
        ]
        updates = map_nodes(_back, updates, treedef.unflatten(kept), params)
        return updates, PruneColumnsState(count, treedef.unflatten(rank))

    return optax.GradientTransformation(init, update)


def _is_whole(x: Any) -> bool:
    return is_low_rank(x) and eqx.is_array_like(x.left)


def _width(x: Any) -> Any:
    """The rank that a node begins with."""
    if not _is_whole(x):
        return optax.MaskedNode()
    return jnp.full(x.left.shape[:-2], x.rank, jnp.int32)


def _moved(u: LowRank, x: LowRank) -> LowRank:
    return like(x, x.left + u.left, x.right + u.right)


def _back(u: LowRank, new: LowRank, x: LowRank) -> LowRank:
    return like(u, new.left - x.left, new.right - x.right)

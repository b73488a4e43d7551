from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._matrices import check_real, path_name
from .lowrank import LowRank, is_low_rank


def map_nodes(f: Callable, updates: PyTree, *rest: PyTree) -> PyTree:
    """Map ``f`` over the LowRank nodes of trees and leave other leaves as they are.

    Args:
        f: called with one LowRank of each tree.
        updates: decides the structure. Nodes whose factors were masked out as a whole
            (``optax.MaskedNode``, ``None``) are left alone.
        *rest: further trees, of which the structure of ``updates`` is a prefix.

    Returns:
        A tree of the structure of ``updates``.

    Raises:
        ValueError: if one factor of a node is there and the other is not.
    """

    def apply(path, update, *nodes):
        if not is_low_rank(update):
            return update
        present = [
            eqx.is_array_like(factor)
            for node in (update, *nodes)
            for factor in (node.left, node.right)
        ]
        if all(present):
            return f(update, *nodes)
        if any(present):
            raise ValueError(
                f"The LowRank node at {path_name(path) or 'the root'} has lost one of "
                "its factors: this transform needs both. Mask or label LowRank nodes as "
                "a whole (is_leaf=lrjax.is_low_rank), not factor by factor. If "
                "adapt(train=…) froze one, give the transform the whole adapters and their "
                "gradient in place of a half of lrjax.partition: what is frozen has "
                "gradient zero."
            )
        return update

    return jtu.tree_map_with_path(apply, updates, *rest, is_leaf=is_low_rank)


def has_nodes(tree: PyTree) -> bool:
    """Whether a tree holds a LowRank node with factors that are not masked out."""
    nodes = filter(is_low_rank, jax.tree.leaves(tree, is_leaf=is_low_rank))
    return any(jax.tree.leaves(node) for node in nodes)


def check_has_nodes(name: str, params: PyTree) -> None:
    """Refuse complex leaves, and a tree with array leaves but without a LowRank node.

    A tree without any array is let through: optax calls ``init`` with placeholders.
    """
    check_real(name, params)
    leaves = jax.tree.leaves(params, is_leaf=is_low_rank)
    arrays = any(eqx.is_array_like(leaf) for leaf in leaves)
    if arrays and not any(is_low_rank(leaf) for leaf in leaves):
        raise ValueError(
            f"{name} found no lrjax.LowRank node in the parameters, so it would do "
            "nothing. Build them with lrjax.LowRank or lrjax.adapt; for factor pairs in "
            "dict, Flax or other trees wrap the transform in lrjax.on_pairs(tx, rule)."
        )


def check_params(name: str, params: PyTree | None) -> None:
    """Refuse an update that was called without params."""
    if params is None:
        raise ValueError(
            f"{name} needs the factors themselves: call tx.update(updates, state, params)."
        )


def like(node: LowRank, left: Any, right: Any) -> LowRank:
    """A LowRank of the given factors, cast to the dtype of ``node``."""
    return LowRank(left.astype(node.dtype), right.astype(node.dtype))

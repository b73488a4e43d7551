"""Trees of changes side by side, leaf by leaf."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from .._matrices import named_leaves
from ..linalg import working_dtype
from ..lowrank import LowRank, SVDForm


Weights = ArrayLike | Sequence[ArrayLike]


def is_node(x: Any) -> bool:
    """Whether a leaf is a matrix in factors."""
    return isinstance(x, LowRank | SVDForm)


def map_changes(
    owner: str,
    f: Callable[[str, list[Any], Array], Any],
    changes: Sequence[PyTree],
    weights: Array,
) -> PyTree:
    """``f(path, leaves, weights)`` in place of every leaf, nodes being leaves.

    Nodes of the SVD form become pairs.

    Raises:
        ValueError: for no trees, or trees that differ in structure or in shapes.
    """
    trees = list(changes)
    if not trees:
        raise ValueError(f"{owner} needs at least one tree of changes.")
    columns, structures = zip(*(named_leaves(t, is_node) for t in trees), strict=True)
    if len(set(structures)) > 1:
        paths = [{path for path, _ in column} for column in columns]
        odd = sorted(set.union(*paths) - set.intersection(*paths))
        raise ValueError(
            f"{owner} needs trees of one structure; not all of them have "
            f"{odd or 'the same containers'}."
        )
    merged = []
    for row in zip(*columns, strict=True):
        path, leaves = row[0][0], [_as_pair(leaf) for _, leaf in row]
        if len({leaf.shape for leaf in leaves}) > 1:
            shapes = [leaf.shape for leaf in leaves]
            raise ValueError(
                f"{owner} needs changes of one shape at {path or 'the root'}, got {shapes}."
            )
        merged.append(f(path, leaves, weights))
    return structures[0].unflatten(merged)


def _as_pair(leaf: Any) -> Any:
    return leaf.to_low_rank() if isinstance(leaf, SVDForm) else leaf


def map_arrays(
    owner: str,
    f: Callable[[Array, Array], Array],
    path: str,
    leaves: list[Any],
    weights: Array,
) -> Any:
    """``f(stacked, weights)`` of arrays, and of the factors of nodes each for itself.

    The weight of a product is shared by both factors, ``√|w|`` and ``sign(w) √|w|``.

    Raises:
        ValueError: for arrays beside nodes, or nodes of several widths.
    """
    nodes = [isinstance(leaf, LowRank) for leaf in leaves]
    if not any(nodes):
        return stacked(f, leaves, weights)
    widths = {leaf.rank for leaf in leaves if isinstance(leaf, LowRank)}
    if not all(nodes) or len(widths) > 1:
        raise ValueError(
            f"{owner} works on factors column by column, and needs nodes of one width at "
            f"{path or 'the root'}, got {[describe(leaf) for leaf in leaves]}: take "
            "lrjax.merging.weighted_sum, or materialize them first."
        )
    root = jnp.sqrt(jnp.abs(weights))
    left = stacked(f, [leaf.left for leaf in leaves], root)
    signed = jnp.sign(weights) * root
    return LowRank(left, stacked(f, [leaf.right for leaf in leaves], signed))


def stacked(f: Callable, arrays: list[Array], weights: Array) -> Array:
    """``f`` of a stack of arrays in float32 or wider, in their dtype."""
    dtype = jnp.result_type(*arrays)
    stack = jnp.stack([x.astype(working_dtype(dtype)) for x in arrays])
    return f(stack, weights.astype(stack.dtype)).astype(dtype)


def over_stack(weights: Array, stack: Array) -> Array:
    """Weights that broadcast against a stack."""
    return weights.reshape(-1, *[1] * (stack.ndim - 1))


def describe(leaf: Any) -> str:
    """A leaf in a few words."""
    kind = f"a LowRank of width {leaf.rank}" if isinstance(leaf, LowRank) else "an array"
    return f"{kind} {tuple(leaf.shape)}"


def refuse_nodes(owner: str, why: str, path: str, leaves: list[Any]) -> None:
    """Refuse factors where only the product has a meaning."""
    if any(isinstance(leaf, LowRank) for leaf in leaves):
        raise ValueError(
            f"{owner} needs arrays, and {path or 'the root'} has "
            f"{[describe(leaf) for leaf in leaves]}: {why} Materialize them first."
        )


def even(count: int) -> Array:
    """Weights of the mean."""
    return jnp.full(count, 1 / max(count, 1))


def checked_weights(
    owner: str,
    weights: Weights | None,
    changes: Sequence[PyTree],
    otherwise: Callable[[int], Array] = jnp.ones,
) -> Array:
    """The weights that were given, or others for so many trees.

    Raises:
        ValueError: for another number of weights.
    """
    count = len(changes)
    weights = otherwise(count) if weights is None else jnp.asarray(weights)
    if weights.shape != (count,):
        raise ValueError(
            f"{owner} needs one weight for each of {count} trees, got weights of shape "
            f"{weights.shape}."
        )
    return weights


def materialized(leaf: Any) -> Array:
    """A leaf as an array."""
    return leaf.materialize() if isinstance(leaf, LowRank) else jnp.asarray(leaf)

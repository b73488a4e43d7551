from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, PyTree

from ._matrices import check_real, path_name
from .lowrank import LowRank, is_low_rank, is_svd_form


def map_nodes(
    f: Callable, updates: PyTree, *rest: PyTree, frozen: PyTree | None = None
) -> PyTree:
    """Map ``f`` over the LowRank nodes of trees and leave other leaves as they are.

    A node of which one factor is frozen has ``None`` in its place, in the updates and in
    the parameters; :func:`lrjax.partition` keeps that factor in its other half, ``frozen``.
    ``f`` gets the nodes of ``rest`` whole, and that of ``updates`` as it is: :func:`sides`
    lists what moves, :func:`like` puts it back.

    Args:
        f: called with one LowRank of each tree, without ``frozen``.
        updates: decides the structure. Nodes whose factors were masked out as a whole
            (``optax.MaskedNode``, ``None``) are left alone.
        *rest: further trees, of which the structure of ``updates`` is a prefix.
        frozen: the tree of the factors that are frozen.

    Returns:
        A tree of the structure of ``updates``.

    Raises:
        ValueError: if a factor is there in one tree and not in another, or nowhere.
    """
    partners = () if frozen is None else (_nodes_of(frozen, updates),)

    def apply(path, update, *nodes):
        nodes, own_partner = nodes[: len(rest)], nodes[len(rest) :]
        if not _is_there(path, update, *nodes):
            return update
        whole = [eqx.combine(node, *own_partner) for node in nodes]
        if any(None in (node.left, node.right) for node in whole):
            raise ValueError(
                f"The LowRank node at {path_name(path) or 'the root'} has lost one of its "
                "factors, and this transform reads both. Where adapt(train=…) froze one, "
                "hand over the half of lrjax.partition that holds it: "
                "tx.update(updates, state, params, frozen=frozen)."
            )
        return f(update, *whole)

    trees = (updates, *rest, *partners)
    return jtu.tree_map_with_path(apply, *trees, is_leaf=is_low_rank)


def map_factors(f: Callable, updates: PyTree, *rest: PyTree) -> PyTree:
    """Map ``f`` over the factors of LowRank nodes, each by itself, but the frozen ones.

    Args:
        f: called with one factor of each tree.
        updates: decides the structure, as in :func:`map_nodes`.
        *rest: further trees.

    Returns:
        A tree of the structure and the dtypes of ``updates``.

    Raises:
        ValueError: if a factor is there in one tree and not in another.
    """

    def apply(path, update, *nodes):
        if not _is_there(path, update, *nodes):
            return update
        return jax.tree.map(lambda u, *x: f(u, *x).astype(u.dtype), update, *nodes)

    return jtu.tree_map_with_path(apply, updates, *rest, is_leaf=is_low_rank)


def _is_there(path: tuple, update: Any, *nodes: Any) -> bool:
    """Whether there is a node here with a factor, which has to be the same in all trees."""
    if not is_low_rank(update):
        return False
    factors = [(node.left, node.right) for node in (update, *nodes)]
    there = [tuple(map(eqx.is_array_like, pair)) for pair in factors]
    masked = any(isinstance(x, optax.MaskedNode) for pair in factors for x in pair)
    some = any(map(any, there))
    if some and (masked or len(set(there)) > 1):
        raise ValueError(
            f"The LowRank node at {path_name(path) or 'the root'} has lost one of its "
            "factors in some of the trees. Mask or label LowRank nodes as a whole "
            "(is_leaf=lrjax.is_low_rank), not factor by factor; one that is frozen is None "
            "in the updates and in the parameters, as lrjax.partition leaves it."
        )
    return some


def _nodes_of(frozen: PyTree, updates: PyTree) -> PyTree:
    """What another tree has at the LowRank nodes of this one, which may be masked."""
    is_leaf = lambda x: x is None or is_low_rank(x) or isinstance(x, optax.MaskedNode)
    pick = lambda u, node: node if is_low_rank(u) else u
    try:
        return jax.tree.map(pick, updates, frozen, is_leaf=is_leaf)
    except ValueError as error:
        raise ValueError(
            "frozen has to be the other half of the parameters, with None where they have "
            "arrays, as lrjax.partition leaves it."
        ) from error


class Side(NamedTuple):
    """A factor that moves: its gradient, itself, and the other factor of its node."""

    gradient: Array
    factor: Array
    partner: Array


def sides(g: LowRank, x: LowRank) -> list[Side]:
    """The factors of a node that move, those with a gradient: both, or one of them."""
    both = Side(g.left, x.left, x.right), Side(g.right, x.right, x.left)
    return [side for side in both if side.gradient is not None]


def node_of(left: Any, right: Any) -> LowRank:
    """A node of any two things, unchecked."""
    node = object.__new__(LowRank)
    object.__setattr__(node, "left", left)
    object.__setattr__(node, "right", right)
    return node


def only_factors(tree: PyTree) -> PyTree:
    """The same tree with nothing in it but the factors of LowRank nodes."""
    keep = lambda x: x if is_low_rank(x) else optax.MaskedNode()
    return jax.tree.map(keep, tree, is_leaf=is_low_rank)


def named_factors(tree: PyTree) -> PyTree:
    """The same tree with nothing in it but the matrices that are called left and right.

    These are the factors of LowRank nodes, and those that layers share in a pool.
    """

    def keep(path: tuple, x: Any) -> Any:
        if is_svd_form(x):
            return jax.tree.map(lambda _: optax.MaskedNode(), x)
        is_factor = path_name(path).split(".")[-1] in ("left", "right")
        return x if is_factor and jnp.ndim(x) >= 2 else optax.MaskedNode()

    return jtu.tree_map_with_path(keep, tree, is_leaf=is_svd_form)


def put_factors(tree: PyTree, factors: PyTree) -> PyTree:
    """A tree with others in the place of its :func:`only_factors` or named ones."""
    put = lambda x, new: x if isinstance(new, optax.MaskedNode) else new
    return jax.tree.map(put, tree, factors)


def like(node: LowRank, *factors: Array) -> LowRank:
    """A node of new factors for those that ``node`` has, cast to its dtype."""
    leaves, structure = jax.tree.flatten(node)
    pairs = zip(factors, leaves, strict=True)
    return structure.unflatten([x.astype(leaf.dtype) for x, leaf in pairs])


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


def check_whole(name: str, params: PyTree) -> None:
    """Refuse a node of which one factor is frozen."""
    for path, x in jtu.tree_flatten_with_path(params, is_leaf=is_low_rank)[0]:
        if is_low_rank(x) and len(jax.tree.leaves(x)) == 1:
            raise ValueError(
                f"{name} needs pairs of which both factors are trained, and one of those "
                f"at {path_name(path) or 'the root'} is frozen: adapt with train='both' or "
                "leave it out."
            )


def check_alike(updates: PyTree, params: PyTree) -> None:
    """Refuse nodes with factors masked one by one, before others do in other words."""
    map_factors(lambda u, _: u, updates, params)


def check_params(name: str, params: PyTree | None) -> None:
    """Refuse an update that was called without params."""
    if params is None:
        raise ValueError(
            f"{name} needs the factors themselves: call tx.update(updates, state, params)."
        )

"""The SVDForm nodes of a tree, and the tree in which each is one leaf."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..._matrices import check_real
from ..._tree import check_params, has_nodes, has_svd_forms, is_whole_svd_form
from ...linalg import working_dtype
from ...lowrank import LowRank, SVDForm, columns_in_use, is_svd_form


class NodeTree(NamedTuple):
    """A tree taken apart at its SVDForm nodes.

    Attributes:
        leaves: nodes, and the leaves that are none.
        treedef: the structure in which a node is a leaf.
    """

    leaves: list[Any]
    treedef: Any

    @classmethod
    def of(cls, tree: PyTree) -> "NodeTree":
        """Take a tree apart."""
        return cls(*jax.tree.flatten(tree, is_leaf=is_svd_form))

    @property
    def places(self) -> list[int]:
        """Of the nodes whose factors are not masked out."""
        return [i for i, x in enumerate(self.leaves) if is_whole_svd_form(x)]

    def like(self, tree: PyTree) -> list[Any]:
        """The leaves of a tree of the same structure, or one that it is a prefix of."""
        return self.treedef.flatten_up_to(tree)

    def with_leaves(self, new: dict[int, Any]) -> PyTree:
        """The tree with some of its leaves replaced."""
        return self.treedef.unflatten([new.get(i, x) for i, x in enumerate(self.leaves)])


def check_svd_forms(name: str, params: PyTree) -> None:
    """Refuse complex leaves, factors wider than the matrix, and pairs in their place.

    A tree without any node is let through: for it the inner optimizer is all there is.
    """
    check_real(name, params)
    if has_nodes(params) and not has_svd_forms(params):
        raise ValueError(
            f"{name} moves the bases of lrjax.SVDForm nodes, and found lrjax.LowRank nodes "
            "alone: make them with lrjax.svd(x) of these, or lrjax.nn.LowRankLinear(…, "
            'form="svd").'
        )
    for x in filter(is_whole_svd_form, NodeTree.of(params).leaves):
        if x.left.shape[-1] > min(x.shape[-2:]):
            raise ValueError(
                f"{name} needs nodes no wider than the matrix: got shape {x.shape} and "
                f"width {x.left.shape[-1]}."
            )


def tree_of(name: str, params: PyTree, updates: PyTree) -> NodeTree:
    """The parameters taken apart; without a node the updates will do."""
    if has_svd_forms(updates):
        check_params(name, params)
    return NodeTree.of(updates if params is None else params)


def columns_used(x: SVDForm) -> Array:
    """The rank of a node whose columns out of use are zeros of the core, ``(*b,)``."""
    last = columns_in_use(LowRank(x.core, x.core.mT))
    return jnp.where(last > 0, last, x.core.shape[-1]).astype(jnp.int32)


def in_use(x: SVDForm, rank: Array | None) -> SVDForm:
    """The node in float32 or wider, with the columns from ``rank`` on masked."""
    dtype = working_dtype(x.dtype)
    left, core, right = (part.astype(dtype) for part in (x.left, x.core, x.right))
    x = SVDForm(left, core, right, rank)
    return SVDForm(left, x.masked_core(), right, rank)


def masked(x: SVDForm, core: Array) -> Array:
    """A matrix of the shape of the core, zero where the node has nothing in use."""
    return SVDForm(x.left, core.astype(x.dtype), x.right, x.active).masked_core()


def aligned(new: SVDForm, old: SVDForm) -> SVDForm:
    """Singular vectors with the signs that they had: a step of zero moves nothing."""
    agree = lambda side: jnp.sum(getattr(new, side) * getattr(old, side), axis=-2)
    sign = jnp.where(agree("left") + agree("right") < 0, -1, 1).astype(new.dtype)
    turn = lambda side: side * sign[..., None, :]
    core = sign[..., :, None] * turn(new.core)
    return SVDForm(turn(new.left), core, turn(new.right), new.active)


def difference(new: SVDForm, old: SVDForm) -> SVDForm:
    """The update of all three factors, in their own dtype."""
    part = lambda a, b: (a - b.astype(a.dtype)).astype(b.dtype)
    left, core, right = (
        part(*pair)
        for pair in ((new.left, old.left), (new.core, old.core), (new.right, old.right))
    )
    return SVDForm(left, core, right)

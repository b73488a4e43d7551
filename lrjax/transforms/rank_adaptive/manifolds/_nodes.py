"""The nodes with a core of a tree, and the tree in which each is one leaf."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ...._matrices import check_real
from ...._tree import check_params, has_nodes
from ....linalg import working_dtype
from ....lowrank import LowRank, SVDForm, TuckerForm, columns_in_use, is_svd_form


Form = SVDForm | TuckerForm


def is_form(x: Any) -> bool:
    """Whether ``x`` has a core between orthonormal bases."""
    return isinstance(x, Form)


def is_whole(x: Any) -> bool:
    """Whether ``x`` is such a node and its factors are not masked out."""
    return is_form(x) and all(map(eqx.is_array_like, (x.core, *bases(x))))


def bases(x: Form) -> tuple[Array, ...]:
    """The orthonormal factors, one for each axis of the core."""
    return x.factors if isinstance(x, TuckerForm) else (x.left, x.right)


def rebuilt(x: Form, bases: Sequence[Array], core: Array, rank: Array | None) -> Any:
    """A node of the same kind."""
    if isinstance(x, TuckerForm):
        return TuckerForm(core, bases, rank)
    left, right = bases
    return SVDForm(left, core, right, rank)


class NodeTree(NamedTuple):
    """A tree taken apart at its nodes.

    Attributes:
        leaves: nodes, and the leaves that are none.
        treedef: the structure in which a node is a leaf.
    """

    leaves: list[Any]
    treedef: Any

    @classmethod
    def of(cls, tree: PyTree, is_node: Callable[[Any], bool] = is_svd_form) -> "NodeTree":
        """Take a tree apart."""
        return cls(*jax.tree.flatten(tree, is_leaf=is_node))

    @property
    def places(self) -> list[int]:
        """Of the nodes whose factors are not masked out."""
        return [i for i, x in enumerate(self.leaves) if is_whole(x)]

    def like(self, tree: PyTree) -> list[Any]:
        """The leaves of a tree of the same structure, or one that it is a prefix of."""
        return self.treedef.flatten_up_to(tree)

    def with_leaves(self, new: dict[int, Any]) -> PyTree:
        """The tree with some of its leaves replaced."""
        return self.treedef.unflatten([new.get(i, x) for i, x in enumerate(self.leaves)])


def check_forms(
    name: str, params: PyTree, is_node: Callable[[Any], bool] = is_svd_form
) -> None:
    """Refuse complex leaves, factors too wide for the tensor, and pairs in their place.

    A tree without any node is let through: for it the inner optimizer is all there is.
    """
    check_real(name, params)
    tree = NodeTree.of(params, is_node)
    if has_nodes(params) and not tree.places:
        raise ValueError(
            f"{name} moves the bases of lrjax.SVDForm nodes, and found lrjax.LowRank nodes "
            "alone: make them with lrjax.svd(x) of these, or lrjax.nn.LowRankLinear(…, "
            'form="svd").'
        )
    for x in (tree.leaves[i] for i in tree.places):
        widths = [u.shape[-1] for u in bases(x)]
        sizes = [u.shape[-2] for u in bases(x)]
        others = [math.prod(widths) // w for w in widths]
        if any(w > min(most) for w, *most in zip(widths, sizes, others, strict=True)):
            raise ValueError(
                f"{name} needs nodes no wider than the matrix, and of a tensor no wider "
                "than an axis is long or the other widths multiplied: got shape "
                f"{x.shape} and widths {widths}."
            )


def tree_of(
    name: str,
    params: PyTree,
    updates: PyTree,
    is_node: Callable[[Any], bool] = is_svd_form,
) -> NodeTree:
    """The parameters taken apart; without a node the updates will do."""
    if NodeTree.of(updates, is_node).places:
        check_params(name, params)
    return NodeTree.of(updates if params is None else params, is_node)


def columns_used(x: Form) -> Array:
    """The rank of a node whose columns out of use are zeros of the core.

    ``(*b,)`` of a matrix, ``(*b, d)`` of a tensor.
    """
    if isinstance(x, SVDForm):
        last = columns_in_use(LowRank(x.core, x.core.mT))
        return jnp.where(last > 0, last, x.core.shape[-1]).astype(jnp.int32)
    axes = range(-len(x.factors), 0)
    others = [tuple(k for k in axes if k != axis) for axis in axes]
    used = [jnp.any(x.core != 0, axis=rest) for rest in others]
    last = [on.shape[-1] - jnp.argmax(on[..., ::-1], axis=-1) for on in used]
    return jnp.stack(last, axis=-1).astype(jnp.int32)


def in_use(x: Any, rank: Array | None) -> Any:
    """The node in float32 or wider, with the columns from ``rank`` on masked."""
    dtype = working_dtype(x.dtype)
    wide = tuple(u.astype(dtype) for u in bases(x))
    x = rebuilt(x, wide, x.core.astype(dtype), rank)
    return rebuilt(x, wide, x.masked_core(), rank)


def masked(x: Form, core: Array) -> Array:
    """An array of the shape of the core, zero where the node has nothing in use."""
    return rebuilt(x, bases(x), core.astype(x.dtype), x.active).masked_core()


def aligned(new: Any, old: Form) -> Any:
    """Singular vectors with the signs that they had: a step of zero moves nothing."""
    agree = [jnp.sum(u * v, axis=-2) for u, v in zip(bases(new), bases(old), strict=True)]
    if isinstance(new, SVDForm):  # the core stays positive
        agree = [agree[0] + agree[1]] * 2
    signs = [jnp.where(a < 0, -1, 1).astype(new.dtype) for a in agree]
    turned = [u * s[..., None, :] for u, s in zip(bases(new), signs, strict=True)]
    core = new.core
    for axis, sign in enumerate(signs):
        before, behind = (1,) * axis, (1,) * (len(signs) - axis - 1)
        core = core * sign.reshape(*sign.shape[:-1], *before, -1, *behind)
    return rebuilt(new, turned, core, new.active)


def difference(new: Any, old: Any) -> Any:
    """The update of all factors, in their own dtype."""
    part = lambda a, b: (a - b.astype(a.dtype)).astype(b.dtype)
    moved = tuple(map(part, bases(new), bases(old)))
    return rebuilt(old, moved, part(new.core, old.core), None)

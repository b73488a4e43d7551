from collections.abc import Callable

import jax
from jaxtyping import Array, PyTree

from ..._matrices import Where, choose, map_matrices
from ...lowrank import LowRank, SVDForm, TuckerForm


def on_matrices(
    f: Callable[..., Array], where: Where | None = None
) -> Callable[..., PyTree]:
    """A function of matrices as one of trees: what :func:`lrjax.every` does to parameters.

    Args:
        f: from matrices ``(*b, m, n)`` to ones of the same shape; of more trees, given to
            the result, it gets their matrices too.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            leaves to treat, and which axes are rows; leading axes are a stack of matrices.
            By default matrices but embeddings and heads. The others pass unchanged, and so
            do matrices that are held in factors.

    Returns:
        The function of one or more trees of one structure.

    Raises:
        ValueError: when called, if ``where`` chooses no leaf, or one that is no matrix.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> from lrjax.linalg import energy_mask, map_singular_values
        >>> kept = lambda values: jnp.where(energy_mask(values, 0.8), values, 0)
        >>> truncated = lrjax.transforms.on_matrices(
        ...     lambda w: map_singular_values(kept, w), where=lambda path, shape: True)
        >>> tx = optax.chain(optax.sgd(0.1), lrjax.every(20, truncated))
        >>> print(truncated(jnp.array([[0.0, 3.0], [1.0, 0.0]])).round(4) + 0.0)
        [[0. 3.]
         [0. 0.]]
    """

    def apply(tree, *rest):
        def one(leaf, x, *others):
            views = (leaf.view(y) for y in (x, *others))
            return (leaf.restore(f(*views), x).astype(x.dtype),)

        dense = map(without_nodes, (tree, *rest))
        (new,) = map_matrices("on_matrices", where, one, *dense, rest=_first, results=1)
        return put_beside_nodes(tree, new)

    return apply


def check_chosen(function: str, params: PyTree, where: Where | None) -> None:
    """Refuse complex leaves, and a rule that chooses no dense leaf, or one no matrix."""
    choose(function, without_nodes(params), where)


_NODES = (LowRank, SVDForm, TuckerForm)


def _is_node(x) -> bool:
    return isinstance(x, _NODES)


def without_nodes(tree: PyTree) -> PyTree:
    """The tree with nothing in place of matrices that are held in factors."""
    hide = lambda x: None if _is_node(x) else x
    return jax.tree.map(hide, tree, is_leaf=_is_node)


def put_beside_nodes(tree: PyTree, dense: PyTree) -> PyTree:
    """The tree with other leaves beside the matrices that are held in factors."""
    put = lambda old, new: old if _is_node(old) else new
    return jax.tree.map(put, tree, dense, is_leaf=_is_node)


def _first(x, *others):
    return (x,)

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from ..lowrank import LowRank, SVDForm, TuckerForm
from .layers import (
    LowRankConv,
    LowRankEmbedding,
    LowRankLinear,
    SparsePlusLowRankLinear,
    TuckerConv,
)


_NODES = (LowRank, SVDForm, TuckerForm)
_LAYERS = (
    LowRankLinear,
    LowRankConv,
    LowRankEmbedding,
    SparsePlusLowRankLinear,
    TuckerConv,
)


def compact(model: PyTree, *, multiple: int = 8) -> PyTree:
    """The model with the columns of its factors that are not in use taken out.

    A column is in use unless it is multiplied by exact zeros: the rows and columns of the
    core of an :class:`~lrjax.SVDForm` beyond its rank, the slices of that of a Tucker form,
    a zero column in a factor of a :class:`~lrjax.LowRank`. So the value stays what it is
    to the last bit or two, and shapes, memory and time become those of the rank. Training
    whose rank adapts runs at one width, and is compacted when it is over or at times.

    Ranks are rounded up to a multiple, so that models whose ranks are near compile once.
    Matrices of a stack share the largest rank among them. Numbers are read on the host:
    call it outside of ``jit``.

    Args:
        model: any tree with nodes.
        multiple: the ranks are multiples of it, or the full width.

    Returns:
        The tree with narrower nodes. An ``SVDForm`` has no ``active`` any more.

    Raises:
        ValueError: for a multiple below one.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> core = jnp.diag(jnp.where(jnp.arange(20) < 5, 1.0, 0.0))
        >>> x = lrjax.SVDForm(jnp.eye(20), core, jnp.eye(20))
        >>> lrjax.nn.compact({"x": x})["x"].rank
        8
    """
    if multiple < 1:
        raise ValueError(f"compact needs a multiple of at least 1, got {multiple}.")
    is_node = lambda x: isinstance(x, _NODES)
    narrow = lambda x: _narrowed(x, multiple) if is_node(x) else x
    return jax.tree.map(narrow, model, is_leaf=is_node)


def _narrowed(x: Any, multiple: int) -> Any:
    if isinstance(x, LowRank):
        keep = _kept(_used(x.left, -2) & _used(x.right, -2), multiple)
        return LowRank(_take(x.left, keep, -1), _take(x.right, keep, -1))
    if isinstance(x, SVDForm):
        core = x.masked_core()
        keep = _kept(_used(core, -1) | _used(core, -2), multiple)
        core = _take(_take(core, keep, -1), keep, -2)
        return SVDForm(_take(x.left, keep, -1), core, _take(x.right, keep, -1))
    core, factors, d = x.core, [], len(x.factors)
    for k, factor in enumerate(x.factors):
        axis = k - d
        others = tuple(a for a in range(-d, 0) if a != axis)
        keep = _kept(_used(core, others), multiple)
        core = _take(core, keep, axis)
        factors.append(_take(factor, keep, -1))
    return TuckerForm(core, factors)


def _used(x: Array, axis: int | tuple[int, ...]) -> Bool[np.ndarray, "*b r"]:
    """Where there is a number other than zero along some axes."""
    return np.any(np.asarray(x) != 0, axis=axis)


def _kept(used: Bool[np.ndarray, "*b r"], multiple: int) -> Int[np.ndarray, "*b s"]:
    """The columns in use, in their order, and as many others as the multiple takes."""
    most = max(int(used.sum(-1).max(initial=0)), 1)
    width = min(-(-most // multiple) * multiple, used.shape[-1])
    return np.argsort(~used, axis=-1, kind="stable")[..., :width]


def _take(x: Array, keep: np.ndarray, axis: int) -> Array:
    """The columns of each matrix of a stack, or the slices of each tensor."""
    lead = keep.ndim - 1
    shape = [*keep.shape[:lead], *(1,) * (x.ndim - lead)]
    shape[axis] = keep.shape[-1]
    return jnp.take_along_axis(x, jnp.asarray(keep).reshape(shape), axis)


def densify(model: PyTree) -> PyTree:
    """The model with its layers as those of Equinox, their weights multiplied out.

    Args:
        model: a model with layers of this room.

    Returns:
        The model without them.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(20, 20, 64, 2, key=jax.random.key(0))
        >>> small, _ = lrjax.nn.factorize(model, rank=8)
        >>> plain = lrjax.nn.densify(small)
        >>> jax.tree.structure(plain) == jax.tree.structure(model)
        True
    """
    is_ours = lambda x: isinstance(x, _LAYERS)
    dense = lambda x: x.to_dense() if is_ours(x) else x
    return jax.tree.map(dense, model, is_leaf=is_ours)

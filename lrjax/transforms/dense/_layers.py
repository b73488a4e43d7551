from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ...linalg.gram import working_dtype
from ...subspaces.view import MatrixSpec, as_matrices, from_matrices


def layer_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of one layer: the last two, the axes before them being a stack."""
    return tuple(range(max(0, len(shape) - 2), len(shape)))


def layer_norm(x: Array) -> Array:
    """The Frobenius norm of each layer, its axes kept with length one."""
    wide = x.astype(working_dtype(x.dtype))
    return jnp.sqrt(jnp.sum(wide**2, axis=layer_axes(x.shape), keepdims=True))


def zeros_like_layers(params: PyTree) -> PyTree:
    """One zero for each layer, broadcastable against it."""

    def zeros(x):
        axes = layer_axes(jnp.shape(x))
        shape = [1 if a in axes else n for a, n in enumerate(jnp.shape(x))]
        return jnp.zeros(shape, working_dtype(jnp.result_type(x)))

    return jax.tree.map(zeros, params)


def map_matrices(
    f: Callable[[Array], Array],
    updates: PyTree,
    where: Callable[[str, tuple[int, ...]], bool | MatrixSpec],
) -> PyTree:
    """Map ``f`` over the chosen leaves, seen as ``(batch…, m, n)``; keep the others."""

    def one(path: Any, x: Array) -> Array:
        shape = tuple(jnp.shape(x))
        spec = where(jtu.keystr(path), shape)
        if spec is False:
            return x
        spec = MatrixSpec() if spec is True else spec
        return from_matrices(f(as_matrices(x, spec)), spec, shape)

    return jtu.tree_map_with_path(one, updates)

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ...linalg.gram import working_dtype


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

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ....linalg import working_dtype


def layer_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of one layer: the last two, the axes before them being a stack."""
    return tuple(range(max(0, len(shape) - 2), len(shape)))


def layer_norm(x: Array) -> Array:
    """The Frobenius norm of each layer, its axes kept with length one."""
    wide = x.astype(working_dtype(x.dtype))
    return jnp.sqrt(jnp.sum(wide**2, axis=layer_axes(x.shape), keepdims=True))


def zeros_like_layers(params: PyTree) -> PyTree:
    """One zero for each layer, broadcastable against it."""
    # As norms of zeros: a stack that is sharded by layer keeps its zeros by layer.
    return jax.tree.map(lambda x: layer_norm(jnp.zeros_like(x)), params)

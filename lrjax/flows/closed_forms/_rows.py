import jax.numpy as jnp
from jaxtyping import Array, ArrayLike


def rows(x: ArrayLike, t: Array) -> Array:
    """A vector with one leading axis of length one for each axis of ``t[..., None]``."""
    x = jnp.asarray(x)
    return x.reshape((1,) * (t.ndim - x.ndim) + x.shape)

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, PRNGKeyArray


@custom_vmap
def _uniform_like(key: PRNGKeyArray, x: Array) -> Array:
    """Uniform numbers of the shape of ``x``; one key serves a whole vmapped batch.

    Under ``vmap`` over ``x`` alone the numbers are drawn for the batch at once, so that
    every member has its own although the key is the same for all.
    """
    return jr.uniform(key, x.shape)


@_uniform_like.def_vmap
def _(axis_size, batched, key, x):
    del axis_size
    if not batched[0]:
        return _uniform_like(key, x), True
    x = x if batched[1] else jnp.broadcast_to(x, (*key.shape[:1], *x.shape))
    return eqx.filter_vmap(lambda k, y: jr.uniform(k, y.shape))(key, x), True


def dropout(key: PRNGKeyArray, rate: Array, x: Array) -> Array:
    """Inverted dropout: entries vanish with probability ``rate``, others grow."""
    keep = _uniform_like(key, lax.stop_gradient(x)) >= rate
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, PRNGKeyArray

from ._dense import dense


_STOCK = (eqx.nn.Linear, eqx.nn.Conv, eqx.nn.Embedding)


def has_low_rank_path(layer: Any) -> bool:
    """Whether the layer runs the ``__call__`` that this file takes apart.

    A subclass with a ``__call__`` of its own may do anything with its weight.
    """
    return any(
        isinstance(layer, stock) and type(layer).__call__ is stock.__call__
        for stock in _STOCK
    )


def base(layer: Any, x: Array) -> Array:
    """What the layer itself gives.

    A Linear goes through :func:`dense`, to stay one matrix product under nested ``vmap``.
    """
    if not isinstance(layer, eqx.nn.Linear) or "scalar" in (
        layer.in_features,
        layer.out_features,
    ):
        return layer(x)
    y = dense(x, layer.weight)
    return y if layer.bias is None else y + layer.bias


def down(layer: Any, right: Array, x: Array) -> Array:
    """The input of the layer, contracted with ``right`` ``(in, r)``."""
    if isinstance(layer, eqx.nn.Embedding):
        return right[x]
    if isinstance(layer, eqx.nn.Linear):
        return dense(jnp.atleast_1d(x), right.T)
    kernel = right.T.reshape(right.shape[1], *layer.weight.shape[1:])
    # With groups every group of inputs meets the same kernel: r channels for each.
    kernel = jnp.tile(kernel, (layer.groups,) + (1,) * (kernel.ndim - 1))
    thin = eqx.tree_at(lambda c: c.weight, layer, kernel)
    if layer.bias is not None:
        nothing = jnp.zeros((len(kernel),) + (1,) * layer.num_spatial_dims, kernel.dtype)
        thin = eqx.tree_at(lambda c: c.bias, thin, nothing)
    return thin(x)


def up(layer: Any, left: Array, h: Array) -> Array:
    """The low-rank features, expanded by ``left`` ``(out, r)`` to the layer's output."""
    if isinstance(layer, eqx.nn.Conv):
        spatial = h.shape[1:]
        columns = h.reshape(layer.groups, left.shape[1], -1)
        blocks = left.reshape(layer.groups, -1, left.shape[1])
        return lax.batch_matmul(blocks, columns).reshape(-1, *spatial)
    y = dense(h, left)
    return y[0] if getattr(layer, "out_features", None) == "scalar" else y


@custom_vmap
def uniform_like(key: PRNGKeyArray, x: Array) -> Array:
    """Uniform numbers of the shape of ``x``; one key serves a whole vmapped batch.

    Under ``vmap`` over ``x`` alone the numbers are drawn for the batch at once, so that
    every member has its own although the key is the same for all.
    """
    return jr.uniform(key, x.shape)


@uniform_like.def_vmap
def _(axis_size, batched, key, x):
    del axis_size
    if not batched[0]:
        return uniform_like(key, x), True
    x = x if batched[1] else jnp.broadcast_to(x, (*key.shape[:1], *x.shape))
    return eqx.filter_vmap(lambda k, y: jr.uniform(k, y.shape))(key, x), True


def dropout(key: PRNGKeyArray, rate: Array, x: Array) -> Array:
    """Inverted dropout: entries vanish with probability ``rate``, others grow."""
    keep = uniform_like(key, lax.stop_gradient(x)) >= rate
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)

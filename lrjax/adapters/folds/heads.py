from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..._sharding import einsum
from ..._sites import Held, Site
from ...linalg import working_dtype
from .._pool import Pool
from ..as_lora import stacked_factors
from ..bind import bias_change, dense_change, map_adapted
from ..bound import prepared
from ..protocol import Adapter, with_stopped_gradients
from ..tree import Adapters


def merge_heads(model: PyTree, heads: Adapters, *, axis_name: str | None = None) -> PyTree:
    """The plain model with the mean change of adapters that were trained apart.

    ``W + (1/H) Σ_h s B_h A_h`` over H heads, the leading axis of all arrays of ``heads``;
    of factors it is one product of matrices of H r columns. The sum is taken in float32 or
    higher and rounded once.

    Args:
        model: the module, or tree of parameters, that :func:`lrjax.adapt` saw.
        heads: all of them, as ``jax.vmap`` of :func:`lrjax.adapt` over keys gives them.
        axis_name: under ``shard_map``, the axis of the mesh that heads lie along, beside
            the leading one of what is on this device.

    Returns:
        A model of the structure and dtypes of ``model``.

    Raises:
        ValueError: if a head has no layer in the model or another shape.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> layer = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> one = lambda key: lrjax.adapt(layer, lrjax.LoRA(2), key=key)
        >>> heads = jax.vmap(one)(jax.random.split(jax.random.key(1), 5))
        >>> heads[""].pair.shape
        (5, 3, 4)
        >>> merged = lrjax.adapters.merge_heads(layer, heads)
        >>> bool(jnp.allclose(merged.weight, layer.weight))
        True

    Reference:
        M. Huh et al., "Training neural networks from scratch with parallel low-rank
        adapters" (2024), arXiv:2402.16828. Of one head it is :func:`lrjax.merge`.
    """
    head_count(heads)

    def put(site: Site, _: Adapter) -> Any:
        own, pool = part_of(heads, site.path)
        weight = site.read() + mean_change(site, own, pool, axis_name)
        bias = site.bias
        if bias is not None:
            bias = bias + _mean_over(_mean_bias_change(site, own, pool), axis_name)
        return site.put(weight, bias)

    return map_adapted(put, model, jax.tree.map(lambda x: x[0], heads))


def head_count(heads: Adapters) -> int:
    """How many there are, on this device."""
    counts = {x.shape[:1] for x in jax.tree.leaves(heads)}
    if len(counts) != 1 or () in counts:
        raise ValueError(
            "Heads are adapters of which all arrays have one leading axis, as jax.vmap of "
            f"lrjax.adapt over keys gives them; got leading axes {sorted(counts)}."
        )
    return counts.pop()[0]


def head_keys(key: PRNGKeyArray, count: int, axis_name: str | None) -> Array:
    """A key for each head: the same ones, wherever the heads are."""
    if axis_name is None:
        return jr.split(key, count)
    keys = jr.split(key, count * lax.axis_size(axis_name))
    return lax.dynamic_slice_in_dim(keys, lax.axis_index(axis_name) * count, count)


def part_of(adapters: Adapters, path: str) -> tuple[Adapter, Pool | None]:
    """An adapter and the pool that it shares."""
    own = adapters[path]
    return own, adapters.pools.get(own.pool_name() or "")


def change_of(site: Site, own: Adapter, pool: Pool | None) -> Float[Array, "*b out in"]:
    """``W' − W`` of the matrices of one adapter."""
    held = None if pool is None else Held(with_stopped_gradients(pool))
    return dense_change(site, prepared(site, with_stopped_gradients(own), held))


def mean_change(
    site: Site, heads: Adapter, pool: Pool | None, axis_name: str | None
) -> Float[Array, "*b out in"]:
    """The mean of the changes of heads: in one product, or of one head after the other."""
    count = jax.tree.leaves(heads)[0].shape[0]
    found = eqx.filter_vmap(stacked_factors)(heads, pool)
    if found is not None:
        pair, scale = found
        wide = lambda x: x.astype(working_dtype(x.dtype))
        left = wide(pair.left) * wide(scale)[..., None, None]
        total = einsum("h...mr,h...nr->...mn", left, wide(pair.right))
    else:
        add = lambda total, head: (total + change_of(site, *head), None)
        at = lambda index: jax.tree.map(lambda x: x[index], (heads, pool))
        total, _ = lax.scan(add, change_of(site, *at(0)), at(slice(1, None)))
    return _mean_over(total / count, axis_name)


def _mean_over(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else lax.pmean(x, axis_name)


def _mean_bias_change(site: Site, heads: Adapter, pool: Pool | None) -> Array:
    """The mean of what heads add to the bias."""

    def one(own: Adapter, pool: Pool | None) -> Array:
        ready = prepared(site, own, None if pool is None else Held(pool))
        return bias_change(site, ready)

    return jnp.mean(eqx.filter_vmap(one)(heads, pool), axis=0)

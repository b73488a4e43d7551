import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from ..._sharding import einsum
from ..._sites import Held, Site
from ...linalg import nonzero, working_dtype
from ...lowrank import LowRank
from ..binding import bias_change, dense_change, map_adapted, prepared, stacked_factors
from ..kinds import Biased
from ..protocol import Adapter, Adapters, Pool, with_stopped_gradients


def merge_heads(
    model: PyTree,
    heads: Adapters,
    *,
    weights: ArrayLike | None = None,
    mean: Callable[..., PyTree] | None = None,
    axis_name: str | None = None,
) -> PyTree:
    """The plain model with the mean change of adapters that were trained apart.

    ``W + Σ_h p_h s_h B_h A_h`` over H heads, the leading axis of all arrays of ``heads``,
    with ``p_h = w_h / Σ w``; of factors it is one product of matrices of H r columns,
    whatever the ranks under their masks. (The product of the mean factors is another
    matrix.) The sum is taken in float32 or higher and rounded once. Over a mesh the
    factors are sent, or the sums where these are smaller.

    Args:
        model: the module, or tree of parameters, that :func:`lrjax.adapt` saw.
        heads: all of them, as ``jax.vmap`` of :func:`lrjax.adapt` over keys gives them.
        weights: ``w (H,)``, not negative, such as numbers of examples; by default all
            count alike. A head of weight zero is not there: it may hold NaN.
        mean: a rule of ``lrjax.merging`` in place of the mean, for heads of which some
            may be anything: ``lrjax.merging.geometric_median``. It is called as
            ``mean(changes)``, or ``mean(changes, p)`` if there are weights.
        axis_name: under ``shard_map``, the axis of the mesh that heads lie along, beside
            the leading one of what is on this device.

    Returns:
        A model of the structure and dtypes of ``model``.

    Raises:
        ValueError: if a head has no layer in the model or another shape; for another
            number of weights, or negative ones.

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
        adapters" (2024), arXiv:2402.16828; with weights Z. Wang et al., "FLoRA: federated
        fine-tuning large language models with heterogeneous low-rank adaptations" (2024),
        arXiv:2409.05976. Of one head it is :func:`lrjax.merge`.
    """
    shares = head_shares(heads, weights, axis_name)
    if mean is None:
        of_weight = lambda site: mean_change(
            site, *part_of(heads, site.path), shares, axis_name
        )
        of_bias = lambda site: _mean_bias_change(
            site, *part_of(heads, site.path), shares, axis_name
        )
    else:
        found = _by_rule(mean, model, heads, shares, weights is not None, axis_name)
        of_weight = lambda site: materialized(found[site.path])
        of_bias = lambda site: found[f"{site.path} bias"]

    def put(site: Site, _: Adapter) -> Any:
        bias = site.bias
        bias = None if bias is None else bias + of_bias(site)
        return site.put(site.read() + of_weight(site), bias)

    return map_adapted(put, model, _first(heads))


def head_count(heads: Adapters) -> int:
    """How many there are, on this device."""
    counts = {x.shape[:1] for x in jax.tree.leaves(heads)}
    if len(counts) != 1 or () in counts:
        raise ValueError(
            "Heads are adapters of which all arrays have one leading axis, as jax.vmap of "
            f"lrjax.adapt over keys gives them; got leading axes {sorted(counts)}."
        )
    return counts.pop()[0]


def head_shares(
    heads: Adapters, weights: ArrayLike | None, axis_name: str | None
) -> Float[Array, " h"]:
    """What part of the mean each head on this device has."""
    count = head_count(heads)
    if weights is None:
        total = count if axis_name is None else count * lax.axis_size(axis_name)
        return jnp.full(count, 1 / total)
    weights = jnp.asarray(weights)
    if weights.shape != (count,):
        raise ValueError(
            f"There are {count} heads, and weights of shape {weights.shape}: one number "
            "for each."
        )
    if not isinstance(weights, Tracer) and np.any(np.asarray(weights) < 0):
        raise ValueError(f"The weights of heads are not negative, got {weights}.")
    weights = weights.astype(working_dtype(jnp.result_type(weights, jnp.float32)))
    return weights / nonzero(_sum_over(jnp.sum(weights), axis_name))


def shared_sum(shares: Float[Array, " h"], x: Array, axis_name: str | None = None) -> Array:
    """``Σ_h p_h x_h`` over the leading axis, without what heads of no share hold."""
    x = x.astype(working_dtype(x.dtype))
    total = jnp.sum(_along(shares, x) * _present(shares, x), axis=0)
    return _sum_over(total, axis_name)


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
    site: Site,
    heads: Adapter,
    pool: Pool | None,
    shares: Float[Array, " h"],
    axis_name: str | None,
) -> Float[Array, "*b out in"]:
    """The mean of the changes of heads: in one product, or of one head after the other."""
    heads = weight_part(heads)
    found = _wide_factors(heads, pool, shares)
    if found is not None:
        left, right = found
        left = _along(shares, left) * left
        columns = shares.size * left.shape[-1]
        if axis_name is not None:
            columns *= lax.axis_size(axis_name)
        thin = columns * sum(site.shape) <= math.prod(site.shape)
        if thin and axis_name is not None:
            left, right = (_of_all(x, axis_name) for x in (left, right))
        total = einsum("h...mr,h...nr->...mn", left, right)
        return total if thin else _sum_over(total, axis_name)

    def add(total, head):
        share, own, its_pool = head
        change = jnp.where(share != 0, share * change_of(site, own, its_pool), 0)
        return total + change, None

    zeros = jnp.zeros_like(site.read())
    if axis_name is not None:
        zeros = lax.pcast(zeros, axis_name, to="varying")
    total, _ = lax.scan(add, zeros, (shares, heads, pool))
    return _sum_over(total, axis_name)


def weight_part(adapter: Adapter) -> Adapter:
    """The adapter without a bias that stands beside it."""
    return weight_part(adapter.inner) if isinstance(adapter, Biased) else adapter


def is_product(heads: Adapter, pool: Pool | None) -> bool:
    """Whether the change of each head is a product of factors."""
    return eqx.filter_vmap(stacked_factors)(heads, pool) is not None


def _wide_factors(
    heads: Adapter, pool: Pool | None, shares: Float[Array, " h"]
) -> tuple[Array, Array] | None:
    """The factors of all heads, with their scales, in float32 or wider."""
    found = eqx.filter_vmap(stacked_factors)(heads, pool)
    if found is None:
        return None
    pair, scale = found
    wide = lambda x: x.astype(working_dtype(x.dtype))
    left = wide(pair.left) * wide(scale)[..., None, None]
    return _present(shares, left), _present(shares, wide(pair.right))


def _mean_bias_change(
    site: Site,
    heads: Adapter,
    pool: Pool | None,
    shares: Float[Array, " h"],
    axis_name: str | None,
) -> Array:
    """The mean of what heads add to the bias."""
    return shared_sum(shares, _bias_changes(site, heads, pool), axis_name)


def _bias_changes(site: Site, heads: Adapter, pool: Pool | None) -> Array:
    def one(own: Adapter, pool: Pool | None) -> Array:
        ready = prepared(site, own, None if pool is None else Held(pool))
        return bias_change(site, ready)

    return eqx.filter_vmap(one)(heads, pool)


def _by_rule(
    mean: Callable[..., PyTree],
    model: PyTree,
    heads: Adapters,
    shares: Float[Array, " h"],
    weighted: bool,
    axis_name: str | None,
) -> dict[str, Any]:
    """The changes of all weights, and of biases, by a rule that sees those of each head."""
    changes: dict[str, Any] = {}

    def note(site: Site, _: Adapter) -> Any:
        own, pool = part_of(heads, site.path)
        factors = _wide_factors(weight_part(own), pool, shares)
        if factors is None:
            each = lambda own, pool: change_of(site, own, pool)
            changes[site.path] = _present(shares, eqx.filter_vmap(each)(own, pool))
        else:
            changes[site.path] = LowRank(*factors)
        if site.bias is not None:
            bias = _present(shares, _bias_changes(site, own, pool))
            changes[f"{site.path} bias"] = bias
        return site.layer

    map_adapted(note, model, _first(heads))
    changes, shares = jax.tree.map(lambda x: _of_all(x, axis_name), (changes, shares))
    each = [jax.tree.map(lambda x, h=h: x[h], changes) for h in range(len(shares))]
    return mean(each, shares) if weighted else mean(each)


def materialized(change: Any) -> Array:
    """A change as a dense matrix."""
    return change.materialize() if isinstance(change, LowRank) else change


def _first(heads: Adapters) -> Adapters:
    return jax.tree.map(lambda x: x[0], heads)


def _along(shares: Float[Array, " h"], x: Array) -> Array:
    """Numbers of heads, which broadcast against their arrays."""
    return shares.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def _present(shares: Float[Array, " h"], x: Array) -> Array:
    """Zeros in the place of heads that have no share."""
    return jnp.where(_along(shares, x) != 0, x, 0)


def _sum_over(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else lax.psum(x, axis_name)


def _of_all(x: Array, axis_name: str | None) -> Array:
    """The heads of all devices, on each: known to be the same on all, as a sum is."""
    if axis_name is None:
        return x
    count = x.shape[0]
    slots = jnp.zeros((count * lax.axis_size(axis_name), *x.shape[1:]), x.dtype)
    slots = lax.pcast(slots, axis_name, to="varying")
    at = lax.axis_index(axis_name) * count
    return lax.psum(lax.dynamic_update_slice_in_dim(slots, x, at, axis=0), axis_name)

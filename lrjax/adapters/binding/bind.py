import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..._arguments import check_key
from ..._matrices import path_name
from ..._sites import (
    Held,
    Site,
    array_site,
    check_reweighted,
    check_used_once,
    flat_leaves,
    fold_in_path,
    holds_quantized,
    is_layer,
    layer_site,
    over_stack,
    reweighted,
)
from ..protocol import Adapter, Adapters, Ready, is_partial, with_stopped_gradients
from .bound import Bound, adapted, held_pools, is_bound, prepared


def map_adapted(
    f: Callable[[Site, Adapter], Any], model: PyTree, adapters: Adapters
) -> PyTree:
    """``f(site, adapter)`` in place of every adapted site."""
    check_used_once(model, adapters.layers)
    axes, missing = dict(adapters.axes), dict(adapters.layers)
    leaves, treedef = flat_leaves(model)
    new = []
    for path, leaf in leaves:
        if path not in missing:
            new.append(leaf)
            continue
        site = (
            layer_site(path, leaf)
            if is_layer(leaf)
            else array_site(path, leaf, lambda path, _: axes.get(path))
        )
        new.append(f(site, fitting(site, missing.pop(path))))
    if missing:
        raise ValueError(
            f"The model has no layer at {sorted(missing)}: these adapters were made for "
            "another model."
        )
    return treedef.unflatten(new)


def fitting(site: Site, adapter: Adapter) -> Adapter:
    """The adapter, if it is whole and made for this weight."""
    if is_partial(adapter):
        raise ValueError(
            f"The adapter at {site.path!r} is only a part of one: put what "
            "lrjax.partition took apart together again with eqx.combine(params, frozen)."
        )
    want = (*site.stack, *site.shape)
    if adapter.shape != want:
        raise ValueError(
            f"The adapter at {site.path!r} is for a matrix of shape {adapter.shape}, the "
            f"layer has {want}: these adapters were made for another model, or have a "
            "leading axis that jax.vmap must take off first."
        )
    return adapter


def _ready(
    site: Site, adapter: Adapter, pools: dict[str | None, Held | None]
) -> tuple[Ready, Held | None]:
    """The adapter made ready, and the pool that it needs."""
    # On the class: a bound method of an Equinox module is a module of its own, and takes
    # longer to make than all else here.
    name = type(adapter).pool_name(adapter)
    if name not in pools:
        raise ValueError(
            f"The adapter at {site.path!r} shares the pool {name!r}, which is not "
            f"there: Adapters(layers, pools) has {sorted(filter(None, pools))}."
        )
    pool = pools[name]
    if pool is not None and is_partial(pool.pool):
        raise ValueError(
            f"The pool {name!r} is only a part of one: put what lrjax.partition "
            "took apart together again with eqx.combine(params, frozen)."
        )
    return prepared(site, with_stopped_gradients(adapter), pool), pool


def _only_dense(model: PyTree, adapters: Adapters) -> tuple[str, ...]:
    """Adapted weights without a call of their own, which ``bind`` replaces by dense ones.

    Arrays, and layers inside one that puts them together with another weight.
    """
    leaves, inside = flat_leaves(model)[0], reweighted(model)
    within = tuple(f"{path}." if path else "" for path in inside)
    if inside:
        quantized = [path for path, leaf in leaves if holds_quantized(leaf)]
        check_reweighted(inside, quantized)
    layers = {path for path, leaf in leaves if is_layer(leaf)}
    return tuple(
        path for path in adapters.layers if path not in layers or path.startswith(within)
    )


def _cannot_drop(path: str, why: str) -> ValueError:
    return ValueError(
        f"The adapter at {path!r} has dropout and bind was given a key, but {why}, so its "
        "inputs cannot be dropped: bind without a key, or make this adapter with dropout=0."
    )


def bind(model: PyTree, adapters: Adapters, *, key: PRNGKeyArray | None = None) -> PyTree:
    """The model with every adapted layer replaced by layer and adapter together.

    Each adapted layer computes its output and adds the low-rank path, ``W x + s·B (A x)``;
    the dense ``B A`` is never formed. What does not depend on the input, as the norms of
    DoRA, is computed here, once, and not in the calls. Methods and attributes that read
    the weight get the adapted one, so the bound model is the merged one in every use.

    No gradient flows into the adapted weights; all else in the model, the biases of
    adapted layers too, is left as it is and can be trained beside. Adapted arrays that
    belong to no layer, and layers inside ``eqx.nn.WeightNorm`` or ``SpectralNorm``, are
    replaced by dense ones as by :func:`materialize`. A bound model can be bound again:
    the second adapters then change what the first ones made of it.

    Bind inside the function that is differentiated or jitted. A bound model may also be
    passed to a jitted function, to decode many tokens with one preparation, say; pools
    shared by its layers (VeRA, Tied-LoRA) are constants of that program then.

    Args:
        model: the module that :func:`adapt` saw.
        adapters: all of them (``eqx.combine(params, frozen)`` after :func:`partition`).
        key: turns dropout on, ``W x + (W' − W) drop(x)``; without one the model is
            deterministic. A new key each step. Under ``vmap`` every input vector drops its
            own entries, although the key is one; the steps of a ``scan`` over time, where
            one layer is called again and again, share them. A key passed to the call of a
            layer takes the place of this one.

    Returns:
        A model of the same structure above the layers: call, ``jit``, ``vmap`` or scan it.

    Raises:
        ValueError: if an adapter has no layer in the model or another shape, is only half
            of a partition, or has dropout where inputs cannot be dropped; if a layer inside
            ``WeightNorm`` or ``SpectralNorm`` is quantized.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.LoRA(rank=2), key=jax.random.key(1))
        >>> params, frozen = lrjax.partition(adapters)
        >>> def loss(params, x):
        ...     bound = lrjax.bind(model, eqx.combine(params, frozen))
        ...     return jnp.sum(jax.vmap(bound)(x) ** 2)
        >>> grads = jax.grad(loss)(params, jnp.ones((5, 4)))
        >>> grads["layers.0"].pair.shape
        (16, 4)
    """
    check_key("bind", key)
    pools, dense = held_pools(adapters.pools), _only_dense(model, adapters)

    def attach(site, adapter):
        path = site.path
        drops = key is not None and adapter.dropout_rate() is not None
        ready, held = _ready(dataclasses.replace(site, still=True), adapter, pools)
        if path in dense:
            if drops:
                raise _cannot_drop(path, "it is an array that other code reads")
            return adapted(site, ready, frozen=True)
        if drops and not site.acts:
            name = type(site.layer).__name__
            raise _cannot_drop(path, f"{name} has a __call__ of its own")
        own = None
        if key is not None and drops:
            own = fold_in_path(key, path)
            own = jr.split(own, site.stack) if site.stack else own
        return Bound(site.layer, adapter, ready, held, own, path, dense)

    return map_adapted(attach, model, adapters)


def merge(model: PyTree, adapters: Adapters) -> PyTree:
    """The plain model with the adapters added into its weights, ``W + s·B A``.

    Classes and structure are those of ``model``: nothing of lrjax is left in it. The sum is
    taken in float32 or higher and rounded once. Keep ``model`` to go back: subtracting,
    :func:`lrjax.adapters.unmerge`, is not exact.

    Args:
        model: the module, or tree of parameters, that :func:`adapt` saw.
        adapters: all of them (``eqx.combine(params, frozen)`` after :func:`partition`).

    Returns:
        A model of the structure and dtypes of ``model``.

    Raises:
        ValueError: if an adapter has no layer in the model or another shape, or a weight
            is quantized: merge into :func:`lrjax.adapters.dequantize` of the model then.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.LoRA(rank=2), key=jax.random.key(1))
        >>> merged = lrjax.merge(model, adapters)
        >>> jax.tree.structure(merged) == jax.tree.structure(model)
        True
    """
    leaves = dict(flat_leaves(model)[0])
    quantized = [p for p in adapters.layers if p in leaves and holds_quantized(leaves[p])]
    if quantized:
        raise ValueError(
            f"The weights at {quantized} are quantized, which cannot hold the sum: merge "
            "into dense ones, lrjax.merge(lrjax.adapters.dequantize(model), adapters), or "
            "keep the adapters apart with lrjax.bind."
        )
    return _dense_everywhere(model, adapters, frozen=False)


def _dense_everywhere(model: PyTree, adapters: Adapters, *, frozen: bool) -> PyTree:
    pools = held_pools(adapters.pools)
    put = lambda site, own: adapted(site, _ready(site, own, pools)[0], frozen=frozen)
    return map_adapted(put, model, adapters)


def adapted_sites(
    model: PyTree, adapters: Adapters
) -> dict[str, tuple[Site, Adapter, Callable[[], Ready]]]:
    """Of every path the site, its adapter, and what makes that ready."""
    pools, found = held_pools(adapters.pools), {}

    def note(site, own):
        found[site.path] = (site, own, lambda: _ready(site, own, pools)[0])
        return site.layer

    map_adapted(note, model, adapters)
    return found


def dense_change(site: Site, ready: Ready) -> Float[Array, "*b out in"]:
    """``W' − W`` of every matrix of a site."""

    def one(part: Site, ready: Ready) -> Array:
        weight = part.read()
        return ready.weight(weight) - weight

    return over_stack(one, site, ready)


def bias_change(site: Site, ready: Ready) -> Array:
    """``b' − b`` of every matrix of a site that has a bias."""

    def one(part: Site, ready: Ready) -> Array:
        bias = jnp.asarray(part.read_bias())
        return jnp.asarray(ready.bias(bias)) - bias

    return over_stack(one, site, ready)


def materialize(params: PyTree, adapters: Adapters) -> PyTree:
    """The parameters with adapted arrays in place of the frozen ones, for use in a loss.

    For dict, Flax and other trees whose layers cannot be replaced: the dense ``W + s·B A``
    is formed in every call, which costs about twice the flops and memory of :func:`bind`
    and works for any code that reads parameters. No gradient reaches the adapted arrays.

    Args:
        params: the tree of parameters that :func:`adapt` saw.
        adapters: all of them (``eqx.combine(params, frozen)`` after :func:`partition`).

    Returns:
        A tree of the structure of ``params``.

    Raises:
        ValueError: if an adapter has no array in the tree or another shape.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
        >>> adapters = lrjax.adapt(params, lrjax.LoRA(rank=2), key=jax.random.key(0))
        >>> adapters["dense.kernel"].pair.left.shape
        (3, 2)
        >>> lrjax.materialize(params, adapters)["dense"]["kernel"].shape
        (4, 3)
    """
    return _dense_everywhere(params, adapters, frozen=True)


def detach(bound: PyTree) -> tuple[PyTree, Adapters]:
    """Take a bound model apart: ``detach(bind(model, adapters)) == (model, adapters)``.

    Args:
        bound: what :func:`bind` gave, perhaps changed since (a trained head, say).

    Returns:
        The plain model, with the weights it had before the adapters, and the adapters.

    Raises:
        ValueError: if there is no bound layer in the model.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.LoRA(rank=2), key=jax.random.key(1))
        >>> plain, same = lrjax.detach(lrjax.bind(model, adapters))
        >>> eqx.tree_equal(plain, model), eqx.tree_equal(same, adapters)
        (Array(True, dtype=bool), Array(True, dtype=bool))
    """
    layers, pools, dense = {}, {}, ()

    def take(path, node):
        nonlocal dense
        if not is_bound(node):
            return node
        layers[path_name(path)] = node.adapter
        if node.pool is not None:
            pools[node.adapter.pool_name()] = node.pool.pool
        dense = node.dense
        return node.layer

    model = jtu.tree_map_with_path(take, bound, is_leaf=is_bound)
    if not layers:
        raise ValueError(
            "detach found no bound layer: it takes apart what lrjax.bind put together "
            "(merged weights cannot be taken apart; keep the model)."
        )
    if dense:
        raise ValueError(
            f"The weights at {list(dense)} have no call of their own, so bind replaced "
            "them by adapted ones, which cannot be taken apart: keep model and adapters."
        )
    return model, Adapters(layers, pools)

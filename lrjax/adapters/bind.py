from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, PRNGKeyArray, PyTree

from ._protocol import Adapter
from ._sites import batch_ndim, map_sites, matrix, replace_matrix, stop_gradient, weight_of
from .adapt import Adapters, fold_in_path


class Bound(eqx.Module):
    """A layer with its adapter: called like the layer, and with its attributes.

    ``weight`` is the adapted weight, so that code which reads it (tied layers, say) sees
    what the call uses. No gradient reaches the layer itself.
    """

    layer: Any
    adapter: Adapter
    shared: PyTree
    key: Any  # a key, or keys (*b,) for stacked layers, or None

    def __call__(self, x: Array, *, key: PRNGKeyArray | None = None) -> Array:
        """The adapted output; a ``key`` replaces that of :func:`bind` for dropout."""
        key = self.key if key is None or self.key is None else key
        return self.adapter.apply(stop_gradient(self.layer), x, self.shared, key)

    @property
    def weight(self) -> Array:
        """The adapted weight, dense."""
        return weight_of(_adapted(stop_gradient(self.layer), self.adapter, self.shared))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in {"layer", "adapter", "shared", "key"}:
            raise AttributeError(name)
        return getattr(self.layer, name)


def _adapted(site: Any, adapter: Adapter, shared: PyTree, path: str = "") -> Any:
    return replace_matrix(site, lambda base: adapter.weight(base, shared), path)


def _check_fits(path: str, site: Any, adapter: Adapter) -> None:
    leaves = jax.tree.leaves(adapter, is_leaf=lambda x: x is None)
    if any(leaf is None for leaf in leaves):
        raise ValueError(
            f"The adapter at {path!r} is only a part of one: put what lrjax.partition took "
            "apart together again with eqx.combine(params, frozen)."
        )
    factors, want = adapter.factors(), matrix(site, path).shape
    if factors is not None and factors[0].shape != want:
        raise ValueError(
            f"The adapter at {path!r} is for a matrix of shape {factors[0].shape}, the "
            f"layer has {want}: these adapters were made for another model, or have a "
            "leading axis that jax.vmap must take off first."
        )


def _map_adapted(f: Any, model: PyTree, adapters: Adapters) -> PyTree:
    """``f(path, site, adapter)`` in place of every adapted site."""
    missing = dict(adapters.layers)

    def apply(path, site):
        if path not in adapters.layers:
            return site
        adapter = missing.pop(path)
        _check_fits(path, site, adapter)
        return f(path, site, adapter)

    new = map_sites(apply, model)
    if missing:
        raise ValueError(
            f"The model has no layer at {sorted(missing)}: these adapters were made for "
            "another model, or this one is already bound."
        )
    return new


def bind(model: PyTree, adapters: Adapters, *, key: PRNGKeyArray | None = None) -> PyTree:
    """The model with every adapted layer replaced by layer and adapter together.

    Each adapted layer computes its output and adds the low-rank path, ``W x + s·B (A x)``;
    the dense ``B A`` is never formed. No gradient flows into the adapted layers
    themselves; all else in the model is left as it is, so a head can be trained beside.
    Adapted arrays of a tree without layers are replaced as by :func:`materialize`.

    Args:
        model: the module that :func:`adapt` saw.
        adapters: all of them (``eqx.combine(params, frozen)`` after :func:`partition`).
        key: turns dropout on; without one the model is deterministic. A new key each step.
            Under ``vmap`` every input vector drops its own entries, although the key is
            one. A key passed to the call of a layer takes the place of this one.

    Returns:
        A model of the same structure above the layers: call, ``jit``, ``vmap`` or scan it.

    Raises:
        ValueError: if an adapter has no layer in the model or another shape.

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

    def attach(path, site, adapter):
        if eqx.is_array(site):
            return _adapted(stop_gradient(site), adapter, adapters.shared, path)
        own = None if key is None else fold_in_path(key, path)
        stack = weight_of(site).shape[: batch_ndim(site)]
        own = jr.split(own, stack) if own is not None and stack else own
        return Bound(site, adapter, adapters.shared, own)

    return _map_adapted(attach, model, adapters)


def merge(model: PyTree, adapters: Adapters) -> PyTree:
    """The plain model with the adapters added into its weights, ``W + s·B A``.

    Classes and structure are those of ``model``: nothing of lrjax is left in it. The sum is
    taken in float32 or higher and rounded once. Keep ``model`` to go back: subtracting is
    not exact.

    Args:
        model: the module, or tree of parameters, that :func:`adapt` saw.
        adapters: all of them (``eqx.combine(params, frozen)`` after :func:`partition`).

    Returns:
        A model of the structure and dtypes of ``model``.

    Raises:
        ValueError: if an adapter has no layer in the model or another shape.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.LoRA(rank=2), key=jax.random.key(1))
        >>> merged = lrjax.merge(model, adapters)
        >>> jax.tree.structure(merged) == jax.tree.structure(model)
        True
    """
    return _map_adapted(
        lambda path, site, adapter: _adapted(site, adapter, adapters.shared, path),
        model,
        adapters,
    )


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
    return _map_adapted(
        lambda path, site, adapter: _adapted(
            stop_gradient(site), adapter, adapters.shared, path
        ),
        params,
        adapters,
    )


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
    layers, pools = {}, []

    def take(path, node):
        if not _is_bound(node):
            return node
        layers[jtu.keystr(path, simple=True, separator=".")] = node.adapter
        pools.append(node.shared)
        return node.layer

    model = jtu.tree_map_with_path(take, bound, is_leaf=_is_bound)
    if not layers:
        raise ValueError(
            "detach found no bound layer: it takes apart what lrjax.bind put together "
            "(merged weights cannot be taken apart; keep the model)."
        )
    return model, Adapters(layers, pools[0])


def _is_bound(x: Any) -> bool:
    return isinstance(x, Bound)


def partition(adapters: Adapters) -> tuple[Adapters, Adapters]:
    """Split adapters into what is trained and what is frozen.

    ``params`` holds :class:`lrjax.LowRank` nodes, so that transforms which need both
    factors (``scale_by_gram`` and its relatives) see pairs; scales, rates and shared pools
    are frozen.

    Args:
        adapters: from :func:`adapt`.

    Returns:
        ``(params, frozen)``, each with ``None`` where the other has arrays; put them
        together with ``eqx.combine(params, frozen)``.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.LoRA(rank=2), key=jax.random.key(1))
        >>> params, frozen = lrjax.partition(adapters)
        >>> sum(x.size for x in jax.tree.leaves(params))
        142
    """
    spec = Adapters(
        {path: adapter.trainable() for path, adapter in adapters.layers.items()},
        jax.tree.map(lambda _: False, adapters.shared),
    )
    return eqx.partition(adapters, spec)

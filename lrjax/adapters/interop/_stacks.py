"""Adapters of stacked layers taken apart into one for each layer, and put together."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..._sites import find_sites
from ..binding import fitting, joined, placed
from ..kinds.around import Biased
from ..kinds.factors import Factors
from ..kinds.full import FullCopy
from ..protocol import Adapter, Adapters
from ._names import Module, Rename, find_modules, modules_of
from .methods import Part


def taken_apart(
    model: PyTree, adapters: Adapters, rename: Rename | None
) -> tuple[dict[str, Module], list[Part]]:
    """All modules of a model by name, and every adapter with the one it belongs to.

    Layers of rank zero have none.

    Raises:
        ValueError: if an adapter is of another model, or only a part of one, and for stacks
            whose layers have no names.
    """
    axes = dict(adapters.axes)
    sites = find_sites(model, lambda path, _: axes.get(path))
    modules, _ = find_modules(sites.values(), rename)
    parts = []
    for path, adapter in adapters.layers.items():
        if path not in sites:
            raise ValueError(
                f"The model has no layer at {path!r}: these adapters were made for another "
                "one."
            )
        pool = adapters.pools.get(fitting(sites[path], adapter).pool_name() or "")
        for module in modules_of(sites[path], rename):
            if not module.name:
                raise ValueError(
                    "The model is one layer, which has no name elsewhere: pass "
                    "rename=lambda path: 'name'."
                )
            own = split(adapter, module.index)
            if not _is_empty(own):
                parts.append(Part(module, own, pool))
    return modules, parts


def _is_empty(adapter: Adapter) -> bool:
    """Whether all columns are masked."""
    mask = adapter.mask if isinstance(adapter, Factors) else None
    return mask is not None and not np.any(mask)


def split(adapter: Adapter, index: tuple[int, ...]) -> Adapter:
    """The adapter of one of a stack; cut on the host, where no shape is compiled."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[index]), adapter)


def as_adapters(
    found: dict[str, Adapter], modules: dict[str, Module], pools: dict[str, Any]
) -> Adapters:
    """The adapters by path, those of a stack together."""
    groups: dict[str, dict[tuple[int, ...], Adapter]] = {}
    sites, depths = {}, {}
    for name, module in modules.items():
        if name in found:
            path = module.site.path
            adapter = _shaped(module, found[name])
            groups.setdefault(path, {})[module.index] = adapter
            sites[path], depths[path] = module.site, len(module.index)
    layers = {
        path: placed(joined(sites[path], group, depths[path]), sites[path])
        for path, group in groups.items()
    }
    told = ((path, getattr(site, "told", None)) for path, site in sites.items())
    return Adapters(layers, pools, tuple((p, spec) for p, spec in told if spec is not None))


def _shaped(module: Module, adapter: Any) -> Any:
    """The adapter with its bias in the shape of the layer's."""
    field = {Biased: "own", FullCopy: "bias"}.get(type(adapter))
    bias, base = getattr(adapter, field or "", None), module.site.bias
    if field is None or bias is None or base is None:
        return adapter
    shape = base.shape[len(module.index) :]
    return dataclasses.replace(adapter, **{field: bias.reshape(shape)})

import collections
import zlib
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import PRNGKeyArray, PyTree

from .arrays import Axes, array_site
from .quantized import is_quantized
from .sites import Site, check_unique, flat_leaves, is_layer, layer_site


def find_sites(model: PyTree, axes: Axes | None = None) -> dict[str, Site]:
    """Everything in a model that has a weight to adapt, by path."""
    sites = []
    for path, leaf in flat_leaves(model)[0]:
        if is_layer(leaf):
            sites.append(layer_site(path, leaf))
        elif is_quantized(leaf) or (eqx.is_inexact_array(leaf) and leaf.ndim):
            sites.append(array_site(path, leaf, axes))
    check_unique(site.path for site in sites)
    return {site.path: site for site in sites}


def fold_in_path(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
    """A key of its own for the layer at ``path``."""
    return jr.fold_in(key, zlib.crc32(path.encode()))


def check_used_once(model: PyTree, paths: Any) -> None:
    """Refuse adapted weights that stand in a tree twice; seen outside of ``jit`` only."""
    uses = collections.Counter(id(x) for x in jax.tree.leaves(model) if eqx.is_array(x))
    for path, leaf in flat_leaves(model)[0]:
        weight = vars(leaf).get("weight") if is_layer(leaf) else leaf
        times = max((uses[id(x)] for x in jax.tree.leaves(weight)), default=0)
        if path in paths and times > 1:
            raise ValueError(
                f"The weight of {path or 'the root'} is in the tree {times} "
                "times: adapting one of them would untie them without a word. Tie them "
                "with eqx.nn.Shared, or copy the layer if they are not meant to be tied "
                "(jax.tree.map(jnp.copy, layer))."
            )

import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree


_LAYERS = (eqx.nn.Linear, eqx.nn.Conv, eqx.nn.ConvTranspose, eqx.nn.Embedding)
_HEAD_OR_EMBEDDING = re.compile(r"(.*_)?(heads?|classifier|logits|score|wte|wpe)|.*embed.*")


def is_layer(x: Any) -> bool:
    """Whether ``x`` is an Equinox layer with one weight that acts as a matrix."""
    return isinstance(x, _LAYERS)


def _is_matrix_array(x: Any) -> bool:
    return eqx.is_inexact_array(x) and x.ndim >= 2


def sites(model: PyTree) -> dict[str, Any]:
    """What can be adapted, by path: the layers, or in a tree without any its arrays."""
    flat = jtu.tree_flatten_with_path(model, is_leaf=is_layer)[0]
    named = [(jtu.keystr(p, simple=True, separator="."), leaf) for p, leaf in flat]
    found = [(path, leaf) for path, leaf in named if is_layer(leaf)]
    if not found:
        found = [(path, leaf) for path, leaf in named if _is_matrix_array(leaf)]
    paths = [path for path, _ in found]
    repeated = sorted({path for path in paths if paths.count(path) > 1})
    if repeated:
        raise ValueError(
            f"Two layers have the same path {repeated[0]!r} (a dict key with a dot in "
            "it?): rename the key, adapters are stored by path."
        )
    return dict(found)


def map_sites(f: Callable[[str, Any], Any], model: PyTree) -> PyTree:
    """``f(path, site)`` in place of every site, all else as it was."""
    among = sites(model)

    def apply(path, leaf):
        name = jtu.keystr(path, simple=True, separator=".")
        return f(name, leaf) if name in among else leaf

    return jtu.tree_map_with_path(apply, model, is_leaf=is_layer)


def is_head_or_embedding(path: str) -> bool:
    """Whether a part of the path is the name of a head or of an embedding."""
    return any(_HEAD_OR_EMBEDDING.fullmatch(part) for part in path.lower().split("."))


def default_where(path: str, site: Any) -> bool:
    """Every ``eqx.nn.Linear``, or ``kernel`` array, but heads and embeddings."""
    if isinstance(site, eqx.nn.Linear):
        wanted = eqx.is_inexact_array(site.weight)
    else:
        wanted = not is_layer(site) and _is_kernel(path)
    return wanted and not is_head_or_embedding(path)


def _is_kernel(path: str) -> bool:
    parts = [part for part in path.split(".") if part != "value"]
    return bool(parts) and parts[-1] == "kernel"


def weight_of(site: Any) -> Any:
    """The weight of a layer; an array is its own weight."""
    return site.weight if is_layer(site) else site


def _input_first(path: str, site: Any) -> bool:
    """Whether the weight is stored (in, out): embedding tables and Flax kernels."""
    return isinstance(site, eqx.nn.Embedding) or (not is_layer(site) and _is_kernel(path))


def batch_ndim(site: Any) -> int:
    """How many leading axes of the weight stack layers for ``lax.scan``."""
    spatial = site.num_spatial_dims if isinstance(site, eqx.nn.Conv) else 0
    return weight_of(site).ndim - 2 - spatial


def matrix(site: Any, path: str = "") -> Float[Array, "*b out in"]:
    """The weight as a matrix ``(*b, out, in)``, its input axes flattened."""
    weight = weight_of(site)
    if _input_first(path, site):
        return weight.mT
    lead = weight.shape[: batch_ndim(site) + 1]
    return weight.reshape(*lead, -1)


def replace_matrix(site: Any, f: Callable, path: str = "") -> Any:
    """The layer, or array, with ``f`` applied to its weight as a matrix."""
    weight = weight_of(site)
    new = f(matrix(site, path))
    new = new.mT if _input_first(path, site) else new.reshape(weight.shape)
    if not is_layer(site):
        return new
    return eqx.tree_at(lambda layer: layer.weight, site, new)


def describe(site: Any) -> str:
    """A site in words: its class and the shape of its weight."""
    weight = weight_of(site)
    shape = weight.shape if hasattr(weight, "shape") else "tied by eqx.nn.Shared"
    name = type(site).__name__ if is_layer(site) else f"{site.dtype} array"
    return f"{name} {shape}"


def stop_gradient(tree: PyTree) -> PyTree:
    """``lax.stop_gradient`` on the arrays of a tree that may hold anything."""
    arrays, other = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.tree.map(jax.lax.stop_gradient, arrays), other)

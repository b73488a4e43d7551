from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._arguments import check_key
from .._sites import QuantizedArray, Site, Where, find_sites, flat_leaves, pick
from ..linalg import truncated_svd
from ..lowrank import LowRank
from ._settings import check_fits
from .binding import adapt
from .kinds import Factors, LoRA
from .protocol import AdapterKind, Adapters
from .quantize import quantized_layer


_FIRST = ("weight", "factors")


def loftq(
    model: PyTree,
    kind: AdapterKind,
    format: Callable[[Float[Array, "*b m n"]], QuantizedArray],
    *,
    where: Where = None,
    steps: int = 5,
    first: str = "weight",
    key: PRNGKeyArray,
) -> tuple[PyTree, Adapters]:
    """Quantize a model so that its LoRA starts by making good what was lost.

    Seeks ``Q + s B A`` near ``W`` for a quantized Q and factors of rank r by turns, each
    ``steps`` times::

        Q   = quantized(W − s B A)
        B A = the r largest singular triplets of (W − Q) / s,  B = U √Σ,  A = √Σ Vᵀ

    From ``B A = 0`` the weight comes first (LoftQ); where the factors come first, they take
    the principal part of W, and what is quantized is the rest (QPiSSA). The last of the two
    is the nearest to W, given the other one. The base is another one then, so these
    adapters belong to it alone.

    Args:
        model: the dense module, or tree of parameters.
        kind: ``lrjax.LoRA(rank)``.
        format: of the weights, as of :func:`lrjax.adapters.quantize`.
        where: as of :func:`lrjax.adapters.quantize`.
        steps: how often each of the two is found, at least once.
        first: ``"weight"`` or ``"factors"``.
        key: as of :func:`lrjax.adapt`.

    Returns:
        The model with quantized weights, and the adapters: to bind together.

    Raises:
        ValueError: for fewer steps than one, another ``first``, a ``kind`` with a start of
            its own, or a rank above that of a weight; or as of
            :func:`lrjax.adapters.quantize`.
        TypeError: if ``kind`` is no ``LoRA``.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> from lrjax.adapters import NF4, loftq
        >>> model = eqx.nn.MLP(64, 16, 1, 0, key=jax.random.key(0))
        >>> small, adapters = loftq(model, lrjax.LoRA(8), NF4(), key=jax.random.key(1))
        >>> params, frozen = lrjax.partition(adapters)

    Reference:
        Y. Li et al., "LoftQ: LoRA-fine-tuning-aware quantization for large language
        models" (2023), arXiv:2310.08659; F. Meng, Z. Wang, M. Zhang, "PiSSA: principal
        singular values and singular vectors adaptation of large language models" (2024),
        arXiv:2404.02948, section 4. Without factors in between, with ``steps=1``, the
        base is that of :func:`lrjax.adapters.quantize`.
    """
    check_key("loftq", key)
    kind = _checked(kind, steps, first)
    sites = {p: s for p, s in find_sites(model).items() if s.kind != "vector"}
    picked = pick(sites, where)
    found = {
        path: _by_turns(site, kind, format, steps, first) for path, site in picked.items()
    }
    leaves, treedef = flat_leaves(model)
    small = treedef.unflatten([found[p][0] if p in found else leaf for p, leaf in leaves])
    adapters = adapt(small, kind, where=lambda path, _: path in found, key=key)
    pairs = {path: (a, found[path][1]) for path, a in adapters.layers.items()}
    layers = {path: _with_pair(*both) for path, both in pairs.items()}
    return small, eqx.tree_at(lambda a: a.layers, adapters, layers)


def _checked(kind: AdapterKind, steps: int, first: str) -> LoRA:
    if not isinstance(kind, LoRA):
        raise TypeError(f"loftq starts lrjax.LoRA(rank), got {kind!r}.")
    if kind.start.residual or kind.takes_data:
        raise ValueError(
            "loftq finds the start of the factors itself: give it lrjax.LoRA(rank) without "
            "another init."
        )
    if steps < 1:
        raise ValueError(f"loftq's steps must be at least 1, got {steps}.")
    if first not in _FIRST:
        raise ValueError(f"loftq's first must be one of {_FIRST}, got {first!r}.")
    return kind


def _by_turns(
    site: Site, kind: LoRA, format: Callable, steps: int, first: str
) -> tuple[Any, Any]:
    """The layer with its weight quantized, and the factors of ``s B A``."""
    check_fits("loftq", kind.rank, site)
    weight = site.read()

    def quantized(weight: Array) -> Any:
        return quantized_layer(site.of(site.put(weight, site.bias)), format)

    def factors(rest: Array) -> LowRank:
        u, values, v = truncated_svd(rest, kind.rank)
        root = jnp.sqrt(values)[..., None, :]
        return LowRank(u * root, v * root)

    base, change = jnp.zeros_like(weight), jnp.zeros_like(weight)
    layer, pair = site.layer, None
    for turn in (_FIRST if first == _FIRST[0] else _FIRST[::-1]) * steps:
        if turn == "weight":
            layer = quantized(weight - change)
            base = site.of(layer).read()
        else:
            pair = factors(weight - base)
            change = pair.materialize()
    return layer, pair


def _with_pair(adapter: Any, pair: LowRank) -> Factors:
    """An adapter whose change is that of the factors, from the scale that it has."""
    root = jnp.sqrt(adapter.scale.astype(jnp.float32))[..., None, None]
    like = lambda new, old: (new / root).astype(old.dtype)
    return eqx.tree_at(lambda a: a.pair, adapter, jax.tree.map(like, pair, adapter.pair))

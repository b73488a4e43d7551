"""Adapters as factors and a scale, for formats that know LoRA alone."""

import numpy as np
from jaxtyping import Array, PyTree

from ..._sites import Site
from ...lowrank import LowRank
from ..binding import adapted_sites, beyond_factors, stacked_factors
from ..kinds.around import Biased, Magnitude
from ..kinds.full import FullCopy
from ..protocol import Adapters
from ..ranks.masks import without_masked
from ._names import Module, Rename
from ._stacks import taken_apart
from .methods import factors_of


Triple = tuple[np.ndarray, np.ndarray, float]


def factors_by_module(
    what: str, model: PyTree, adapters: Adapters, rename: Rename | None
) -> dict[str, tuple[Module, Triple]]:
    """``left (out, r)``, ``right (in, r)`` and the scale of every module.

    Raises:
        ValueError: for adapters that are more than a product, or belong to experts.
    """
    _, parts = taken_apart(model, adapters, rename)
    found = {}
    for part in parts:
        name = type(part.adapter).__name__
        more = isinstance(part.adapter, (Biased, FullCopy, Magnitude))
        factors = None if more else factors_of(part)(without_masked(part.adapter))
        if factors is None or part.module.experts:
            raise ValueError(
                f"{what} holds products of two factors alone, and {part.module.name!r} has "
                f"{'experts' if part.module.experts else name}: save the nearest plain "
                "LoRA, lrjax.adapters.as_lora(adapters, model, rank=…), or merge it."
            )
        pair, scale = factors
        found[part.module.name] = (
            part.module,
            (np.asarray(pair.left), np.asarray(pair.right), float(scale)),
        )
    return found


def factors_by_path(
    what: str, model: PyTree, adapters: Adapters
) -> dict[str, tuple[Site, LowRank, Array]]:
    """The site, the factors and the scale of every path, those of a stack together.

    Raises:
        ValueError: for adapters that are more than a product.
    """
    found = {}
    for path, (site, adapter, ready) in adapted_sites(model, adapters).items():
        factors = stacked_factors(adapter, adapters.pools.get(adapter.pool_name() or ""))
        if factors is None or beyond_factors(site, ready()) is not None:
            raise ValueError(
                f"{what} holds a product of two factors, and the change at {path} by "
                f"{type(adapter).__name__} is none: lrjax.adapters.as_lora(adapters, "
                "params, rank=…) gives the nearest, lrjax.materialize the whole."
            )
        found[path] = site, *factors
    return found

"""Adapters as factors and a scale, for formats that know LoRA alone."""

import numpy as np
from jaxtyping import PyTree

from ..kinds.biased import Biased
from ..kinds.full import FullCopy
from ..kinds.magnitude import Magnitude
from ..ranks.masks import without_masked
from ..tree import Adapters
from ._names import Module, Rename
from ._stacks import taken_apart
from .methods.lora import factors_of


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

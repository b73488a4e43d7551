"""Adapters taken apart: what a fold begins anew, and what stands in the weight's place."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ..kinds.around import Fused
from ..kinds.full import FullCopy
from ..protocol import Adapter, Adapters, Around


def over_parts(f: Callable[..., Any], beside: Callable[..., Any], *adapters: Any) -> Any:
    """``f`` of the innermost adapters, ``beside`` of what is around them and of copies.

    Args:
        f: of adapters that are around no other.
        beside: of copies, and of those around others, whose ``inner`` is then replaced.
        *adapters: of one structure.
    """
    first = adapters[0]
    if isinstance(first, FullCopy):
        return beside(*adapters)
    if isinstance(first, Around):
        inner = over_parts(f, beside, *(own.inner for own in adapters))
        return eqx.tree_at(lambda own: own.inner, beside(*adapters), inner)
    if isinstance(first, Fused):
        parts = zip(*(own.parts for own in adapters), strict=True)
        each = (None if own[0] is None else over_parts(f, beside, *own) for own in parts)
        return Fused(tuple(each), first.sizes)
    return f(*adapters)


def begun_anew(adapter: Adapter) -> PyTree:
    """Which leaves a restart draws anew: all but copies, biases and lengths of rows.

    These are numbers of the weight itself, and stay what they are.
    """
    mark = lambda value: lambda own: jax.tree.map(lambda _: value, own)
    return over_parts(mark(True), mark(False), adapter)


def check_alike(old: Adapters, new: Adapters) -> None:
    """Refuse adapters that came back with other arrays than they had."""
    shapes = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)
    for path in sorted(old.layers.keys() | new.layers.keys()):
        was, now = (own.layers.get(path) for own in (old, new))
        if jax.tree.structure(was) != jax.tree.structure(now) or (
            jax.tree.leaves(shapes(was)) != jax.tree.leaves(shapes(now))
        ):
            raise ValueError(
                f"The adapter at {path!r} was a {_described(was)} and came back as a "
                f"{_described(now)}: fold with the kind and the settings that it was made "
                "with, or reset the moments and fold outside of jit."
            )


def _described(adapter: Any) -> str:
    if adapter is None:
        return "layer without one"
    arrays = [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(adapter)]
    return f"{type(adapter).__name__} of {', '.join(arrays)}"

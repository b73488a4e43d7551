"""Adapters of the matrices of a stack, made one by one, as one adapter of all."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._sites import Site
from ...linalg import nonzero
from ..kinds.around import Biased, Magnitude
from ..kinds.factors import Factors
from ..protocol import Adapter, innermost


def for_each(path: str, kinds: Any, stack: tuple[int, ...]) -> list[Any]:
    """What a rule answered for a site, one for each of its matrices.

    Raises:
        ValueError: for a list that is longer or shorter than the axis of the stack.
    """
    if not isinstance(kinds, (list, tuple)):
        return [kinds] * int(np.prod(stack, dtype=int))
    if not stack or len(kinds) != stack[0]:
        has = f"has {stack[0]} layers stacked" if stack else "is no stack of layers"
        raise ValueError(
            f"The rule given as kind= answered with a list of {len(kinds)} for "
            f"{path or 'the root'}, which {has}: answer with one kind for all, or with a "
            "list of one for each layer of a stack."
        )
    return [kind for own in kinds for kind in for_each(path, own, stack[1:])]


def joined(site: Site, found: Mapping[tuple[int, ...], Adapter], depth: int) -> Adapter:
    """One adapter of the ``depth`` leading axes of a stack.

    Factors of different ranks are filled up with zeros under a mask, and so are layers
    that have none: the function is the same.
    """
    if not depth:
        return found[()]
    shape = site.stack[:depth]
    adapters = [found.get(index) for index in np.ndindex(shape)]
    there = [adapter for adapter in adapters if adapter is not None]
    if all(isinstance(innermost(adapter), Factors) for adapter in there):
        ranks = {innermost(adapter).pair.rank for adapter in there}
        if len(ranks) > 1 or len(there) < len(adapters):
            there = [filled(adapter, max(ranks)) for adapter in there]
    rest = iter(there)
    whole = [
        _nothing(site, index, there[0]) if adapter is None else next(rest)
        for index, adapter in zip(np.ndindex(shape), adapters, strict=True)
    ]
    try:
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *whole)
    except ValueError as error:
        raise ValueError(
            f"The adapters of the stack {site.path!r} differ from layer to layer in more "
            f"than the rank of a LoRA, so they are no stack: {error}"
        ) from error
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), stacked)


def filled(tree: Any, rank: int, *, masked: bool = True) -> Any:
    """All factors with as many columns, of which those that were not there are masked.

    Without a mask they are zeros, which is the same function.
    """

    def fill(x: Any) -> Any:
        if not isinstance(x, Factors):
            return x
        wide = lambda y: jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, rank - y.shape[-1])])
        pair, start, gate = jax.tree.map(wide, (x.pair, x.start, x.gate))
        mask, scale = x.mask, x.scale
        if masked and mask is None and gate is None:  # a gate of zero is as good
            *lead, _, columns = x.pair.left.shape
            mask = jnp.ones((*lead, columns), scale.dtype)
        if mask is not None:
            scale = scale * (x.pair.rank / rank) ** x.power  # that of all columns
            mask = wide(mask)
        return dataclasses.replace(
            x, pair=pair, start=start, gate=gate, mask=mask, scale=scale
        )

    return jax.tree.map(fill, tree, is_leaf=lambda x: isinstance(x, Factors))


def _nothing(site: Site, index: tuple[int, ...], like: Adapter) -> Adapter:
    """An adapter that does nothing, of the structure of another one."""
    if not isinstance(innermost(like), Factors) or isinstance(like, Biased):
        raise ValueError(
            f"There are adapters for some layers of the stack {site.path!r} alone, which "
            f"takes a {type(innermost(like)).__name__} for each."
        )
    zeros = jax.tree.map(jnp.zeros_like, like)
    if not isinstance(like, Magnitude):
        return zeros
    lengths = jnp.sqrt(jnp.sum(site.read()[index] ** 2, axis=1))
    lengths = nonzero(lengths).astype(like.magnitude.dtype)
    return Magnitude(magnitude=lengths, inner=zeros.inner)

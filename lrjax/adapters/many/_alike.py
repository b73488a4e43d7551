"""Adapters of one weight brought to one structure, so that they stand in one stack."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..._sites import Site
from ..binding import filled, stacked_factors
from ..kinds import Factors, Weighted
from ..protocol import Adapter, Pool


def stacked(
    site: Site, found: dict[str, tuple[Adapter, Pool | None] | None], pad_rank: int
) -> Adapter:
    """One adapter with a leading axis: the identity, then those found, by their names.

    ``None`` stands for one that has none here, which is the identity too.
    """
    there = {name: own for name, own in found.items() if own is not None}
    same = _same_kind([own for own, _ in there.values()], pad_rank)
    if same is None:
        same = _same_factors(list(there.values()), pad_rank)
    if same is None:
        raise ValueError(_different(site.path, {n: own for n, (own, _) in there.items()}))
    wraps, first = not isinstance(same[0], Factors), same[0]
    blank = first if wraps else jax.tree.map(jnp.zeros_like, first)
    rest = iter(same)
    row = [blank, *(blank if own is None else next(rest) for own in found.values())]
    together = jax.tree.map(lambda *xs: jnp.stack(xs), *row)
    if not wraps:
        return together
    flags = jnp.array([False, *(own is not None for own in found.values())], jnp.float32)
    flags = flags.reshape(-1, *(1,) * len(site.stack))
    return Weighted(together, jnp.broadcast_to(flags, (len(row), *site.stack)))


def entry(site: Site, adapter: Adapter, pool: Pool | None, like: Adapter) -> Adapter:
    """An adapter in the structure of one entry of a stack."""
    if isinstance(like, Weighted):
        inner = entry(site, adapter, pool, like.inner)
        return Weighted(inner, jnp.ones_like(like.share))
    rank, masked = _rank(like), any(x.mask is not None for x in _factors_in(like))
    ways, needed = [adapter], None
    if isinstance(like, Factors) and (plain := _plain(adapter, pool)) is not None:
        ways.append(_dressed(plain, like))
    for own in ways:
        width = _rank(own)
        if not _same_when_filled(own, max(width, rank)):
            continue
        wide = filled(own, max(width, rank), masked=masked)
        if jax.tree.structure(wide) != jax.tree.structure(like):
            continue
        if width > rank:
            needed = needed or width
        elif _alike([wide, like]):
            return jax.tree.map(lambda x, y: x.astype(y.dtype), wide, like)
    if needed is not None:
        raise ValueError(
            f"The adapter at {site.path!r} has rank {needed}, and this stack holds ranks "
            f"up to {rank} there: make it with stack(…, pad_rank={needed}), or narrow the "
            f"adapter with lrjax.adapters.as_lora(adapters, model, rank={rank})."
        )
    raise ValueError(
        f"The adapter at {site.path!r}, {_described(adapter)}, does not fit into the "
        f"stack, which holds {_described(like)} there in other shapes or settings: make a "
        "stack of its own for it."
    )


def _same_kind(row: list[Adapter], pad_rank: int) -> list[Adapter] | None:
    """The adapters as they are, or with as many columns as the widest."""
    rank = max(map(_rank, row))
    if _alike(row) and (not rank or rank >= pad_rank):
        return row
    rank = max(rank, pad_rank)
    if not all(_same_when_filled(own, rank) for own in row):
        return None
    wide = [filled(own, rank) for own in row]
    return wide if _alike(wide) else None


def _same_factors(
    row: list[tuple[Adapter, Pool | None]], pad_rank: int
) -> list[Factors] | None:
    """What is a product in each of them, as plain factors of one width."""
    plain = [_plain(adapter, pool) for adapter, pool in row]
    known = [own for own in plain if own is not None]
    if len(known) < len(plain):
        return None
    rated = next((own for own in known if own.rate is not None), known[0])
    known = [_dressed(own, rated) for own in known]
    rank = max(pad_rank, *map(_rank, known))
    narrow = any(own.pair.rank < rank for own in known)
    return [filled(own, rank) for own in known] if narrow else known


def _plain(adapter: Adapter, pool: Pool | None) -> Factors | None:
    found = stacked_factors(adapter, pool)
    if found is None:
        return None
    pair, scale = found
    return Factors(pair, None, scale, adapter.dropout_rate(), "both")


def _dressed(plain: Factors, like: Factors) -> Factors:
    """Plain factors with all that other ones have beside, which does nothing."""
    rate = None if like.rate is None else jnp.zeros_like(like.rate)
    if rate is not None and plain.rate is not None:
        rate = plain.rate
    start = None if like.start is None else jax.tree.map(jnp.zeros_like, plain.pair)
    gate = None if like.gate is None else jnp.ones_like(plain.pair.left[..., 0, :])
    settings = {"train": like.train, "power": like.power}
    return dataclasses.replace(plain, rate=rate, start=start, gate=gate, **settings)


def _same_when_filled(adapter: Adapter, rank: int) -> bool:
    """Whether more columns leave the others alone: random zeros go by the shape."""
    return all(x.thinning is None or x.pair.rank == rank for x in _factors_in(adapter))


def _rank(adapter: Adapter) -> int:
    return max((x.pair.rank for x in _factors_in(adapter)), default=0)


def _factors_in(tree: Any) -> list[Factors]:
    is_factors = lambda x: isinstance(x, Factors)
    return [x for x in jax.tree.leaves(tree, is_leaf=is_factors) if is_factors(x)]


def _alike(row: list[Any]) -> bool:
    shapes = lambda tree: [x.shape for x in jax.tree.leaves(tree)]
    structure, first = jax.tree.structure(row[0]), shapes(row[0])
    return all(jax.tree.structure(x) == structure and shapes(x) == first for x in row[1:])


def _described(adapter: Adapter) -> str:
    name = type(adapter).__name__
    rank = _rank(adapter)
    return f"{name} of rank {rank}" if rank else name


def _different(path: str, row: dict[str, Adapter]) -> str:
    said = ", ".join(f"{name!r} has {_described(own)}" for name, own in row.items())
    return (
        f"The adapters at {path or 'the root'!r} are no stack, for they differ in more "
        f"than their ranks and are no products of factors: {said}. Keep a stack for each "
        "kind, or make factors of all of them first, lrjax.adapters.as_lora(adapters, "
        "model, rank=…)."
    )

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer

from ..._matrices import MatrixSpec
from .adapter import Adapter, innermost
from .pool import Pool


class Adapters(eqx.Module):
    """Adapters by the path of the layer they belong to, and the pools that they share.

    A tree of arrays that knows nothing of the model: it is saved, restored, stacked and
    mapped over like any other. ``one | other`` joins adapters of different layers.

    Attributes:
        layers: ``{path: adapter}``.
        pools: ``{group: pool}``.
        axes: pairs ``(path, spec)`` of the arrays whose axes a rule told.
    """

    layers: dict[str, Adapter]
    pools: dict[str, Pool] = eqx.field(default_factory=dict)
    axes: tuple[tuple[str, MatrixSpec], ...] = eqx.field(static=True, default=())

    def __getitem__(self, path: str) -> Adapter:
        if path not in self.layers:
            raise KeyError(f"No adapter at {path!r}; there are {sorted(self.layers)}.")
        return self.layers[path]

    def __or__(self, other: "Adapters") -> "Adapters":
        both = sorted(self.layers.keys() & other.layers.keys())
        if both:
            raise ValueError(
                f"Both have an adapter at {both}: bind one after the other instead, "
                "lrjax.bind(lrjax.bind(model, one), other)."
            )
        for name in self.pools.keys() & other.pools.keys():
            mine, its = (jax.tree.leaves(a.pools[name]) for a in (self, other))
            if len(mine) != len(its) or any(
                x is not y for x, y in zip(mine, its, strict=True)
            ):
                raise ValueError(
                    f"Both have a pool {name!r}, and not the same one: give the kinds "
                    "different names, as in lrjax.VeRA(group=…), or adapt both in one "
                    "call."
                )
        pools = self.pools | other.pools
        return Adapters(self.layers | other.layers, pools, self.axes + other.axes)

    def summary(self) -> str:
        """A listing: path, matrix shape, rank and trainable numbers of each adapter.

        Masked columns (:func:`lrjax.adapters.with_ranks`) do not count: of stacked layers
        the rank is the smallest and the largest.
        """
        rows = [("path", "matrix", "rank", "trainable")]
        counts = []
        for path, adapter in self.layers.items():
            counts.append(_count(adapter))
            row = (path or "(root)", str(adapter.shape), _rank(adapter))
            rows.append((*row, f"{counts[-1]:,}"))
        for name, pool in self.pools.items():
            counts.append(_count(pool))
            row = (f"pool {name}", str(pool.shape), _rank(pool))
            rows.append((*row, f"{counts[-1]:,}"))
        rows.append((f"{len(self.layers)} adapters", "", "", f"{sum(counts):,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def _count(part: Adapter | Pool) -> int:
    whole, (inner, used) = _size(part), _used(part)
    if used is None:
        return whole
    column = _size(inner) // inner.mask.size  # its numbers: all of them have this axis
    return whole - column * int(np.sum(~used))


def _size(part: Any) -> int:
    trains = eqx.filter(part, part.trainable())
    return sum(x.size for x in jax.tree.leaves(trains) if hasattr(x, "size"))


def _used(adapter: Any) -> tuple[Any, np.ndarray | None]:
    """The innermost adapter, and which of its columns a known mask leaves."""
    inner = innermost(adapter)
    mask = getattr(inner, "mask", None)
    known = isinstance(mask, (jax.Array, np.ndarray)) and not isinstance(mask, Tracer)
    return inner, np.asarray(mask) != 0 if known else None


def _rank(adapter: Any) -> str:
    """The width of the factors, those of an inner adapter as well."""
    adapter, used = _used(adapter)
    if used is not None:
        ranks = used.sum(axis=-1)
        return "–".join(map(str, sorted({ranks.min().item(), ranks.max().item()})))
    if hasattr(adapter, "pair"):
        return str(adapter.pair.rank)
    return str(adapter.ranks.shape[-1]) if hasattr(adapter, "ranks") else ""


def map_adapters(f: Callable[..., Any], adapters: Adapters, *rest: Adapters) -> Adapters:
    """``f(path, adapter, *rest)`` in place of every adapter; pools stay as they are.

    Args:
        f: gives an adapter, or anything else that is to stand in its place.
        adapters: from :func:`lrjax.adapt`.
        *rest: with the same paths; of each, the adapter of the path is passed on.

    Returns:
        ``Adapters`` with the pools of the first.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.LoRA(rank=2), key=jax.random.key(1))
        >>> ranks = lrjax.adapters.map_adapters(lambda path, a: a.pair.rank, adapters)
        >>> ranks.layers
        {'layers.0': 2, 'layers.1': 2, 'layers.2': 2}
    """
    layers = {
        path: f(path, adapter, *(other[path] for other in rest))
        for path, adapter in adapters.layers.items()
    }
    return eqx.tree_at(lambda a: a.layers, adapters, layers)


def partition(adapters: Adapters) -> tuple[Adapters, Adapters]:
    """Split adapters into what is trained and what is frozen.

    ``params`` holds :class:`lrjax.LowRank` nodes, so that transforms which need both
    factors (``scale_by_gram`` and its relatives) see pairs; scales, rates, frozen factors
    and frozen pools are in the other half. Where one factor of a pair is frozen, its
    place is ``None``, and those transforms are given the other half as well:
    ``tx.update(grads, state, params, frozen=frozen)``.

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
        {name: pool.trainable() for name, pool in adapters.pools.items()},
        adapters.axes,
    )
    return eqx.partition(adapters, spec)

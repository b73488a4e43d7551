import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr

from ...._sites import Site
from ...protocol import Adapter, AdapterKind, Beside, Ready


@dataclasses.dataclass(frozen=True)
class PartSite(Site):
    """Some outputs of another site, one after the other."""

    whole: Site | None = None
    outputs: tuple[int, int] = (0, 0)  # from, to

    @property
    def kind(self):
        """That of the whole."""
        return self._whole.kind

    @property
    def _whole(self) -> Site:
        assert self.whole is not None
        return self.whole.of(self.layer)

    def matrix(self):
        """Its rows of the weight."""
        return self._whole.matrix()[..., slice(*self.outputs), :]

    def put(self, matrix, bias):
        """Only the whole is put back."""
        raise NotImplementedError

    @property
    def bias(self):
        """Its numbers of the bias."""
        bias = self._whole.bias
        return None if bias is None else bias[..., slice(*self.outputs)]

    def product(self, matrix, x):
        """That of the whole."""
        return self._whole.product(matrix, x)

    def down(self, right, x):
        """That of the whole."""
        return self._whole.down(right, x)

    def up(self, left, h):
        """That of the whole."""
        return self._whole.up(left, h)


class Fused(Adapter):
    """Adapters of their own for the outputs of one weight, one after the other.

    Attributes:
        parts: the adapters, ``None`` where the outputs stay as they are.
        sizes: how many outputs each has.
    """

    parts: tuple[Adapter | None, ...]
    sizes: tuple[int, ...] = eqx.field(static=True)

    @property
    def shape(self):
        """All outputs, by the inputs."""
        *lead, _, inputs = self._some[0].shape
        return (*lead, sum(self.sizes), inputs)

    @property
    def _some(self) -> list[Adapter]:
        return [part for part in self.parts if part is not None]

    def dropout_rate(self):
        """That of the first adapter that has one."""
        rates = (part.dropout_rate() for part in self._some)
        return next((rate for rate in rates if rate is not None), None)

    def trainable(self):
        """What each adapter trains."""
        marks = (None if part is None else part.trainable() for part in self.parts)
        return Fused(tuple(marks), self.sizes)

    def prepare(self, site, pool=None):
        """Each adapter made ready for its outputs."""
        sites = part_sites(site, self.sizes)
        ready = (
            None if part is None else part.prepare(own, pool)
            for part, own in zip(self.parts, sites, strict=True)
        )
        return FusedReady(tuple(ready), self.sizes)


class FusedReady(Beside):
    """Each part of the outputs by its own adapter."""

    parts: tuple[Ready | None, ...]
    sizes: tuple[int, ...] = eqx.field(static=True)

    def weight(self, base):
        """The adapted rows, one below the other."""
        tiles = [base[slice(*ends)] for ends in _ends(self.sizes)]
        pairs = zip(self.parts, tiles, strict=True)
        return jnp.concatenate([w if p is None else p.weight(w) for p, w in pairs])

    def change(self, site, x):
        """The changes beside each other, zero where there is no adapter."""
        if site.kind != "linear":
            return super().change(site, x)
        sites, lead = part_sites(site, self.sizes), jnp.shape(x)[:-1]
        pairs = zip(self.parts, sites, strict=True)
        changes = [
            jnp.zeros((*lead, own.shape[0])) if part is None else part.change(own, x)
            for part, own in pairs
        ]
        return jnp.concatenate(changes, axis=-1)

    def output(self, site, x):
        """One product with the whole weight, and the changes beside it."""
        beside = site.kind == "linear"
        return super().output(site, x) if beside else Ready.output(self, site, x)

    def bias(self, bias: Any):
        """The adapted parts of the bias, one after the other."""
        if bias is None:
            return None
        tiles = [bias[slice(*ends)] for ends in _ends(self.sizes)]
        pairs = zip(self.parts, tiles, strict=True)
        new: list[Any] = [b if part is None else part.bias(b) for part, b in pairs]
        return jnp.concatenate(new)


def part_sites(site: Site, sizes: tuple[int, ...]) -> list[PartSite]:
    """The outputs of a site as sites of their own."""
    about = (site.path, site.layer, site.index, site.still)
    part = functools.partial(PartSite, *about, whole=site)
    return [part(outputs=ends) for ends in _ends(sizes)]


def _ends(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))


class FusedRows(AdapterKind):
    """Kinds of their own for parts of the outputs: queries, keys and values in one matrix.

    The weight ``(Σ_k n_k, in)`` is cut into ``(n_k, in)``, and each part is adapted by its
    own kind, or left as it is. A call has one product with the whole weight, and the thin
    ones of each part.

    Args:
        kinds: of the parts, ``None`` for what stays as it is. Kinds that share a pool or
            start from data are not taken. There is one dropout for all: that of the first
            kind that has some.
        sizes: how many outputs each part has.

    Raises:
        ValueError: for another number of sizes than of kinds, or no kind at all; in
            :func:`lrjax.adapt`, for sizes that do not add up to the outputs, or a layer
            that is no product with a vector.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> qkv = eqx.nn.Linear(8, 16, key=jax.random.key(0))
        >>> kind = lrjax.adapters.FusedRows(
        ...     [lrjax.LoRA(4), None, lrjax.DoRA(2)], sizes=(8, 4, 4))
        >>> adapters = lrjax.adapt(qkv, kind, key=jax.random.key(1))
        >>> [part and part.shape for part in adapters[""].parts]
        [(8, 8), None, (4, 8)]

        With one part it is the kind itself.
    """

    kinds: tuple[AdapterKind | None, ...]
    sizes: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, kinds: Sequence[AdapterKind | None], sizes: Sequence[int]):
        self.kinds, self.sizes = tuple(kinds), tuple(sizes)
        if len(self.kinds) != len(self.sizes) or not any(self.kinds):
            raise ValueError(
                "FusedRows takes a kind, or None, for each size, and at least one kind; "
                f"got {len(self.kinds)} kinds for sizes={self.sizes}."
            )
        if any(kind is not None and kind.pool_name() is not None for kind in self.kinds):
            raise ValueError("FusedRows takes no kinds that share a pool, as VeRA does.")
        if any(kind is not None and kind.takes_data for kind in self.kinds):
            raise ValueError(
                "FusedRows takes no kinds that start from data, as LoRA(init='lora_ga') "
                "does: a statistic is that of the whole matrix."
            )

    def init(self, site, *, key, pool=None, data=None):
        """Each kind's adapter of its part."""
        name = site.path or "the root"
        if site.kind not in ("linear", "array"):
            raise ValueError(
                f"FusedRows adapts linear layers and arrays, {name} is neither."
            )
        if sum(self.sizes) != site.shape[0]:
            raise ValueError(
                f"FusedRows has sizes={self.sizes}, which add up to {sum(self.sizes)}, and "
                f"{name} has {site.shape[0]} outputs."
            )
        sites = zip(self.kinds, part_sites(site, self.sizes), strict=True)
        keys = jr.split(key, len(self.kinds))
        parts = (
            None if kind is None else kind.init(own, key=k, pool=None)
            for (kind, own), k in zip(sites, keys, strict=True)
        )
        return Fused(tuple(parts), self.sizes)

"""LoKr as PEFT keeps it: two matrices, or their factors, of sides that the config tells."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ....lowrank import LowRank, is_low_rank
from ...kinds.structured import Kronecker, split
from .._config import alpha_of, by_pattern, number, patterns_of
from .._names import Module
from ._format import Format, misfit


class Lokr(Format):
    """A Kronecker product."""

    name = "LOKR"
    suffixes = tuple(f"lokr_w{k}{part}" for k in (1, 2) for part in ("", "_a", "_b"))
    settings = (
        *("alpha", "decompose_both", "decompose_factor", "rank_dropout"),
        *("module_dropout", "rank_dropout_scale"),
    )
    kinds = ("linear", "conv")

    def accepts(self, part):
        """Whether it is a Kronecker product."""
        return isinstance(part.adapter, Kronecker)

    def write(self, part):
        """Both sides, and what is needed to have PEFT make them of these shapes."""
        module, own, _ = part
        kernel = module.kernel or ()
        tensors = _side("lokr_w1", own.outer, ()) | _side("lokr_w2", own.inner, kernel[1:])
        return tensors, _Shapes(module, own)

    def config(self, facts):
        """The ranks, scales and sides.

        Raises:
            ValueError: if PEFT would make sides of other shapes.
        """
        both = any(is_low_rank(fact.adapter.outer) for fact in facts.values())
        ranks = {name: fact.rank(both) for name, fact in facts.items()}
        sides = {s for fact in facts.values() for s in fact.adapter.outer.shape}
        for factor in (None, *sorted(sides)):
            if all(fact.is_made(ranks[k], factor, both) for k, fact in facts.items()):
                break
        else:
            raise ValueError(
                "PEFT makes Kronecker products of one rule for all modules, and these are "
                f"of sides {sorted(sides)}: make them with the same factor= and both=, or "
                "merge them with lrjax.merge."
            )
        scales = {name: float(fact.adapter.scale) for name, fact in facts.items()}
        alphas = {name: alpha_of(scale, ranks[name]) for name, scale in scales.items()}
        rank, rank_pattern = patterns_of(ranks)
        alpha, alpha_pattern = patterns_of(alphas)
        return {
            "r": rank,
            "rank_pattern": rank_pattern,
            "alpha": alpha,
            "alpha_pattern": alpha_pattern,
            "decompose_both": both,
            "decompose_factor": -1 if factor is None else factor,
        }

    def read(self, module, tensors, config):
        """The scale from alpha and the rank of the config: a matrix does not show it."""
        outer = _read_side(module, tensors, "lokr_w1")
        inner = _read_side(module, tensors, "lokr_w2")
        rows, cols = (outer.shape[k] * inner.shape[k] for k in (0, 1))
        if (rows, cols) != module.site.shape:
            raise misfit(module, tensors)
        rank = by_pattern(config, "rank_pattern", module.name, number(config, "r", 8))
        alpha = by_pattern(config, "alpha_pattern", module.name, number(config, "alpha", 8))
        if rank <= 0:
            raise ValueError(f"The config says rank {rank} for {module.name!r}.")
        return Kronecker(outer, inner, jnp.asarray(alpha / rank, jnp.float32), None)


class _Shapes:
    """The shapes of one product, beside those that PEFT would make."""

    def __init__(self, module: Module, adapter: Kronecker):
        self.module, self.adapter = module, adapter
        self.taps = int(np.prod((module.kernel or (1,))[1:]))

    @property
    def _longest(self) -> tuple[int, int]:
        """The longer side of each matrix, without the taps of a kernel."""
        outer, inner = self.adapter.outer.shape, self.adapter.inner.shape
        return max(outer), max(inner[0], inner[1] // self.taps)

    def rank(self, both: bool) -> int:
        """The rank of the factors, or one at which there are none."""
        sides = (self.adapter.outer, self.adapter.inner)
        ranks = [side.rank for side in sides if is_low_rank(side)]
        outer, inner = self._longest
        return ranks[0] if ranks else -(-max(inner, outer if both else 1) // 2)

    def is_made(self, rank: int, factor: int | None, both: bool) -> bool:
        """Whether PEFT makes these shapes at this rank, with this rule."""
        m, n = self.module.site.shape
        want = split(m, factor)[0], split(n // self.taps, factor)[0]
        outer, inner = self._longest
        made = {"outer": both and rank < outer / 2, "inner": rank < inner / 2}
        sides = {"outer": self.adapter.outer, "inner": self.adapter.inner}
        return self.adapter.outer.shape == want and all(
            is_low_rank(side) == made[name] and (not made[name] or side.rank == rank)
            for name, side in sides.items()
        )


def _side(name: str, side: Any, taps: tuple[int, ...]) -> dict[str, np.ndarray]:
    if is_low_rank(side):
        return {f"{name}_a": np.asarray(side.left), f"{name}_b": np.asarray(side.right).T}
    side = np.asarray(side)
    return {name: side.reshape(len(side), -1, *taps) if taps else side}


def _read_side(module: Module, tensors: Mapping[str, np.ndarray], name: str) -> Any:
    if name in tensors:
        return jnp.asarray(tensors[name].reshape(len(tensors[name]), -1))
    a, b = tensors.get(f"{name}_a"), tensors.get(f"{name}_b")
    if a is None or b is None:
        raise ValueError(f"The file has {sorted(tensors)} alone for {module.name!r}.")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != len(b):
        raise misfit(module, dict(tensors))
    return LowRank(jnp.asarray(a), jnp.asarray(b.T))

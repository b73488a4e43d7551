"""When the ranks of dense weights have settled, so that training can go on in factors."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..._matrices import Where, choose
from .rank import stable_rank


# Slopes that are allowed, over ``tol``, once so few layers have not settled.
_RELAXED = {1: 5.0, 2: 2.5}
_POINTS = 11


@dataclasses.dataclass(frozen=True)
class SettledRanks:
    """Watches stable ranks in training and says when, and at which ranks, to factorize.

    On the host, between epochs: ``watch = watch.observe(params)``. The series of the
    stable ranks of a layer is smoothed, ``s ← s + 2/(window + 1) · (rank − s)``; the layer
    has settled once the mean size of the last eleven slopes of ``s`` is at most ``tol``.
    If one layer is left 5 ``tol`` will do, if two are 2.5 ``tol``. A layer that has
    settled stays so. The rank of a layer is its stable rank times what the full rank was
    in stable ranks at the start, rounded up.

    Once all have settled, ``nn.factorize(model, rank=watch.ranks)`` is the switch, for
    which the optimizer state is made anew; :func:`lrjax.add_frobenius_decay` goes on where
    weight decay was. Departure from the published code: stable ranks are not rounded.

    Attributes:
        series: ``{path: stable ranks}``, at the start and at each observation.
        full: ``{path: min(m, n)}``.
        settled: the paths that have settled.
        window: of the smoothing, in observations.
        tol: the slope of a settled rank, in ranks an observation.
        first: observations before which nothing settles.
        where: which leaves, and which axes are rows; see :meth:`of`.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(16, 4, 32, 2, key=jax.random.key(0))
        >>> watch = lrjax.metrics.SettledRanks.of(model, window=2, first=11)
        >>> for epoch in range(11):  # nothing is trained, so nothing moves
        ...     watch = watch.observe(model)
        >>> if watch.all_settled:
        ...     small, report = lrjax.nn.factorize(model, rank=watch.ranks)
        >>> watch.ranks
        {'layers.0': 16, 'layers.1': 32}

    Reference:
        H. Wang et al., "Cuttlefish: low-rank model training without all the tuning" (2023),
        arXiv 2305.02538.
    """

    series: Mapping[str, tuple[float, ...]]
    full: Mapping[str, int]
    settled: frozenset[str] = frozenset()
    window: int = 15
    tol: float = 0.1
    first: int = 15
    where: Where | None = None

    @classmethod
    def of(
        cls,
        params: PyTree,
        *,
        window: int = 15,
        tol: float = 0.1,
        first: int = 15,
        where: Where | None = None,
    ) -> "SettledRanks":
        """A watch of a model, or of its parameters, before training.

        Args:
            params: the model; a leaf of it is called by its path.
            window: of the smoothing, in observations.
            tol: the slope of a settled rank, in ranks an observation.
            first: observations before which nothing settles.
            where: which leaves, and which axes are rows, as of
                :func:`lrjax.project_updates`: by default matrices but embeddings and heads.
                Of a stack the largest rank counts.

        Returns:
            The watch.

        Raises:
            ValueError: if ``where`` chooses no leaf, or one that is no matrix; for a window
                below 1.
        """
        if window < 1:
            raise ValueError(f"SettledRanks needs a window of at least 1, got {window}.")
        ranks, full = _stable_ranks(params, where)
        series = {path: (rank,) for path, rank in ranks.items()}
        return cls(series, full, frozenset(), window, tol, first, where)

    def observe(self, params: PyTree) -> "SettledRanks":
        """With the ranks of the parameters as they are now: after an epoch, say."""
        ranks, _ = _stable_ranks(params, self.where)
        series = {path: (*old, ranks[path]) for path, old in self.series.items()}
        waiting = [path for path in series if path not in self.settled]
        tol = self.tol * _RELAXED.get(len(waiting), 1.0)
        observed = max(map(len, series.values()), default=1) - 1
        now = {
            path
            for path in waiting
            if observed >= max(self.first, 1) and self._slope(series[path]) <= tol
        }
        return dataclasses.replace(self, series=series, settled=self.settled | now)

    def _slope(self, series: tuple[float, ...]) -> float:
        smooth, level = [], series[0]
        for rank in series:
            level += 2 / (self.window + 1) * (rank - level)
            smooth.append(level)
        return float(np.mean(np.abs(np.gradient(smooth)[-_POINTS:])))

    @property
    def all_settled(self) -> bool:
        """Whether every layer has."""
        return self.settled == set(self.series)

    @property
    def ranks(self) -> dict[str, int]:
        """``{path of the layer: rank}``, for ``nn.factorize(model, rank=…)``."""
        return {
            path.removesuffix(".weight"): _scaled(self.full[path], ranks[0], ranks[-1])
            for path, ranks in self.series.items()
        }


def _scaled(full: int, start: float, now: float) -> int:
    """The share of the full rank that the stable rank has of its start."""
    share = now / start if start > 0 else 1.0
    # Rounding must not make 20 a 21.
    return max(1, min(full, math.ceil(full * share * (1 - 1e-5))))


def _stable_ranks(params: PyTree, where: Any) -> tuple[dict[str, float], dict[str, int]]:
    arrays = eqx.filter(params, eqx.is_inexact_array)
    leaves, values, _ = choose("SettledRanks", arrays, where)
    ranks, full = {}, {}
    for leaf, x in zip(leaves, values, strict=True):
        if leaf is not None:
            ranks[leaf.path] = float(jnp.max(stable_rank(leaf.view(x))))
            full[leaf.path] = min(leaf.sides)
    return ranks, full

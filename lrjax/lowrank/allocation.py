"""From the singular values of many layers to their ranks: on the host, as numbers."""

import bisect
import heapq
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike


def parameter_count(shape: tuple[int, ...], rank: int | tuple[int, ...]) -> int:
    """How many numbers a factorized matrix or tensor holds.

    A pair of factors has ``r (m + n)``. A Tucker form has ``Π r_k + Σ n_k r_k``, and so
    has a matrix with a core, :class:`SVDForm`, whose ranks are ``(r, r)``.

    Args:
        shape: ``(*batch, m, n)``, or ``(*batch, n_1, …, n_d)`` for d ranks.
        rank: one for a pair, or one for each axis.

    Returns:
        The count of the whole stack.

    Raises:
        ValueError: for fewer axes than there are ranks.

    Example:
        >>> from lrjax.lowrank import parameter_count
        >>> parameter_count((100, 50), 8), parameter_count((100, 50), (8, 8))
        (1200, 1264)
    """
    ranks = (rank,) if isinstance(rank, int) else rank
    axes = 2 if isinstance(rank, int) else len(ranks)
    if len(shape) < axes:
        raise ValueError(f"parameter_count needs {axes} axes for {rank}, got {shape}.")
    batch, sides = math.prod(shape[:-axes]), shape[-axes:]
    if isinstance(rank, int):
        return batch * rank * sum(sides)
    factors = sum(n * r for n, r in zip(sides, ranks, strict=True))
    return batch * (math.prod(ranks) + factors)


def energy_ranks(spectra: Mapping[str, ArrayLike], energy: float) -> dict[str, int]:
    """For each matrix the fewest singular values that hold a share of its energy ``Σσ²``.

    Args:
        spectra: ``{path: singular values (*batch, k)}``; matrices of a stack share a rank,
            by the sum of their energies.
        energy: the share, in (0, 1].

    Returns:
        ``{path: rank}``, each at least 1.

    Raises:
        ValueError: for a share out of range, or a spectrum that is no finite array.

    Example:
        >>> from lrjax.lowrank import energy_ranks
        >>> energy_ranks({"query": [3.0, 1.0, 0.1], "value": [1.0, 1.0, 1.0]}, 0.8)
        {'query': 1, 'value': 3}

    Reference:
        Y. Xu et al., "TRP: trained rank pruning for efficient deep neural networks"
        (2020), arXiv 2004.14566.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}.")
    ranks = {}
    for path, spectrum in spectra.items():
        tails = energies_left(path, spectrum)
        # A rest below the rounding of the whole is none, even where all of it is asked for.
        allowed = max(1 - energy, np.finfo(float).eps) * tails[0]
        ranks[path] = max(int(np.sum(tails > allowed)), 1)
    return ranks


def knapsack_ranks(
    spectra: Mapping[str, ArrayLike],
    shapes: Mapping[str, tuple[int, ...]],
    budget: int,
    *,
    least: int = 1,
) -> dict[str, int]:
    """Ranks of the least total error ``Σ_layers Σ_{i>r} σ_i²`` within a budget.

    Parameters are spent step by step, each where it takes away most error for each of
    them: on the next singular value of a layer, ``σ²/(m + n)``, or on all that it lacks,
    ``Σ_{i>r} σ_i² / (mn − r(m + n))``, which is the dense form. It is one of the choices
    because beyond ``mn/(m + n)`` it costs less than factors. Up to the first step that does
    not fit, nothing of the same cost has a smaller error; those that still fit follow. So
    the error exceeds the least one at most by what that step would have taken away.

    Errors count as they are given: multiply a spectrum to weigh a layer.

    Args:
        spectra: ``{path: singular values (*batch, min(m, n))}``; matrices of a stack share
            a rank.
        shapes: ``{path: (*batch, m, n)}``.
        budget: how many parameters all of these layers may have.
        least: the smallest rank of a layer; 0 for a change that may be left away.

    Returns:
        ``{path: rank}`` of the layers in factors. Those left out stay dense.

    Raises:
        ValueError: for a budget in which not every layer has the least rank, or spectra
            that do not belong to the shapes.

    Example:
        >>> from lrjax.lowrank import knapsack_ranks
        >>> spectra = {"flat": [2.0] * 8, "steep": [8.0] + [0.1] * 7}
        >>> shapes = {"flat": (8, 8), "steep": (8, 8)}
        >>> knapsack_ranks(spectra, shapes, 64)
        {'flat': 3, 'steep': 1}
        >>> knapsack_ranks(spectra, shapes, 80)
        {'steep': 1}

    Reference:
        S. Ryu, S. Seo, J. Yoo, "Efficient storage of fine-tuned models via low-rank
        approximation of weight residuals" (2023), arXiv 2305.18425. Special case: with
        equal shapes and no room for a dense form it sorts all singular values.
    """
    layers = _layers("knapsack_ranks", spectra, shapes, least)
    left = budget - sum(layer.cost(layer.rank) for layer in layers.values())
    if left < 0:
        raise ValueError(
            f"knapsack_ranks got a budget of {budget} parameters; rank {least} in every "
            f"layer takes {budget - left}."
        )
    queue = [(-math.inf, path) for path in layers]
    while queue:
        promised, path = heapq.heappop(queue)
        layer = layers[path]
        gain, rank = layer.best_step(left)
        if gain == -promised:
            left -= layer.cost(rank) - layer.cost(layer.rank)
            layer.rank = rank
            gain, rank = layer.best_step(left)
        # What was promised when more was left may be less now: it stands in line again.
        if rank != layer.rank:
            heapq.heappush(queue, (-gain, path))
    return {path: layer.rank for path, layer in layers.items() if not layer.is_dense()}


def penalized_ranks(
    spectra: Mapping[str, ArrayLike],
    shapes: Mapping[str, tuple[int, ...]],
    rank_weight: float,
    *,
    least: int = 1,
) -> dict[str, int]:
    """Ranks of the least error plus a price of every parameter, layer by layer.

    Of every layer ``argmin_r rank_weight · r (m + n) + ½ Σ_{i>r} σ_i²``, or the dense form
    where ``rank_weight · mn`` is less: :func:`lrjax.linalg.penalized_rank` on the host, and
    with that choice. :func:`knapsack_ranks` chooses the same where the budget is what these
    ranks cost. The compression step of learning-compression, ``argmin_r α r(m + n) + μ/2
    Σ_{i>r} σ_i²``, has ``rank_weight = α/μ``.

    Args:
        spectra: ``{path: singular values (*batch, min(m, n))}``; matrices of a stack share
            a rank.
        shapes: ``{path: (*batch, m, n)}``.
        rank_weight: what a parameter costs, not negative.
        least: the smallest rank of a layer.

    Returns:
        ``{path: rank}`` of the layers in factors. Those left out stay dense.

    Raises:
        ValueError: for spectra that do not belong to the shapes.

    Example:
        >>> from lrjax.lowrank import penalized_ranks
        >>> spectra, shapes = {"steep": [8.0] + [0.1] * 7}, {"steep": (8, 8)}
        >>> [penalized_ranks(spectra, shapes, p) for p in (0.01, 0.0)]
        [{'steep': 1}, {}]

    Reference:
        Y. Idelbayev, M. Á. Carreira-Perpiñán, "Low-rank compression of neural nets:
        learning the rank of each layer" (2020), CVPR.
    """
    layers = _layers("penalized_ranks", spectra, shapes, least)
    for layer in layers.values():
        choices = {*range(layer.rank, layer.most + 1), layer.full}
        paid = lambda r, layer=layer: layer.tails[r] / 2 + rank_weight * layer.cost(r)
        layer.rank = min(sorted(choices, reverse=True), key=paid)
    return {path: layer.rank for path, layer in layers.items() if not layer.is_dense()}


def minimax_ranks(
    spectra: Mapping[str, ArrayLike],
    shapes: Mapping[str, tuple[int, ...]],
    budget: int,
) -> dict[str, int]:
    """Ranks that make the largest relative error of a layer, ``σ_{r+1}/σ_1``, least.

    The error is that of the operator norm, which bounds what any input of a layer loses.
    All layers are cut at one level ``ε``, the least that the budget allows; a layer whose
    factors would not save anything stays dense.

    Args:
        spectra: ``{path: singular values (*batch, min(m, n))}``; of a stack the largest
            error counts.
        shapes: ``{path: (*batch, m, n)}``.
        budget: how many parameters all of these layers may have.

    Returns:
        ``{path: rank}`` of the layers in factors. Those left out stay dense.

    Raises:
        ValueError: for a budget in which not every layer has rank 1, or spectra that do
            not belong to the shapes.

    Example:
        >>> from lrjax.lowrank import minimax_ranks
        >>> spectra = {"flat": [2.0] * 8, "steep": [0.5**k for k in range(8)]}
        >>> minimax_ranks(spectra, {"flat": (8, 8), "steep": (8, 8)}, 110)
        {'steep': 2}

    Reference:
        L. Liebenwein, A. Maalouf, O. Gal, D. Feldman, D. Rus, "Compressing neural networks:
        towards determining the optimal layer-wise decomposition" (2021), arXiv 2107.11442.
    """
    layers = _layers("minimax_ranks", spectra, shapes, 1)
    levels = sorted({x for layer in layers.values() for x in layer.errors}, reverse=True)
    cost = lambda level: sum(layer.cost(layer.above(level)) for layer in layers.values())
    first = bisect.bisect_right(levels, budget, key=cost) - 1
    if first < 0:
        raise ValueError(
            f"minimax_ranks got a budget of {budget} parameters; rank 1 in every layer "
            f"takes {cost(levels[0])}."
        )
    for layer in layers.values():
        layer.rank = layer.above(levels[first])
    return {path: layer.rank for path, layer in layers.items() if not layer.is_dense()}


def _layers(
    function: str,
    spectra: Mapping[str, ArrayLike],
    shapes: Mapping[str, tuple[int, ...]],
    least: int,
) -> dict[str, "_Layer"]:
    if spectra.keys() != shapes.keys():
        raise ValueError(
            f"{function} needs a shape for each spectrum: "
            f"{sorted(spectra.keys() ^ shapes.keys())} are in one of the two alone."
        )
    return {path: _Layer(path, spectra[path], shapes[path], least) for path in spectra}


class _Layer:
    """The choices of one layer: a rank below the break-even, or the dense form."""

    def __init__(self, path: str, spectrum: ArrayLike, shape: tuple[int, ...], least: int):
        self.full = min(shape[-2:])
        if np.shape(spectrum) != (*shape[:-2], self.full):
            raise ValueError(
                f"The spectrum at {path!r} has shape {np.shape(spectrum)}; a matrix of "
                f"shape {shape} has {(*shape[:-2], self.full)} singular values."
            )
        self.tails: list[float] = energies_left(path, spectrum).tolist()
        values = np.sort(np.asarray(spectrum, np.float64), axis=-1)[..., ::-1]
        relative = values / np.maximum(values[..., :1], np.finfo(float).tiny)
        # By rank 1, 2, …: the largest error of a stack.
        self.errors: list[float] = [
            *relative.reshape(-1, self.full).max(0)[1:].tolist(),
            0.0,
        ]
        self.each, self.dense = parameter_count(shape, 1), math.prod(shape)
        self.most = (self.dense - 1) // self.each  # the largest rank that saves anything
        self.rank = least if least <= self.most else self.full

    def is_dense(self) -> bool:
        return self.rank > self.most

    def cost(self, rank: int) -> int:
        return rank * self.each if rank <= self.most else self.dense

    def above(self, level: float) -> int:
        """The smallest rank whose error is no larger, or that of the dense form."""
        rank = 1 + sum(error > level for error in self.errors)
        return rank if rank <= self.most else self.full

    def best_step(self, left: int) -> tuple[float, int]:
        """What the best step that fits takes away for each parameter, and its rank."""
        best = (0.0, self.rank)
        for rank in {min(self.rank + 1, self.full), self.full}:
            cost = self.cost(rank) - self.cost(self.rank)
            if 0 < cost <= left and (rank <= self.most or rank == self.full):
                gain = (self.tails[self.rank] - self.tails[rank]) / cost
                best = max(best, (gain, rank), key=lambda step: step[0])
        return best


def energies_left(path: str, spectrum: ArrayLike) -> np.ndarray:
    """What ranks 0, 1, … leave of the energy of a stack, summed from the small end."""
    values = np.asarray(spectrum, np.float64)
    if values.ndim < 1 or not np.all(np.isfinite(values)):
        raise ValueError(
            f"The spectrum at {path!r} has to be an array of finite singular values, got "
            f"shape {values.shape}{' with others among them' if values.ndim else ''}."
        )
    squares = np.sort(values**2, axis=-1).reshape(-1, values.shape[-1]).sum(0)
    return np.append(np.cumsum(squares)[::-1], 0.0)

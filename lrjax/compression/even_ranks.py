"""Ranks within a budget that treat all layers alike, for the ``allocate=`` of a cut."""

from collections.abc import Mapping
from math import prod

from numpy.typing import ArrayLike

from ..lowrank import energy_ranks, parameter_count


def uniform_ranks(
    spectra: Mapping[str, ArrayLike], shapes: Mapping[str, tuple[int, ...]], budget: int
) -> dict[str, int]:
    """The same share of its numbers for every layer, whatever its spectrum.

    ``r = ⌊share · m n / (m + n)⌋`` with the share that the budget is of all numbers.

    Args:
        spectra: not used.
        shapes: ``{path: (*batch, m, n)}``.
        budget: how many numbers all of these layers may have.

    Returns:
        ``{path: rank}``, each at least 1.

    Raises:
        ValueError: for a budget in which not every layer has rank 1.

    Example:
        >>> from lrjax.compression import uniform_ranks
        >>> uniform_ranks({}, {"wide": (64, 64), "thin": (64, 16)}, 2560)
        {'wide': 16, 'thin': 6}

    Reference:
        Y. Guo, G. Wang, M. Kankanhalli, "PELA: learning parameter-efficient models with
        low-rank approximation" (2023), arXiv 2310.10700.
    """
    del spectra
    share = budget / sum(map(prod, shapes.values()))
    each = lambda shape: int(share * prod(shape)) // parameter_count(shape, 1)
    ranks = {path: max(each(shape), 1) for path, shape in shapes.items()}
    _check_fits("uniform_ranks", ranks, shapes, budget)
    return ranks


def common_energy_ranks(
    spectra: Mapping[str, ArrayLike], shapes: Mapping[str, tuple[int, ...]], budget: int
) -> dict[str, int]:
    """The largest share of energy that all layers can keep alike within a budget.

    :func:`~lrjax.lowrank.energy_ranks`, the share found by bisection. A layer whose factors
    would be no smaller is left out and stays dense.

    Args:
        spectra: ``{path: singular values (*batch, min(m, n))}``.
        shapes: ``{path: (*batch, m, n)}``.
        budget: how many numbers all of these layers may have.

    Returns:
        ``{path: rank}`` of the layers in factors.

    Raises:
        ValueError: for a budget in which not every layer has rank 1.

    Example:
        >>> from lrjax.compression import common_energy_ranks
        >>> spectra = {"flat": [1.0] * 8, "steep": [2.0 ** -i for i in range(8)]}
        >>> common_energy_ranks(spectra, {"flat": (8, 8), "steep": (8, 8)}, 64)
        {'flat': 3, 'steep': 1}
    """
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        fits = _cost(energy_ranks(spectra, middle), shapes) <= budget
        low, high = (middle, high) if fits else (low, middle)
    ranks = energy_ranks(spectra, low or high)
    _check_fits("common_energy_ranks", ranks, shapes, budget)
    saves = lambda path: parameter_count(shapes[path], ranks[path]) < prod(shapes[path])
    return {path: rank for path, rank in ranks.items() if saves(path)}


def _cost(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> int:
    of = lambda path: min(parameter_count(shapes[path], ranks[path]), prod(shapes[path]))
    return sum(map(of, shapes))


def _check_fits(name: str, ranks: Mapping, shapes: Mapping, budget: int) -> None:
    if (cost := _cost(ranks, shapes)) > budget:
        raise ValueError(
            f"{name} got a budget of {budget} numbers; rank 1 in every layer takes {cost}."
        )

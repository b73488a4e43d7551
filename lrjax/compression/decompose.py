import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree

from .._sites import InputStatistic, Site, flat_leaves, refusals
from ..linalg import times
from ..lowrank import energy_ranks, knapsack_ranks
from ..nn import FactorReport
from ._parts import Cut, Method, Part, part_of, replaced, row_of
from .statistics import layers_of


Allocate = Callable[
    [Mapping[str, Any], Mapping[str, tuple[int, ...]], int], Mapping[str, int]
]
_UNSEEN = "its inputs were not seen"


class Decomposition:
    """All weights of a model as sums of terms, to be cut to any size.

    Made by :func:`~lrjax.compression.decompose`.

    Attributes:
        model: as it was.
        parts: by path the matrices and their :class:`~lrjax.compression.WeightedFactors`.
        kept: by path why a layer is left as it is.
    """

    def __init__(self, model: PyTree, parts: dict[str, Part], kept: dict[str, str]):
        self.model, self.parts, self.kept = model, parts, kept

    @property
    def spectra(self) -> dict[str, Array]:
        """By path the weighed singular values ``(*b, min(m, n))``, comparable."""
        return {path: part.spectrum for path, part in self.parts.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By path the shape of the matrices ``(*b, m, n)``."""
        return {path: part.matrix.shape for path, part in self.parts.items()}

    def cut(
        self,
        *,
        budget: int | float | None = None,
        energy: float | None = None,
        allocate: Allocate = knapsack_ranks,
    ) -> tuple[PyTree, FactorReport]:
        """The model with the leading terms of each weight.

        Args:
            budget: how many numbers the whole model may have; as a float, which share of
                those that it has.
            energy: in place of a budget the share of its weighed energy that each layer
                keeps, in (0, 1].
            allocate: ``(spectra, shapes, budget) -> ranks`` by path. Layers that it leaves
                out stay dense.

        Returns:
            The model and a report, as of :func:`~lrjax.compression.compress`.

        Raises:
            ValueError: unless one of budget and energy is given, or if the budget is out of
                reach.
        """
        _check_size(budget, energy)
        cuts = self._by_budget(budget, allocate) if energy is None else self._by(energy)
        new, rows = {}, []
        for path, site in layers_of(self.model).items():
            part = self.parts.get(path)
            row, own = row_of(site, part, cuts.get(path), self.kept.get(path))
            rows.append(row)
            if own is not None:
                new[path] = replaced(site, own)
        leaves, treedef = flat_leaves(self.model)
        small = treedef.unflatten([new.get(path, leaf) for path, leaf in leaves])
        return small, FactorReport(tuple(rows), _size(self.model), _size(small))

    def _by_budget(self, budget: Any, allocate: Allocate) -> dict[str, Cut]:
        """What is kept of every layer; those that are missing stay dense."""
        total, shapes = _size(self.model), self.shapes
        budget = int(budget * total) if isinstance(budget, float) else budget
        if any(part.factors.principal is not None for part in self.parts.values()):
            raise ValueError(
                'method="projections" finds ranks by energy=, as many directions of the '
                'inputs and of the outputs as hold it; within a budget method="inputs" '
                "has a smaller error."
            )
        left = budget - (total - sum(map(math.prod, shapes.values())))
        if budget < total:
            sites = layers_of(self.model)
            left -= sum(_new_bias(sites[path], part) for path, part in self.parts.items())
        spectra = {path: np.asarray(values) for path, values in self.spectra.items()}
        return {path: Cut(rank) for path, rank in allocate(spectra, shapes, left).items()}

    def _by(self, energy: float) -> dict[str, Cut]:
        ranks = energy_ranks(jax.tree.map(np.asarray, self.spectra), energy)
        principal = {
            path: np.asarray(_deviations(part.inputs, part.factors.principal))
            for path, part in self.parts.items()
            if part.factors.principal is not None
        }
        of_inputs = energy_ranks(principal, energy)
        return {path: Cut(rank, of_inputs.get(path)) for path, rank in ranks.items()}


def decompose(
    model: PyTree,
    statistics: Mapping[str, InputStatistic],
    *,
    method: Method = "sensitivity",
    damping: ArrayLike = 1e-2,
) -> Decomposition:
    """The factors of all weights of a model, to be cut to several sizes.

    :func:`~lrjax.compression.compress` in two steps. The decompositions are what takes
    time; a cut is a matter of slices.

    Args:
        model: the module.
        statistics: of its layers, from :func:`~lrjax.compression.layer_statistics`.
        method: what errors are weighed by, see :func:`~lrjax.compression.compress`.
        damping: added to the diagonals of the second moments, relative to their means.

    Returns:
        A :class:`Decomposition`.

    Raises:
        ValueError: for a method that is none, or statistics that are of another model or
            lack what the method needs.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> from lrjax.compression import decompose, layer_statistics
        >>> model = eqx.nn.MLP(32, 8, 64, 2, key=jax.random.key(0))
        >>> batches = jax.random.normal(jax.random.key(1), (4, 100, 32))
        >>> parts = decompose(model, layer_statistics(model, batches))
        >>> [parts.cut(budget=share)[1].ratio <= share for share in (0.25, 0.5)]
        [True, True]
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}.")
    sites, parts = layers_of(model), {}
    for path, statistic in statistics.items():
        if path not in sites or statistic.total.shape != (
            *sites[path].stack,
            sites[path].shape[1],
        ):
            raise ValueError(
                f"The statistics at {path!r} are of no layer of this model with so many "
                "inputs."
            )
        if method == "sensitivity" and statistic.sensitivity is None:
            raise ValueError(
                f"The statistics at {path!r} hold no sensitivity: sum it, or take another "
                "method."
            )
        parts[path] = part_of(sites[path], statistic, method, damping)
    refused = refusals(model, sites, named=False)
    kept = {path: refused.get(path, _UNSEEN) for path in sites if path not in parts}
    return Decomposition(model, parts, kept)


def _check_size(budget: Any, energy: Any) -> None:
    if (budget is None) == (energy is None):
        raise ValueError(
            f"the size takes one of budget= and energy=; got budget={budget}, "
            f"energy={energy}."
        )
    if isinstance(budget, float) and not 0 < budget <= 1:
        raise ValueError(
            f"a budget as a float is a share of the model, in (0, 1]; got {budget}. The "
            "number of parameters is an integer."
        )


def _new_bias(site: Site, part: Part) -> int:
    """How many numbers a layer is to have for a bias that it had not."""
    more = part.mean is not None and site.bias is None
    return math.prod(part.matrix.shape[:-1]) if more else 0


@jax.jit
def _deviations(moment: Array, basis: Array) -> Array:
    """Of the inputs, the roots of the mean squares along some directions."""
    return jnp.sqrt(jnp.maximum(jnp.sum(basis * times(moment, basis), axis=-2), 0))


def _size(tree: PyTree) -> int:
    """How many floating-point numbers a tree holds."""
    return sum(x.size for x in jax.tree.leaves(tree) if eqx.is_inexact_array(x))

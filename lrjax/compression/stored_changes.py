"""A fine-tuned model as what it changed: factors beside the model that it was made of."""

import functools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .._sites import Site, dense_array, find_sites, flat_leaves
from ..linalg import TruncatedSVD, truncated_svd, working_dtype
from ..lowrank import energy_ranks, knapsack_ranks, parameter_count
from ..nn import FactorReport, LayerFactors


class StoredChange(eqx.Module):
    """What fine-tuning added to one weight: ``Δ = leftᵀ right``, or a dense array.

    Attributes:
        left: ``(*b, r, m)``, perhaps quantized; ``None`` for a change that is not stored in
            factors.
        right: ``(*b, r, n)``, likewise.
        dense: the change of a weight that stays dense, or ``None``.
        bias: the change of a bias, or ``None``.
    """

    left: Any = None
    right: Any = None
    dense: Array | None = None
    bias: Array | None = None

    def matrix(self) -> Array | None:
        """``Δ``; ``None`` where nothing is stored."""
        if self.left is None:
            return self.dense
        return dense_array(self.left).mT @ dense_array(self.right)


def store_change(
    fine_tuned: PyTree,
    base: PyTree,
    *,
    budget: int | float | None = None,
    energy: float | None = None,
    codec: Callable[[Array], Any] | None = None,
) -> tuple[dict[str, StoredChange], FactorReport]:
    """A fine-tuned model as low-rank changes of the one before it, and what that loses.

    Of every weight ``Δ = W_ft − W_0``, which has fewer directions than the weight itself,
    the best approximation of a rank is kept; biases and other vectors are kept whole, and
    weights that did not change not at all. Within a budget the ranks take the least total
    error ``Σ ‖Δ − Δ_r‖²``: weights that changed little may be left away, and changes of
    full rank stay dense. :func:`restore_change` puts a model together from both; save the
    change as any other tree of arrays.

    Args:
        fine_tuned: the model after fine-tuning.
        base: the same model before it.
        budget: how many numbers the changes of matrices may have in all; as a float, which
            share of the numbers of those that changed.
        energy: in place of a budget the share of ``‖Δ‖²`` that each matrix keeps.
        codec: what both factors are stored by, ``lrjax.adapters.Int8()``: it takes an array
            with one factor column in each row. The counts are of numbers, not of bytes.

    Returns:
        ``{path: change}`` of all that changed, and a report with a line for each matrix:
        its rank, its size, and ``‖Δ − Δ_r‖/‖Δ‖`` of what is stored.

    Raises:
        ValueError: unless one of budget and energy is given, or if the models differ in
            structure or shapes.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> base = eqx.nn.Linear(16, 16, key=jax.random.key(0))
        >>> tuned = eqx.tree_at(lambda m: m.weight, base, base.weight.at[:, :2].add(1.0))
        >>> change, report = lrjax.compression.store_change(tuned, base, energy=0.99)
        >>> report.layers[0].rank, report.layers[0].error < 1e-3
        (1, True)
        >>> again = lrjax.compression.restore_change(base, change)
        >>> bool(abs(again.weight - tuned.weight).max() < 1e-4)
        True

    Reference:
        S. Ryu, S. Seo, J. Yoo, "Efficient storage of fine-tuned models via low-rank
        approximation of weight residuals" (2023), arXiv 2305.18425.
    """
    if (budget is None) == (energy is None):
        raise ValueError(
            f"store_change takes one of budget= and energy=; got budget={budget}, "
            f"energy={energy}."
        )
    old, new = find_sites(base), find_sites(fine_tuned)
    _check_alike(old, new)
    weights = {path: _weight(new[path]) - _weight(site) for path, site in old.items()}
    biases = {
        path: _bias_change(new[path].bias, site.bias)
        for path, site in old.items()
        if site.bias is not None
    }
    weights = {path: w for path, w in weights.items() if np.any(w != 0)}
    found = {path: _decomposed(w) for path, w in weights.items() if w.ndim > 1}
    spectra = {path: np.asarray(one.values) for path, one in found.items()}
    shapes = {path: weights[path].shape for path in found}
    ranks = _ranks(spectra, shapes, budget, energy)
    stored: dict[str, StoredChange] = {}
    rows = []
    for path, w in weights.items():
        stored[path] = _stored(w, found.get(path), ranks.get(path), codec)
        if w.ndim > 1:
            rows.append(_row(path, w, stored[path], ranks.get(path)))
    for path, bias in biases.items():
        if np.any(bias != 0):
            own = stored.get(path, StoredChange())
            stored[path] = StoredChange(own.left, own.right, own.dense, bias)
    stored = {path: own for path, own in stored.items() if jax.tree.leaves(own)}
    vectors = sum(w.size for w in weights.values() if w.ndim == 1)
    vectors += sum(own.bias.size for own in stored.values() if own.bias is not None)
    before = sum(w.size for w in weights.values() if w.ndim > 1)
    after = sum(row.after for row in rows)
    return stored, FactorReport(tuple(rows), before + vectors, after + vectors)


def restore_change(base: PyTree, change: dict[str, StoredChange]) -> PyTree:
    """The model that a stored change makes of another one.

    Args:
        base: the model that the change was taken from.
        change: of :func:`store_change`.

    Returns:
        A model like ``base``, in its dtypes.

    Raises:
        ValueError: for paths that the model does not have.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> base, tuned = {"w": jnp.eye(2)}, {"w": jnp.ones((2, 2))}
        >>> change, _ = lrjax.compression.store_change(tuned, base, energy=1.0)
        >>> print(lrjax.compression.restore_change(base, change)["w"].round(4))
        [[1. 1.]
         [1. 1.]]
    """
    sites = find_sites(base)
    if unknown := sorted(change.keys() - sites.keys()):
        raise ValueError(f"the change is of another model: {unknown} are not in this one.")
    new = {path: _with(sites[path], own) for path, own in change.items()}
    leaves, treedef = flat_leaves(base)
    return treedef.unflatten([new.get(path, leaf) for path, leaf in leaves])


def _check_alike(old: dict[str, Site], new: dict[str, Site]) -> None:
    arrays = lambda site: jax.tree.leaves(eqx.filter(site.layer, eqx.is_array))
    of = lambda sites: {path: [x.shape for x in arrays(s)] for path, s in sites.items()}
    before, after = of(old), of(new)
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            raise ValueError(
                f"store_change needs one model before and after; {path or 'the root'} has "
                f"arrays {before.get(path)} in the base and {after.get(path)} in the other."
            )


def _weight(site: Site) -> Array:
    """The matrices of a layer; an array as it is."""
    plain = site.kind in ("array", "vector")
    weight = dense_array(site.layer) if plain else site.matrix()
    return weight.astype(working_dtype(weight.dtype))


def _bias_change(new: Any, old: Any) -> Array:
    dtype = working_dtype(old.dtype)
    return new.astype(dtype) - old.astype(dtype)


def _stored(
    weight: Array, found: TruncatedSVD | None, rank: int | None, codec: Any
) -> StoredChange:
    if rank == 0:
        return StoredChange()
    if found is None or rank is None or _saves_nothing(weight.shape, rank):
        return StoredChange(dense=weight)
    factors = _factors(found, rank)
    return StoredChange(*(factors if codec is None else map(codec, factors)))


# Layers of one shape are one program.
@jax.jit
def _decomposed(weight: Array) -> TruncatedSVD:
    return truncated_svd(weight, min(weight.shape[-2:]))


@functools.partial(jax.jit, static_argnums=1)
def _factors(found: TruncatedSVD, rank: int) -> tuple[Array, Array]:
    root = jnp.sqrt(found.values[..., :rank])[..., None, :]
    return (found.left[..., :rank] * root).mT, (found.right[..., :rank] * root).mT


@eqx.filter_jit
def _error(weight: Array, own: StoredChange) -> Array:
    """What is lost of a change, relative to all of it."""
    kept = own.matrix()
    lost = weight if kept is None else weight - kept
    return jnp.linalg.norm(lost.ravel()) / jnp.linalg.norm(weight.ravel())


def _ranks(spectra: Any, shapes: Any, budget: Any, energy: Any) -> dict[str, int]:
    if energy is not None:
        return energy_ranks(spectra, energy)
    if isinstance(budget, float):
        budget = int(budget * sum(map(math.prod, shapes.values())))
    return knapsack_ranks(spectra, shapes, budget, least=0)


def _saves_nothing(shape: tuple[int, ...], rank: int) -> bool:
    return parameter_count(shape, rank) >= math.prod(shape)


def _row(path: str, weight: Array, own: StoredChange, rank: int | None) -> LayerFactors:
    error = float(_error(weight, own))
    if own.dense is not None:
        reason = "factors would have no fewer numbers, or the budget has room"
        return LayerFactors(
            path, weight.shape, None, weight.size, weight.size, error, reason
        )
    after = parameter_count(weight.shape, rank or 0)
    return LayerFactors(path, weight.shape, rank, weight.size, after, error, None)


def _with(site: Site, own: StoredChange) -> Any:
    change, weight = own.matrix(), _weight(site)
    weight = weight if change is None else weight + change
    if site.kind in ("array", "vector"):
        return weight.astype(site.layer.dtype)
    bias = site.bias
    if bias is not None and own.bias is not None:
        bias = (bias + own.bias).astype(bias.dtype)
    return site.put(weight, bias)

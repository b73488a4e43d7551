import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, PyTree

from .._matrices import resolve_rank
from .._sites import (
    Site,
    Where,
    check_used_once,
    find_sites,
    flat_leaves,
    pick,
    refusals,
)
from ..linalg import TruncatedSVD, truncated_svd
from ..lowrank import energy_ranks, knapsack_ranks, parameter_count
from .layers import Form, Scheme, check_form, fold_kernel, node_of, taps_of_outputs
from .replace_weight import replace_weight
from .report import FactorReport, LayerFactors


LayerRank = int | float | Mapping[str, int] | Callable[[str, Array], int]


def factorize(
    model: PyTree,
    *,
    rank: LayerRank | None = None,
    energy: float | None = None,
    budget: int | float | None = None,
    where: Where = None,
    form: Form = "pair",
    scheme: Scheme = "inputs",
) -> tuple[PyTree, FactorReport]:
    """The model with the weights of its layers in factors, and what was done to each.

    Every chosen ``W`` becomes its best approximation of some rank, ``U_r Σ_r V_rᵀ``, in a
    :class:`LowRankLinear`, :class:`LowRankConv` or :class:`LowRankEmbedding` that is called
    as the layer was. Layers stay dense where factors would have no fewer numbers, ``r (m +
    n) ≥ m n``. The ranks come from one of three rules: given; the fewest singular values
    that hold a share of the energy ``Σσ²`` of their layer; or, for a number of parameters
    in all, those of the least total error.

    Layers are found as by :func:`lrjax.adapt`: inside of ``eqx.nn.MultiheadAttention`` and
    every other module, and stacked ones for ``scan``, whose matrices share a rank. By
    default all ``eqx.nn.Linear`` and ``eqx.nn.Conv`` but heads, embeddings and routers. The
    ranks are decided on the host: call it outside of ``jit``.

    Args:
        model: the module.
        rank: one for all layers, as an integer or as a fraction of the shorter side; a
            dict from paths to ranks, which also chooses the layers if ``where`` does not;
            or a function of path and matrix.
        energy: the share of the energy of each layer, in (0, 1].
        budget: how many numbers the chosen weights may have in all; or, as a float, which
            share of those they have.
        where: which layers, as of :func:`lrjax.adapt`: a function of path and layer, a
            regular expression or a list of names.
        form: ``"pair"`` for a :class:`~lrjax.LowRank`, with the root of the singular values
            in both factors; ``"svd"`` for a :class:`~lrjax.SVDForm`.
        scheme: how the kernels of convolutions are folded, see
            :func:`~lrjax.nn.fold_kernel`.

    Returns:
        The model, and a :class:`FactorReport`; print it.

    Raises:
        ValueError: unless one of rank, energy and budget is given; for a layer that
            ``where`` names and that cannot be factorized: one whose weight is tied or
            quantized, that has a ``__call__`` of its own, or is no such layer.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> model = eqx.nn.MLP(20, 5, 64, 2, key=jax.random.key(0))
        >>> small, report = lrjax.nn.factorize(model, rank=8)
        >>> [(row.path, row.rank) for row in report.layers]
        [('layers.0', 8), ('layers.1', 8), ('layers.2', None)]
        >>> small(jnp.ones(20)).shape, round(report.ratio, 2)
        ((5,), 0.37)

    Reference:
        C. Eckart, G. Young, "The approximation of one matrix by another of lower rank"
        (1936), Psychometrika.
    """
    check_form(form)
    taps_of_outputs(scheme, 1)
    if sum(x is not None for x in (rank, energy, budget)) != 1:
        raise ValueError(
            f"factorize takes one of rank=, energy= and budget=; got rank={rank}, "
            f"energy={energy}, budget={budget}."
        )
    if where is None and isinstance(rank, Mapping):
        where = list(rank)
    sites = pick(find_sites(model), where, kinds=("linear", "conv"))
    reasons = refusals(model, sites, named=where is not None)
    taken = {path: site for path, site in sites.items() if path not in reasons}
    check_used_once(model, taken)
    parts = {path: _decomposed(site, scheme) for path, site in taken.items()}
    ranks = _ranks(parts, rank, energy, budget)
    new, rows = {}, []
    for path, site in sites.items():
        part = parts.get(path)
        row = _row(site, part, ranks.get(path), reasons.get(path), form)
        rows.append(row)
        if part is not None and row.rank is not None:
            node = node_of(part.svd, row.rank, form, site.layer.weight.dtype)
            new[path] = replace_weight(site.layer, node, scheme=scheme)
    leaves, treedef = flat_leaves(model)
    small = treedef.unflatten([new.get(path, leaf) for path, leaf in leaves])
    return small, FactorReport(tuple(rows), _size(model), _size(small))


class _Decomposed(NamedTuple):
    matrix: Array
    svd: TruncatedSVD


def _decomposed(site: Site, scheme: Scheme) -> _Decomposed:
    """The matrices of a layer and their singular value decompositions."""
    matrix = site.layer.weight
    if site.kind == "conv":
        spatial, groups = site.layer.num_spatial_dims, site.layer.groups
        fold = lambda kernel: fold_kernel(kernel, scheme, groups=groups)
        for _ in range(matrix.ndim - spatial - 2):
            fold = jax.vmap(fold)
        matrix = fold(matrix)
    return _Decomposed(matrix, truncated_svd(matrix, min(matrix.shape[-2:])))


def _ranks(
    parts: dict[str, _Decomposed], rank: Any, energy: Any, budget: Any
) -> dict[str, int]:
    """The rank of every layer; those that are missing stay dense."""
    spectra = {path: np.asarray(part.svd.values) for path, part in parts.items()}
    if energy is not None:
        return energy_ranks(spectra, energy)
    if budget is not None:
        shapes = {path: part.matrix.shape for path, part in parts.items()}
        if isinstance(budget, float):
            budget = int(budget * sum(map(math.prod, shapes.values())))
        return knapsack_ranks(spectra, shapes, budget)
    return {path: _given(rank, path, part.matrix) for path, part in parts.items()}


def _given(rank: Any, path: str, matrix: Array) -> int:
    if isinstance(rank, Mapping):
        if path not in rank:
            raise ValueError(
                f"rank= has no entry for {path or 'the root'}: it maps whole paths, as "
                f"written here, to ranks, and has {list(rank)}."
            )
        rank = rank[path]
    elif callable(rank):
        rank = rank(path, matrix)
    return resolve_rank(rank, path, *matrix.shape[-2:])


def _row(
    site: Site, part: _Decomposed | None, rank: int | None, reason: str | None, form: Form
) -> LayerFactors:
    """The line of a layer in the report; it decides whether factors are worth it."""
    path = site.path
    if part is None:
        size = _size(site.layer.weight)
        return LayerFactors(path, site.struct.shape, None, size, size, 0.0, reason)
    shape = part.matrix.shape
    before = math.prod(shape)
    if rank is None:
        reason = "the budget has room for it as it is"
    elif parameter_count(shape, rank) >= before:
        reason = f"factors of rank {rank} would have no fewer numbers"
    if rank is None or reason is not None:
        return LayerFactors(path, shape, None, before, before, 0.0, reason)
    squares = np.square(np.asarray(part.svd.values, np.float64))
    error = math.sqrt(squares[..., rank:].sum() / max(squares.sum(), np.finfo(float).tiny))
    after = parameter_count(shape, rank if form == "pair" else (rank, rank))
    return LayerFactors(path, shape, rank, before, after, error, None)


def _size(tree: PyTree) -> int:
    """How many floating-point numbers a tree holds."""
    return sum(x.size for x in jax.tree.leaves(tree) if eqx.is_inexact_array(x))

import functools
from collections.abc import Mapping

import jax
from jaxtyping import Array, ArrayLike, PyTree

from .._sites import InputStatistic, Site, find_sites
from ..lowrank import LowRank
from ._parts import averages
from .weighted_factors import weighted_factors


def corrections(
    model: PyTree,
    approximate: PyTree,
    statistics: Mapping[str, InputStatistic],
    rank: int | Mapping[str, int],
    *,
    sensitivity: bool = False,
    damping: ArrayLike = 1e-2,
) -> dict[str, LowRank]:
    """What a quantized or pruned model lacks, in factors beside its weights.

    For each layer the ``left rightᵀ`` of a rank that brings ``Ŵ + left rightᵀ`` nearest to
    W in what the layer gives for its inputs, :func:`~lrjax.compression.weighted_factors` of
    the residual ``W − Ŵ``. They are the pairs of adapters, which run beside the weights
    and may be trained on.

    Args:
        model: the exact one.
        approximate: one of the same structure above the layers, of
            :func:`lrjax.adapters.quantize`, say, or with entries set to zero.
        statistics: of the layers to correct, from
            :func:`~lrjax.compression.layer_statistics` of the exact model, or
            :func:`lrjax.adapters.activation_statistics` of either: the inputs of the
            approximate one are those that the factors will meet.
        rank: of all layers, or of each by path.
        sensitivity: whether errors are weighed by what they do to the outputs of the model,
            of statistics that hold it.
        damping: added to the diagonals of the second moments, relative to their means.

    Returns:
        ``{path: factors}``, ``(*stack, out, in)``.

    Raises:
        ValueError: for statistics of no layer of both models.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(16, 4, 64, 2, key=jax.random.key(0))
        >>> batches = jax.random.normal(jax.random.key(1), (3, 50, 16))
        >>> small = lrjax.adapters.quantize(model, lrjax.adapters.NF4())
        >>> statistics = lrjax.compression.layer_statistics(model, batches)
        >>> pairs = lrjax.compression.corrections(model, small, statistics, rank=4)
        >>> adapters = lrjax.adapt(small, lrjax.LoRA(4, alpha=4), key=jax.random.key(2))
        >>> put = lambda path, own: eqx.tree_at(lambda own: own.pair, own, pairs[path])
        >>> adapters = lrjax.adapters.map_adapters(put, adapters)
        >>> run = lambda model: jax.vmap(model)(batches[0])
        >>> error = lambda other: float(abs(run(other) - run(model)).mean())
        >>> error(lrjax.bind(small, adapters)) < error(small)
        True

    Reference:
        S.-Y. Liu et al., "EoRA: fine-tuning-free compensation for compressed LLM with
        eigenspace low-rank approximation" (2024), arXiv 2410.21271.
    """
    exact, near = find_sites(model), find_sites(approximate)
    found = {}
    for path, statistic in statistics.items():
        if path not in exact or path not in near:
            raise ValueError(f"There is no layer {path!r} in both models.")
        residual = _residual(exact[path], near[path])
        own = rank[path] if isinstance(rank, Mapping) else min(rank, *residual.shape[-2:])
        found[path] = _correction(residual, statistic, damping, own, sensitivity)
    return found


# Layers of one shape are one program.
@functools.partial(jax.jit, static_argnums=(3, 4))
def _correction(
    residual: Array,
    statistic: InputStatistic,
    damping: ArrayLike,
    rank: int,
    sensitivity: bool,
) -> LowRank:
    inputs, outputs = averages(statistic)
    outputs = outputs if sensitivity else None
    return weighted_factors(residual, inputs, outputs, damping=damping).cut(rank)


def _residual(exact: Site, near: Site):
    if exact.struct.shape != near.struct.shape:
        raise ValueError(
            f"The weights at {exact.path!r} are {exact.struct.shape} and "
            f"{near.struct.shape}: these are not two versions of one model."
        )
    return exact.read() - near.read()

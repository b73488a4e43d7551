"""The matrices of a layer, what is known of their inputs, and what factors make of them."""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._sites import InputStatistic, Site
from ..linalg import nonzero, times
from ..lowrank import LowRank, parameter_count
from ..nn import LayerFactors, replace_weight
from .weighted_factors import WeightedFactors, weighted_factors


Method = Literal["svd", "inputs", "covariance", "projections", "sensitivity"]


class Cut(NamedTuple):
    """How many terms a layer keeps, and on how many directions of its inputs."""

    rank: int
    inputs: int | None = None


class Part(NamedTuple):
    """The matrices of a layer ``(*b, m, n)``, and what is known of its inputs."""

    matrix: Array
    inputs: Array  # the second moment, or its diagonal
    mean: Array | None  # of the inputs, where the bias takes the error that they share
    factors: WeightedFactors
    spectrum: Array  # (*b, min(m, n)), comparable to those of other layers


class Measured(NamedTuple):
    """What some terms of a layer are, and what they lack."""

    pair: LowRank
    shift: Array | None  # (*b, m, 1), of the outputs, that the bias is to make good
    error: Array  # ‖W − X‖², beside ‖W‖²
    weight: Array
    output_error: Array  # the mean square of (W − X) x − shift, beside that of W x
    output: Array


def averages(statistic: InputStatistic) -> tuple[Array, Array | None]:
    """The second moment of the inputs, or its diagonal; and that of the gradients."""
    over = lambda total: total / statistic.count[..., None, None]
    inputs = statistic.mean() if statistic.image is None else over(statistic.image)
    outputs = statistic.sensitivity
    return inputs, None if outputs is None else over(outputs)


def part_of(site: Site, statistic: InputStatistic, method: Method, damping: Any) -> Part:
    """The factors of a layer at full width."""
    groups = getattr(site.layer, "groups", 1)
    return _part(site.read(), statistic, damping, method, groups)


# Layers of one shape are one program.
@functools.partial(jax.jit, static_argnums=(3, 4))
def _part(
    matrix: Array, statistic: InputStatistic, damping: Any, method: Method, groups: int
) -> Part:
    count, mean = statistic.count, statistic.mean()
    inputs, outputs = averages(statistic)
    if groups > 1:
        stack = matrix.shape[:-2]
        matrix = matrix.reshape(*stack, groups, -1, matrix.shape[-1])
        inputs, mean, count = inputs[..., None, :, :], mean[..., None, :], count[..., None]
        outputs = None if outputs is None else _diagonal_blocks(outputs, groups)
    weight, weighing, lookup = matrix, inputs, statistic.image is None
    if method == "covariance" and lookup:
        # The covariance of one-hot inputs is no diagonal: the entries are centred instead.
        weight = matrix - times(matrix, mean[..., None])
    elif method == "covariance":
        weighing = inputs - mean[..., :, None] * mean[..., None, :]
    factors = weighted_factors(
        weight,
        None if method == "svd" else weighing,
        outputs if method == "sensitivity" else None,
        project_inputs=method == "projections" and not lookup,
        damping=damping,
    )
    energy = jnp.sum(factors.values**2, axis=-1)
    importance = count if method == "sensitivity" else 1 / nonzero(energy)
    importance = jnp.broadcast_to(importance, energy.shape)
    spectrum = factors.values * jnp.sqrt(importance)[..., None]
    mean = mean if method == "covariance" else None
    return Part(matrix, inputs, mean, factors, spectrum)


def _diagonal_blocks(x: Array, groups: int) -> Array:
    """``(*b, m, m)`` to ``(*b, groups, m / groups, m / groups)``."""
    size = x.shape[-1] // groups
    blocks = x.reshape(*x.shape[:-2], groups, size, groups, size)
    return jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)


def row_of(
    site: Site, part: Part | None, cut: Cut | None, reason: str | None
) -> tuple[LayerFactors, Measured | None]:
    """The line of a layer in the report, and its factors if they are worth it."""
    if part is None:
        size = sum(x.size for x in jax.tree.leaves(site.layer.weight))
        shape = site.struct.shape
        return LayerFactors(site.path, shape, None, size, size, 0.0, reason), None
    shape, before = part.matrix.shape, math.prod(part.matrix.shape)
    dense = LayerFactors(site.path, shape, None, before, before, 0.0, None, 0.0)
    if cut is None:
        return dense._replace(kept_dense="the budget has room for it as it is"), None
    own = _measured(part, cut)
    after = parameter_count(shape, own.pair.rank)
    if after >= before:
        reason = f"factors of rank {own.pair.rank} would have no fewer numbers"
        return dense._replace(kept_dense=reason), None
    errors = {
        "error": _ratio(own.error, own.weight),
        "output_error": _ratio(own.output_error, own.output),
    }
    return dense._replace(rank=own.pair.rank, after=after, **errors), own


@functools.partial(jax.jit, static_argnums=1)
def _measured(part: Part, cut: Cut) -> Measured:
    pair = part.factors.cut(cut.rank, cut.inputs)
    rest = part.matrix - pair.materialize()
    size = lambda x: jnp.sum(x**2)
    left, shift = _mean_square(rest, part.inputs), None
    if part.mean is not None:
        shift = times(rest, part.mean[..., None])
        left = left - size(shift)
    whole = _mean_square(part.matrix, part.inputs)
    return Measured(pair, shift, size(rest), size(part.matrix), left, whole)


def _mean_square(x: Array, inputs: Array) -> Array:
    """``tr(X C Xᵀ)``, of all matrices together."""
    weighed = x * inputs[..., None, :] if inputs.ndim < x.ndim else times(x, inputs)
    return jnp.sum(weighed * x)


def _ratio(part: Array, whole: Array) -> float:
    """The root of the ratio of two squares."""
    return math.sqrt(max(float(part), 0.0) / float(whole)) if whole else 0.0


def replaced(site: Site, own: Measured) -> Any:
    """The layer of these factors, in the place of the one of the site."""
    bias = site.bias
    if own.shift is not None:
        dtype = site.dtype if bias is None else bias.dtype
        trailing = (1,) * getattr(site.layer, "num_spatial_dims", 0)
        shift = own.shift.reshape(*site.stack, site.shape[0], *trailing).astype(dtype)
        bias = shift if bias is None else bias + shift
    pair = jax.tree.map(lambda x: x.astype(site.dtype), own.pair)
    return replace_weight(site.layer, pair.T if site.kind == "lookup" else pair, bias)

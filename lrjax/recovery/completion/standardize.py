"""Where the observed values lie and how far they spread, of all or column by column."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._median import median_between
from .grouped import Reduce


TO_DEVIATION = 1.4826  # a normal distribution's standard over its median deviation
TIE = 1e-4  # a median deviation below this share of the mean one is one of ties


def center_and_scale(
    values: Float[Array, " count"],
    seen: Bool[Array, " count"],
    cols: Int[Array, " count"],
    n: int,
    *,
    by_column: bool,
    centered: bool,
    robust: bool,
    reduce: Reduce,
) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Center and scale of the values: mean and standard deviation, or medians.

    Both go with the data: those of ``a x + c`` are ``a center + c`` and ``|a| scale``.
    ``c`` is the number of columns, or one. A scale is positive: one where values are equal.
    """
    groups = n if by_column else 1

    def total(x: Array) -> Array:
        x = jnp.where(seen, x, 0)
        summed = jax.ops.segment_sum(x, cols, n) if by_column else jnp.sum(x)[None]
        return reduce(summed)

    spread = lambda c: jnp.take(c, cols, mode="clip") if by_column else c[0]
    one = jnp.ones_like(values)
    count = jnp.maximum(total(one), 1)
    mean = total(values) / count
    # What the first sum lost by rounding.
    mean = mean + total(values - spread(mean)) / count
    center = mean
    if robust:
        center = _medians(values, total, spread, mean, count)
    if not centered:
        center = jnp.zeros(groups, values.dtype)
    away = values - spread(center)
    largest = jnp.sqrt(total(away * away) / count)
    scale = largest
    if robust:
        zero = jnp.zeros_like(mean)
        scale = TO_DEVIATION * _medians(jnp.abs(away), total, spread, zero, count)
        scale = jnp.where(scale > TIE * total(jnp.abs(away)) / count, scale, largest)
    # Equal values spread by their rounding error alone.
    least = 4 * jnp.finfo(values.dtype).eps * jnp.abs(mean)
    return center, jnp.where(scale > least, scale, 1)


def _medians(values: Array, total, spread, start: Array, count: Array) -> Array:
    """The medians of all values, or of each column."""
    # Sums bound the range of the values without a maximum over devices.
    reach = jnp.sqrt(total((values - spread(start)) ** 2) / count) * 1.001
    below = lambda c: total((values <= spread(c)).astype(values.dtype))
    # No median lies farther from the mean than one standard deviation.
    return median_between(start - reach, start + reach, lambda c: below(c) < 0.5 * count)

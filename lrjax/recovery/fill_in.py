"""A first guess of a matrix with outliers and missing entries: medians in their places."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from ._median import median_between


SPREADS = 6.0  # entries further than this many median deviations count as outliers
SAMPLE = 256  # rows that column medians are taken from


def fill_in(
    matrix: Float[Array, "m n"],
    mask: Bool[Array, "m n"] | None,
    trim: ArrayLike | None = None,
) -> Float[Array, "m n"]:
    """The observed matrix with column medians for outliers and missing entries.

    Args:
        matrix: what is observed; anything finite elsewhere.
        mask: where it is observed; ``None`` for everywhere.
        trim: the share of entries that count as outliers, those farthest from their
            medians; by default those beyond six median deviations of the column.
    """
    stride = -(-matrix.shape[0] // SAMPLE)
    sample = matrix[::stride]
    seen = jnp.ones_like(sample, bool) if mask is None else mask[::stride]
    center = _column_medians(sample, seen)
    distance = jnp.abs(matrix - center)
    if trim is None:
        limit = SPREADS * _column_medians(distance[::stride], seen)
    else:
        away = distance if mask is None else jnp.where(mask, distance, jnp.nan)
        limit = jnp.nanquantile(away, 1 - jnp.asarray(trim, matrix.dtype))
    keep = distance <= limit
    if mask is not None:
        keep = keep & mask
    return jnp.where(keep, matrix, center)


def _column_medians(x: Array, seen: Array) -> Array:
    """``(1, n)``: the medians of what is seen of each column, zero if that is nothing."""
    half = 0.5 * jnp.sum(seen, axis=0, keepdims=True)
    is_above = lambda c: jnp.sum(seen & (x <= c), axis=0, keepdims=True) < half
    low = jnp.min(jnp.where(seen, x, jnp.inf), axis=0, keepdims=True)
    high = jnp.max(jnp.where(seen, x, -jnp.inf), axis=0, keepdims=True)
    return jnp.where(half > 0, median_between(low, high, is_above), 0)

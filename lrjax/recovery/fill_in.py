"""A first guess of a matrix with outliers and missing entries: medians in their places."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float


SPREADS = 6.0  # entries further than this many median deviations count as outliers
SAMPLE = 256  # rows that column medians are taken from
HALVINGS = 40  # of the range of a column, to find its median


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
    """``(1, n)``: the medians of what is seen of each column, zero if that is nothing.

    By halving the range: sums over the rows alone, many times faster than sorting them,
    and no device needs the rows of another.
    """
    half = 0.5 * jnp.sum(seen, axis=0, keepdims=True)

    def halve(_, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * low + 0.5 * high
        below = jnp.sum(seen & (x <= middle), axis=0, keepdims=True) < half
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low = jnp.min(jnp.where(seen, x, jnp.inf), axis=0, keepdims=True)
    high = jnp.max(jnp.where(seen, x, -jnp.inf), axis=0, keepdims=True)
    low, high = lax.fori_loop(0, HALVINGS, halve, (low, high))
    return jnp.where(half > 0, high, 0)

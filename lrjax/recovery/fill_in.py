"""A first guess of a matrix with outliers and missing entries: medians in their places."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from ._median import observed_medians


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
    center = observed_medians(sample, seen, 0)
    distance = jnp.abs(matrix - center)
    if trim is None:
        limit = SPREADS * observed_medians(distance[::stride], seen, 0)
    else:
        away = distance if mask is None else jnp.where(mask, distance, jnp.nan)
        limit = jnp.nanquantile(away, 1 - jnp.asarray(trim, matrix.dtype))
    keep = distance <= limit
    if mask is not None:
        keep = keep & mask
    return jnp.where(keep, matrix, center)

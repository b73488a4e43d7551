"""A center far from zero: found, and carried by factors to the rounding of the data."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..linalg import nonzero, outer, times
from ._median import median_between


def middle(x: Float[Array, "*s"], known: Bool[Array, "*s"]) -> Float[Array, ""]:
    """The median of the known entries, zero if there are none."""
    half = 0.5 * jnp.sum(known)
    low = jnp.min(jnp.where(known, x, jnp.inf))
    high = jnp.max(jnp.where(known, x, -jnp.inf))
    found = median_between(low, high, lambda c: jnp.sum(known & (x <= c)) < half)
    return jnp.where(half > 0, found, 0)


def meet(
    column: Float[Array, " n"], basis: Float[Array, "n r"], coordinates: Float[Array, " r"]
) -> Float[Array, "n r"]:
    """The basis, moved by its rounding so that it has a column with these coordinates.

    A center of a thousand standard deviations magnifies the rounding of the basis by so
    much.
    """
    column, coordinates = column[:, None], coordinates[:, None]
    missed = column - times(basis, coordinates)
    return basis + outer(missed, coordinates / nonzero(jnp.sum(coordinates**2)))

"""A center far from zero, carried by factors to the rounding of the data."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..linalg import nonzero, outer, times


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

"""The principal components of what a fit has found."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..linalg import nonzero, outer
from ..lowrank import LowRank, truncate


def centered(
    x: LowRank,
) -> tuple[Float[Array, " n"], Float[Array, " r"], Float[Array, "n r"]]:
    """The mean row of a matrix, and singular values and right vectors of what it leaves."""
    mean = jnp.mean(x.left, axis=0, keepdims=True)
    rest = truncate(LowRank(x.left - mean, x.right), x.rank)
    values = jnp.sum(rest.left**2, axis=0)  # balanced: leftᵀleft = Σ
    vectors = rest.right / jnp.sqrt(nonzero(values))[None, :]
    return outer(mean, x.right)[0], values, vectors


def explained_variance_ratio(x: LowRank, rest: Array) -> Float[Array, " r"]:
    """The squared singular values of the centered matrix over all that there is to explain.

    Args:
        x: what is of low rank.
        rest: the sum of the squares of what is neither that nor a gross error.
    """
    squares = centered(x)[1] ** 2
    return squares / nonzero(jnp.sum(squares) + rest)

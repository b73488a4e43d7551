"""Trees with a leading axis as the rows of one wide matrix, which is never formed.

A matrix ``(k, p)`` over all p numbers of a tree is a list of arrays ``(k, *shape)``. Where
a mesh shards the numbers they stay where they are; what is summed has k × k entries.
"""

import string

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._sharding import einsum
from ..linalg import identity_like


_AXES = string.ascii_lowercase[:20]
Rows = list[Array]


def inner(a: Rows, b: Rows) -> Float[Array, "i j"]:
    """``A Bᵀ``: all inner products of the rows of two such matrices."""
    parts = [_of_leaf(x, y) for x, y in zip(a, b, strict=True)]
    return sum(parts[1:], parts[0])


def combine(coefficients: Float[Array, "i j"], rows: Rows) -> Rows:
    """``C A``: sums of rows with coefficients."""

    def one(x: Array) -> Array:
        axes = _AXES[: x.ndim - 1]
        return einsum(f"zy,y{axes}->z{axes}", coefficients, x).astype(x.dtype)

    return [one(x) for x in rows]


def minus(a: Rows, b: Rows) -> Rows:
    """``A − B``."""
    return [x - y for x, y in zip(a, b, strict=True)]


def off(rows: Rows, basis: Rows) -> Rows:
    """What an orthonormal basis leaves of rows."""
    return minus(rows, combine(inner(rows, basis), basis))


def outside(rows: Rows, basis: Rows) -> tuple[Float[Array, "i k"], Rows]:
    """The coefficients of rows in an orthonormal basis, and what they leave over.

    Twice: the first time leaves rounding errors of the size of what it removed.
    """
    first = inner(rows, basis)
    rest = minus(rows, combine(first, basis))
    second = inner(rest, basis)
    return first + second, minus(rest, combine(second, basis))


def nearly_orthonormal(rows: Rows) -> Rows:
    """The rows with the square of their error; zero rows stay zero."""
    gram = inner(rows, rows)
    return combine(1.5 * identity_like(gram) - 0.5 * gram, rows)


def largest_entries(rows: Rows) -> Float[Array, " i"]:
    """The largest absolute value of each row; not a number where one of them is none."""
    of = lambda x: jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), initial=0)
    return jnp.max(jnp.stack([of(x) for x in rows]), axis=0)


def scaled(factors: Float[Array, " i"], rows: Rows) -> Rows:
    """Each row times its factor."""
    return [factors.reshape(-1, *(1,) * (x.ndim - 1)) * x for x in rows]


def _of_leaf(x: Array, y: Array) -> Array:
    if len(x) == 1:  # several times faster on CPU, and nothing moves between devices
        return jnp.sum(x * y, axis=tuple(range(1, y.ndim)))[None]
    axes = _AXES[: x.ndim - 1]
    return einsum(f"z{axes},y{axes}->zy", x, y)

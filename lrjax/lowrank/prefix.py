"""The first columns of a product: the narrower models inside a factorized one."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ..linalg import working_dtype
from .nodes import LowRank


def first_columns(x: LowRank, rank: ArrayLike) -> LowRank:
    """The factors with zeros from column ``rank`` on, which may be traced.

    ``vmap`` over ranks gives all prefixes of a factorization in one program.

    Args:
        x: ``(*batch, m, n)``.
        rank: a number, or one for each matrix of the batch.

    Returns:
        Factors of the same width.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.eye(3), jnp.eye(3))
        >>> print(jnp.diag(lrjax.lowrank.first_columns(x, 2).materialize()))
        [1. 1. 0.]
    """
    used = _before(x, jnp.asarray(rank, jnp.int32)).astype(x.dtype)[..., None, :]
    return LowRank(x.left * used, x.right * used)


def columns_in_use(x: LowRank) -> Int[Array, "*batch"]:
    """How many columns there are up to the last one that is not zero in both factors.

    Args:
        x: ``(*batch, m, n)``.

    Returns:
        ``(*batch,)``, zero where all is zero.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.eye(3), jnp.eye(3))
        >>> print(lrjax.lowrank.columns_in_use(lrjax.lowrank.first_columns(x, 2)))
        2
    """
    some = jnp.any(x.left != 0, axis=-2) | jnp.any(x.right != 0, axis=-2)
    place = lax.broadcasted_iota(jnp.int32, some.shape, some.ndim - 1)
    return jnp.max(jnp.where(some, place + 1, 0), axis=-1)


def tail_squares(factor: Float[Array, "*batch n r"]) -> Float[Array, "*batch r"]:
    """``‖factor[:, b:]‖²`` for every b, in float32 or wider: falling.

    Args:
        factor: ``(*batch, n, r)``.

    Returns:
        ``(*batch, r)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.lowrank.tail_squares(jnp.array([[2.0, 1.0, 3.0]])))
        [14. 10.  9.]
    """
    wide = factor.astype(working_dtype(factor.dtype))
    return lax.cumsum(jnp.sum(wide**2, axis=-2), axis=factor.ndim - 2, reverse=True)


def _before(x: LowRank, rank: Array) -> Bool[Array, "*batch r"]:
    """Which columns come before the rank."""
    shape = (*x.left.shape[:-2], x.rank)
    place = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    return place < jnp.broadcast_to(rank, shape[:-1])[..., None]

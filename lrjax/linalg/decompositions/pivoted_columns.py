import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .._numerics import check_rank, cross, nonzero, outer, working_dtype


def pivoted_columns(x: Float[Array, "*b m n"], rank: int) -> Int[Array, "*b r"]:
    """The columns that QR with column pivoting takes first, by their indices.

    Each time the column that has the largest part orthogonal to those before; the first of
    several equal ones. ``O(m n r)``, for every backend and under ``vmap``.

    Args:
        x: matrices ``(*b, m, n)``.
        rank: how many columns, at most ``min(m, n)``.

    Returns:
        ``(*b, rank)`` distinct indices, in the order in which they were taken.

    Raises:
        ValueError: rank out of range.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.array([[3.0, 3.0, 0.0], [0.0, 0.1, 1.0]])
        >>> lrjax.linalg.pivoted_columns(x, 2).tolist()
        [1, 2]

    Reference:
        P. Businger, G. H. Golub, "Linear least squares solutions by Householder
        transformations" (1965), Numerische Mathematik. The tests compare it with
        LAPACK's.
    """
    n = x.shape[-1]
    check_rank(rank, x.shape)
    left = lax.stop_gradient(x).astype(working_dtype(x.dtype))
    left = left / nonzero(jnp.max(jnp.abs(left), axis=(-2, -1), keepdims=True))

    def take(step, state):
        left, taken, columns = state
        squares = jnp.where(taken, -1, jnp.sum(left**2, axis=-2))
        index = jnp.argmax(squares, axis=-1)
        column = jnp.take_along_axis(left, index[..., None, None], axis=-1)
        column = column / nonzero(jnp.linalg.norm(column, axis=-2, keepdims=True))
        left = left - outer(column, cross(left, column))
        taken = taken | (jax.nn.one_hot(index, n) > 0)
        return left, taken, columns.at[..., step].set(index)

    batch = x.shape[:-2]
    state = (left, jnp.zeros((*batch, n), bool), jnp.zeros((*batch, rank), int))
    return lax.fori_loop(0, rank, take, state)[2]

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

from ._numerics import working_dtype


def hard_threshold(x: Float[Array, "*s"], level: ArrayLike) -> Float[Array, "*s"]:
    """Hard thresholding: keep what is larger than a level, unchanged.

    ``x`` where ``|x| > level``, else zero. What is left, ``x − hard_threshold(x)``, is
    the gradient of the truncated square ``min(½x², ½level²)``.

    Args:
        x: any shape.
        level: in the units of ``x``; a number or an array that broadcasts.

    Returns:
        The shape and dtype of ``x``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.linalg.hard_threshold(jnp.array([-3.0, 1.0, 2.0]), 1.5))
        [-3.  0.  2.]
    """
    return jnp.where(jnp.abs(x) > jnp.asarray(level, x.dtype), x, 0)


def soft_threshold(x: Float[Array, "*s"], level: ArrayLike) -> Float[Array, "*s"]:
    """Soft thresholding, the proximal map of ``level · ‖x‖_1``: move all toward zero.

    ``sign(x) · max(|x| − level, 0)``. What is left, ``x − soft_threshold(x)``, is the
    gradient of :class:`lrjax.recovery.Huber`. Differentiable in ``level``.

    Args:
        x: any shape.
        level: in the units of ``x``; a number or an array that broadcasts.

    Returns:
        The shape and dtype of ``x``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.linalg.soft_threshold(jnp.array([-3.0, 1.0, 2.0]), 1.5))
        [-1.5  0.   0.5]
    """
    level = jnp.asarray(level, x.dtype)
    return x - jnp.clip(x, -level, level)


def keep_largest(x: Float[Array, "*b m n"], fraction: ArrayLike) -> Float[Array, "*b m n"]:
    """Top-k by row and column: keep the largest of a row and also of its column.

    An entry survives if ``|x|`` is among the ``⌊fraction · n⌋`` largest of its row and
    among the ``⌊fraction · m⌋`` largest of its column; so no row and no column keeps
    more than its share. Entries tied with the last that fits are kept with it.

    The share may be a tracer, and no axis is sorted: the bits of each order statistic
    are found by counting, so that sharded rows stay where they are and a large matrix
    takes a fraction of the time of a sort.

    Args:
        x: matrices ``(*b, m, n)``.
        fraction: between 0, which keeps nothing, and 1, which keeps everything.

    Returns:
        The shape and dtype of ``x``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.array([[9.0, 8.0, 1.0], [7.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        >>> print(lrjax.linalg.keep_largest(x, 1 / 3))
        [[9. 0. 0.]
         [0. 0. 0.]
         [0. 0. 6.]]

    Reference:
        T. Tong, C. Ma, Y. Chi, "Accelerating ill-conditioned low-rank matrix estimation
        via scaled gradient descent" (2021), arXiv 2005.08898.
    """
    m, n = x.shape[-2:]
    size = jnp.abs(x).astype(working_dtype(x.dtype))
    in_row = size >= order_statistic(size, _share(fraction, n), axis=-1)
    in_column = size >= order_statistic(size, _share(fraction, m), axis=-2)
    return jnp.where(in_row & in_column, x, 0)


def order_statistic(
    x: Float[Array, "*s"], k: Int[Array, ""], *, axis: int
) -> Float[Array, "*t"]:
    """The ``k``-th largest of non-negative numbers along an axis, without sorting.

    Bits of non-negative floats are ordered as the floats are. The result is the largest
    pattern that at least ``k`` entries reach, found bit by bit from the top.

    Args:
        x: non-negative, any shape.
        k: which one; for 0 the result is above every number. May be a tracer.
        axis: the axis along which to look.

    Returns:
        The shape of ``x`` with an axis of length one; not differentiated through.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.array([3.0, 1.0, 2.0])
        >>> print(lrjax.linalg.order_statistic(x, jnp.array(2), axis=0))
        [2.]
    """
    width = 8 * x.dtype.itemsize
    integer = jnp.dtype(f"int{width}")
    bits = lax.bitcast_convert_type(lax.stop_gradient(x), integer)

    def settle(step: Array, found: Array) -> Array:
        bit = lax.shift_left(jnp.ones((), integer), (width - 2 - step).astype(integer))
        trial = found | bit
        reached = jnp.sum(bits >= trial, axis=axis, keepdims=True, dtype=jnp.int32)
        return jnp.where(reached >= k, trial, found)

    start = jnp.zeros_like(jnp.max(bits, axis=axis, keepdims=True))
    found = lax.fori_loop(0, width - 1, settle, start)
    return lax.bitcast_convert_type(found, x.dtype)


def _share(fraction: ArrayLike, count: int) -> Int[Array, ""]:
    """``⌊fraction · count⌋``, where rounding does not make 20 a 19."""
    share = jnp.asarray(fraction, jnp.float32) * count
    return jnp.floor(share * (1 + 1e-5)).astype(jnp.int32)

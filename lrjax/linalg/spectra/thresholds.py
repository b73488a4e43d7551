import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

from .._numerics import nonzero, working_dtype


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


def firm_threshold(
    x: Float[Array, "*s"], level: ArrayLike, upper: ArrayLike
) -> Float[Array, "*s"]:
    """Firm thresholding: zero below a level, unchanged above another, a line between.

    ``sign(x) · upper · (|x| − level)/(upper − level)`` where ``level < |x| < upper``. The
    proximal map of the minimax concave penalty (MCP), ``level · (|x| − x²/(2 upper))`` up
    to ``upper`` and constant from there: large values keep their size, which soft
    thresholding shrinks, and nothing jumps, as in hard thresholding. Those two are the
    limits ``upper → ∞`` and ``upper → level``.

    Args:
        x: any shape.
        level: in the units of ``x``; a number or an array that broadcasts.
        upper: in the units of ``x``, not below ``level``.

    Returns:
        The shape and dtype of ``x``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.linalg.firm_threshold(jnp.array([-3.0, 0.5, 1.5]), 1.0, 2.0))
        [-3.  0.  1.]

    Reference:
        H.-Y. Gao, A. G. Bruce, "WaveShrink with firm shrinkage" (1997), Statistica Sinica;
        C.-H. Zhang, "Nearly unbiased variable selection under minimax concave penalty"
        (2010), arXiv 1002.4734.
    """
    level, upper = jnp.asarray(level, x.dtype), jnp.asarray(upper, x.dtype)
    between = upper / nonzero(upper - level) * soft_threshold(x, level)
    return jnp.where(jnp.abs(x) >= upper, hard_threshold(x, level), between)


def lq_threshold(
    x: Float[Array, "*s"], sparse_weight: ArrayLike, q: ArrayLike
) -> Float[Array, "*s"]:
    """The proximal map of ``λ Σ|x|^q`` for q from 0 to 1: between hard and soft.

    ``argmin_z ½(z − x)² + λ |z|^q``, λ being ``sparse_weight``. It is zero up to
    ``τ = β + λ q β^(q−1)`` with ``β = (2 λ (1 − q))^(1/(2−q))``, jumps there to β, and is
    then the larger root of ``z + λ q z^(q−1) = |x|``. With q = 1 it is soft thresholding at
    λ, with q = 0 hard thresholding at ``√(2 λ)``.

    Args:
        x: any shape.
        sparse_weight: a number or an array that broadcasts, not negative.
        q: in [0, 1]; may be a tracer.

    Returns:
        The shape and dtype of ``x``; differentiable in ``x`` and ``sparse_weight``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.array([-3.0, 1.0, 2.0])
        >>> [round(float(y), 3) for y in lrjax.linalg.lq_threshold(x, 1.0, 0.5)]
        [-2.695, 0.0, 1.605]

    Reference:
        G. Marjanovic, V. Solo, "On l_q optimization and matrix completion" (2012), IEEE
        Transactions on Signal Processing.
    """
    sparse_weight, q = jnp.asarray(sparse_weight, x.dtype), jnp.asarray(q, x.dtype)
    jump = (2 * sparse_weight * (1 - q)) ** (1 / (2 - q))
    pull = lambda z: sparse_weight * q * nonzero(z) ** (q - 1)
    size = jnp.abs(x)
    kept = size > jump + jnp.where(q < 1, pull(jump), sparse_weight)
    safe = jnp.where(kept, size, 1 + jump)

    def newton(z: Array) -> Array:
        slope = 1 - (1 - q) * pull(z) / nonzero(z)
        return jnp.maximum(z - (z + pull(z) - safe) / slope, jump)

    # The function is convex and its slope above a half: from |x| Newton's method falls
    # to the root. The last step carries the derivative.
    root = lax.fori_loop(0, 8, lambda _, z: newton(z), safe)
    return jnp.where(kept, jnp.sign(x) * newton(lax.stop_gradient(root)), 0)


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

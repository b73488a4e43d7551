"""Where factors start without a matrix; in ``W + B A`` are ``left = B``, ``right = Aᵀ``."""

import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ..._arguments import check_key
from ..._sharding import einsum
from ...linalg import orthonormalize
from ..nodes import LowRank


def lora_init(
    shape: tuple[int, int], rank: int, *, key: PRNGKeyArray, dtype: DTypeLike = float
) -> LowRank:
    """LoRA's own initialization: ``left = 0``, ``right`` uniform in ``±1/sqrt(n)``.

    Args:
        shape: ``(m, n)``, outputs by inputs.
        rank: the width.
        key: for ``right``.
        dtype: of the factors.

    Returns:
        Factors with product zero.

    Example:
        >>> import jax, lrjax
        >>> x = lrjax.lowrank.lora_init((3, 4), 2, key=jax.random.key(0))
        >>> bool((abs(x.right) <= 0.5).all()), float(abs(x.left).max())
        (True, 0.0)

    Reference:
        E. Hu et al., "LoRA: low-rank adaptation of large language models" (2021), arXiv
        2106.09685; the scale is that of PEFT.
    """
    check_key("lora_init", key)
    m, n = shape
    edge = n**-0.5
    right = jr.uniform(key, (n, rank), dtype, -edge, edge)
    return LowRank(jnp.zeros((m, rank), right.dtype), right)


def gaussian_init(
    shape: tuple[int, int],
    rank: int,
    std: ArrayLike,
    *,
    key: PRNGKeyArray,
    dtype: DTypeLike = float,
) -> LowRank:
    """Both factors normal: with a small standard deviation, next to the saddle at zero.

    Args:
        shape: ``(m, n)``.
        rank: the width.
        std: the standard deviation of the numbers.
        key: for both factors.
        dtype: of the factors.

    Returns:
        The factors.

    Example:
        >>> import jax, lrjax
        >>> x = lrjax.lowrank.gaussian_init((3, 4), 2, 1e-3, key=jax.random.key(0))
        >>> bool(abs(x.left).max() < 0.01)
        True
    """
    check_key("gaussian_init", key)
    k_left, k_right = jr.split(key)
    std = jnp.asarray(std, dtype)
    left = jr.normal(k_left, (shape[0], rank), dtype)
    right = jr.normal(k_right, (shape[1], rank), dtype)
    return LowRank(std * left, std * right)


def small_init(
    shape: tuple[int, int],
    rank: int,
    scale: ArrayLike,
    *,
    key: PRNGKeyArray,
    symmetric: bool = False,
    dtype: DTypeLike = float,
) -> LowRank:
    """Gaussian factors whose columns have the expected length ``scale``, near zero.

    ``left_ij ~ scale · N(0, 1/m)``, ``right_ij ~ scale · N(0, 1/n)``. From such a start
    gradient methods learn one singular direction after the other, which makes wide
    factors harmless: :func:`lrjax.subgm`, ``lrjax.scaled_gd(damping=…, relative=False)``.

    Args:
        shape: ``(m, n)`` of the matrix to be found.
        rank: the width of the factors; up to ``min(m, n)`` is fine.
        scale: the expected length of a column.
        key: for the factors.
        symmetric: if True, the factors are equal, for symmetric problems.
        dtype: of the factors: that of the data.

    Returns:
        The factors.

    Raises:
        ValueError: for a rank below 1, or a symmetric start that is not square.

    Example:
        >>> import jax, lrjax
        >>> x = lrjax.lowrank.small_init((90, 70), 5, 1e-3, key=jax.random.key(1))
        >>> x.rank, bool(lrjax.norm(x) < 1e-5)
        (5, True)
    """
    check_key("small_init", key)
    if rank < 1:
        raise ValueError(f"small_init needs a rank of at least 1, got {rank}.")
    m, n = shape
    if symmetric and m != n:
        raise ValueError(f"small_init(symmetric=True) needs a square shape, got {shape}.")
    k_left, k_right = jr.split(key)
    scale = jnp.asarray(scale, dtype)
    left = scale * jr.normal(k_left, (m, rank), dtype) / m**0.5
    if symmetric:
        return LowRank(left, left)
    return LowRank(left, scale * jr.normal(k_right, (n, rank), dtype) / n**0.5)


def orthogonal_init(
    shape: tuple[int, int],
    rank: int,
    scale: ArrayLike = 0.1,
    *,
    key: PRNGKeyArray,
    dtype: DTypeLike = float,
) -> LowRank:
    """Both factors random and not zero, yet their product is zero.

    The columns of an orthogonal matrix are dealt out to the two sides alternately.

    Args:
        shape: ``(m, n)``.
        rank: the width, even.
        scale: the size of the numbers.
        key: for the factors.
        dtype: of the factors.

    Returns:
        The factors.

    Raises:
        ValueError: if the rank is odd.

    Example:
        >>> import jax, lrjax
        >>> x = lrjax.lowrank.orthogonal_init((3, 4), 2, key=jax.random.key(0))
        >>> bool(abs(x.materialize()).max() < 1e-8)
        True

    Reference:
        The "orthogonal" initialization of PEFT.
    """
    check_key("orthogonal_init", key)
    if rank % 2:
        raise ValueError(f"orthogonal_init needs an even rank, got {rank}.")
    scale = jnp.asarray(scale, dtype)
    k_turn, k_left, k_right = jr.split(key, 3)
    turn = orthonormalize(jr.normal(k_turn, (rank, rank), dtype))
    left = jr.normal(k_left, (shape[0], rank // 2), dtype) @ turn[0::2]
    right = jr.normal(k_right, (shape[1], rank // 2), dtype) @ turn[1::2]
    return LowRank(scale * left, scale * right)


def balanced_init(
    shape: tuple[int, int], values: Float[Array, " r"], *, key: PRNGKeyArray
) -> LowRank:
    """Balanced factors with given singular values and random singular vectors.

    ``left = U Σ^½ Q``, ``right = V Σ^½ Q`` with an orthogonal Q, so that
    ``leftᵀleft = rightᵀright`` is not diagonal either.

    Args:
        shape: ``(m, n)``.
        values: the singular values of the product; their number is the width.
        key: for the vectors and the rotation.

    Returns:
        The factors, in the dtype of the values.

    Raises:
        ValueError: for more values than the shorter side is long.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> values = jnp.array([2.0, 1.0])
        >>> x = lrjax.lowrank.balanced_init((5, 4), values, key=jax.random.key(0))
        >>> print(lrjax.metrics.singular_values(x).round(3))
        [2. 1.]
    """
    check_key("balanced_init", key)
    r = len(values)
    if r > min(shape):
        raise ValueError(
            f"balanced_init got {r} values for the shape {shape}: a matrix has no more "
            f"singular values than its shorter side is long, here {min(shape)}."
        )
    u, v, q = (
        orthonormalize(jr.normal(k, (size, r), values.dtype))
        for k, size in zip(jr.split(key, 3), (*shape, r), strict=True)
    )
    root = jnp.sqrt(values)
    return LowRank(*(einsum("mi,i,ij->mj", basis, root, q) for basis in (u, v)))

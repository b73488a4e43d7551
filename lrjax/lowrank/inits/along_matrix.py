"""Where factors start along a matrix: a weight, a gradient, a residual.

Each gives a pair for the change ``left rightᵀ``. All decompose in float32 or higher and
have no gradient.
"""

from typing import Literal, get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from ...linalg import cross, eigh, identity_like, orthonormalize, svd, times, working_dtype
from ..algebra import svd as factored_svd
from ..nodes import LowRank


Which = Literal["largest", "smallest"]
Vectors = tuple[Array, Array, Array]  # U, values, V


def svd_init(
    matrix: Float[Array, "m n"] | LowRank,
    rank: int,
    *,
    scale: ArrayLike = 1.0,
    power: float = 0.5,
    which: Which = "largest",
) -> LowRank:
    """Along singular vectors of a matrix: ``s U Σ^power`` and ``s V Σ^power``.

    Of the residual, with the defaults: the best approximation of this rank, balanced. Of
    the negative gradient with respect to the product, with a small scale and
    ``power=0``: the directions into which a small random start would turn by itself. Of a
    weight: its principal part (PiSSA), or with ``which="smallest"`` its minor one
    (MiLoRA).

    Args:
        matrix: the residual, minus the gradient, or the weight; dense or in factors.
        rank: the width.
        scale: ``s``, of both factors.
        power: the power of the singular values in each factor.
        which: the ``"largest"`` or the ``"smallest"`` singular values.

    Returns:
        Balanced factors.

    Raises:
        ValueError: for a rank that is not between 1 and ``min(m, n)``, or an unknown
            ``which``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.lowrank.svd_init(jnp.diag(jnp.array([4.0, 1.0])), 1)
        >>> print(x.materialize().round(4))
        [[4. 0.]
         [0. 0.]]

    Reference:
        F. Meng, Z. Wang, M. Zhang, "PiSSA: principal singular values and singular vectors
        adaptation of large language models" (2024), arXiv:2404.02948; H. Wang et al.,
        "MiLoRA: harnessing minor singular components for parameter-efficient LLM
        finetuning" (2024), arXiv:2406.09044.
    """
    u, values, v = _some(_vectors(matrix), rank, which)
    size = jnp.asarray(scale, u.dtype) * values[None, :] ** power
    return LowRank(u * size, v * size)


def qr_init(matrix: Float[Array, "m n"], rank: int) -> LowRank:
    """The first columns of Q and rows of R of ``W = Q R``, whose diagonal is positive.

    The product is exact on the first ``rank`` columns of W.

    Args:
        matrix: the weight.
        rank: the width.

    Returns:
        ``left`` with orthonormal columns, ``right = Rᵀ``.

    Raises:
        ValueError: for a rank that is not between 1 and ``min(m, n)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.lowrank.qr_init(jnp.array([[3.0, 1.0], [4.0, 0.0]]), 1)
        >>> print(x.materialize().round(4)[:, 0])
        [3. 4.]

    Reference:
        K. Büyükakyüz, "OLoRA: orthonormal low-rank adaptation of large language models"
        (2024), arXiv:2406.01775.
    """
    matrix = _plain(matrix)
    _check_rank(rank, min(matrix.shape))
    q = orthonormalize(matrix[:, :rank])
    return LowRank(q, cross(matrix, q))


def disjoint_svd_init(
    matrix: Float[Array, "m n"] | LowRank, rank: int, *, scale: ArrayLike = 1.0
) -> LowRank:
    """``left = s U_{r+1…2r}`` and ``right = s V_{1…r}``: different singular vectors.

    Of a gradient G: the first gradient step of the factors moves their product along
    ``left leftᵀ G + G right rightᵀ = s² G_{2r}``, the best approximation of rank 2r.

    Args:
        matrix: the gradient, dense or in factors.
        rank: the width, at most half of ``min(m, n)``.
        scale: ``s``.

    Returns:
        Factors with orthogonal columns of length ``s``.

    Raises:
        ValueError: if there are no ``2 · rank`` singular vectors.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.lowrank.disjoint_svd_init(jnp.diag(jnp.array([4.0, 1.0])), 1)
        >>> print(abs(x.left.T), abs(x.right.T))
        [[0. 1.]] [[1. 0.]]

    Reference:
        S. Wang, L. Yu, J. Li, "LoRA-GA: low-rank adaptation with gradient approximation"
        (2024), arXiv:2407.05000.
    """
    u, _, v = _some(_vectors(matrix), 2 * rank, "largest")
    scale = jnp.asarray(scale, u.dtype)
    return LowRank(scale * u[:, rank:], scale * v[:, :rank])


def weighted_svd_init(
    matrix: Float[Array, "m n"],
    metric: Float[Array, "n n"],
    rank: int,
    *,
    scale: ArrayLike = 1.0,
    damping: ArrayLike = 0.01,
    which: Which = "largest",
) -> LowRank:
    """Along the singular vectors of ``W C``, carried back: ``s U √Σ`` and ``s C⁻¹ V √Σ``.

    With ``C`` the second moment of the inputs the part of W that matters most for them
    (``"largest"``), or least. All ranks together are W itself; ``C = I`` gives
    :func:`svd_init`.

    Args:
        matrix: the weight W.
        metric: ``C``, symmetric and positive semidefinite.
        rank: the width.
        scale: ``s``, of both factors.
        damping: added to the diagonal of C, relative to its mean.
        which: the ``"largest"`` or the ``"smallest"`` singular values.

    Returns:
        The factors.

    Raises:
        ValueError: for a rank that is not between 1 and ``min(m, n)``, or an unknown
            ``which``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.lowrank.weighted_svd_init(
        ...     jnp.eye(2), jnp.diag(jnp.array([0.1, 5.0])), 1)
        >>> print(x.materialize().round(4))
        [[0. 0.]
         [0. 1.]]

    Reference:
        Y. Yang et al., "CorDA: context-oriented decomposition adaptation of large language
        models" (2024), arXiv:2406.05223.
    """
    weight, metric = _plain(matrix), _plain(metric)
    damped = metric + damping * jnp.mean(jnp.diagonal(metric)) * identity_like(metric)
    u, values, v = _some(_vectors(times(weight, damped)), rank, which)
    spectrum, axes = eigh(damped)
    # Rounding can leave an eigenvalue at zero where there is no damping.
    floor = jnp.finfo(spectrum.dtype).eps * spectrum[-1]
    inverse = jnp.where(spectrum > floor, 1 / jnp.maximum(spectrum, floor), 0)
    back = times(axes * inverse[None, :], times(axes.T, v))
    size = jnp.asarray(scale, u.dtype) * jnp.sqrt(values)[None, :]
    return LowRank(u * size, back * size)


def _plain(matrix: Array) -> Array:
    return lax.stop_gradient(matrix).astype(working_dtype(matrix.dtype))


def _vectors(matrix: Array | LowRank) -> Vectors:
    """All singular vectors, as columns, and values."""
    if isinstance(matrix, LowRank):
        form = factored_svd(lax.stop_gradient(matrix))
        return form.left, jnp.diagonal(form.core), form.right
    u, values, vt = svd(_plain(matrix))
    return u, values, vt.T


def _some(vectors: Vectors, rank: int, which: Which) -> Vectors:
    u, values, v = vectors
    _check_rank(rank, len(values))
    if which not in get_args(Which):
        raise ValueError(f"which must be one of {get_args(Which)}, got {which!r}.")
    part = slice(0, rank) if which == "largest" else slice(len(values) - rank, None)
    return u[:, part], values[part], v[:, part]


def _check_rank(rank: int, most: int) -> None:
    if not 1 <= rank <= most:
        raise ValueError(
            f"{rank} singular vectors are asked of a matrix that has {most}: the rank must "
            "be at least 1 and small enough."
        )

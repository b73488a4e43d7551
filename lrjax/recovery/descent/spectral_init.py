import functools
from collections.abc import Callable

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from ..._arguments import check_key
from ...linalg import (
    check_rank,
    cross,
    eigh,
    nonzero,
    orthonormalize,
    outer,
    subspace_iteration,
    svd,
    times,
    working_dtype,
)
from ...lowrank import LowRank
from ..fill_in import fill_in
from ..problems import Identity, Masked, Operator, Problem, RankOneSensing


Products = tuple[Callable[[Array], Array], Callable[[Array], Array]]


def spectral_init(
    problem: Problem,
    rank: int,
    *,
    key: PRNGKeyArray,
    trim: ArrayLike | None = None,
    symmetric: bool = False,
    power_iters: int = 4,
) -> LowRank:
    """Spectral initialization: the leading singular vectors of trimmed measurements.

    Measurements that look like outliers are left out; the rest, ``y'``, is projected
    back, ``Y = A*(y')``, and its best approximation of the given width is split evenly:
    ``left = U Σ^½``, ``right = V Σ^½``. Y is touched by products with thin matrices
    only (randomized subspace iteration).

    For matrices observed entry by entry, ``Identity`` or ``Masked``, an outlier is an
    entry far from the median of its column; outliers and missing entries are replaced
    by that median before the decomposition. For other operators the largest ``|y|`` are
    left out and the result is scaled to explain the rest.

    Args:
        problem: what to recover.
        rank: the width of the factors; more than the rank of the truth is fine.
        key: for the random sketch.
        trim: the share of measurements to leave out. By default none is needed: those
            beyond three standard deviations (six median deviations of a column for
            entries), with scales from medians, which outliers hardly move.
        symmetric: if True, equal factors from the leading positive eigenvalues, for
            symmetric problems.
        power_iters: subspace iterations.

    Returns:
        Balanced factors of the given width.

    Raises:
        ValueError: for a rank that is not between 1 and the smaller side, or a symmetric
            start that is not square.

    Example:
        >>> import jax, lrjax
        >>> key = jax.random.key(0)
        >>> problem = lrjax.matrix_sensing(key, (9, 7), 1, 900, outlier_fraction=0.1)
        >>> start = lrjax.spectral_init(problem, 1, key=key)
        >>> bool(problem.relative_error(start) < 0.5)
        True

    Reference:
        H. Zhang, Y. Chi, Y. Liang, "Provable non-convex phase retrieval with outliers:
        median truncated Wirtinger flow" (2016), arXiv 1603.03805; Y. Li, Y. Chi,
        H. Zhang, Y. Liang, "Nonconvex low-rank matrix recovery with arbitrary outliers
        via median-truncated gradient descent" (2017), arXiv 1709.08114.
    """
    check_key("spectral_init", key)
    m, n = problem.shape
    if symmetric and m != n:
        raise ValueError(
            f"spectral_init(symmetric=True) needs a square shape, got {(m, n)}."
        )
    check_rank(rank, (m, n))
    if isinstance(problem.operator, Identity | Masked):
        matrix = fill_in(problem.targets, getattr(problem.operator, "mask", None), trim)
        products = lambda v: times(matrix, v), lambda u: cross(matrix, u)
        return _factors(products, n, rank, key, matrix.dtype, symmetric, power_iters)
    kept = _kept(problem.targets, trim)
    y = jnp.where(kept, problem.targets, 0)
    products = _back_projection(problem.operator, y, symmetric)
    start = _factors(products, n, rank, key, y.dtype, symmetric, power_iters)
    explained = jnp.sum(jnp.where(kept, jnp.abs(problem.operator(start)), 0))
    root = jnp.sqrt(jnp.sum(jnp.abs(y)) / nonzero(explained))
    return LowRank(start.left * root, start.right * root)


def _kept(y: Array, trim: ArrayLike | None) -> Array:
    """Which measurements are not among the largest."""
    size = jnp.abs(y)
    if trim is None:
        # The median of |y| is 0.6745 standard deviations of Gaussian measurements.
        return size <= 3 / 0.6745 * jnp.median(size)
    return size <= jnp.quantile(size, 1 - jnp.asarray(trim, size.dtype))


def _back_projection(operator: Operator, y: Array, symmetric: bool) -> Products:
    """Products with ``A*(y)`` and its transpose, up to scale."""
    if not (symmetric and isinstance(operator, RankOneSensing)):
        return (
            lambda v: operator.adjoint_matmul(y, v),
            lambda u: operator.adjoint_rmatmul(y, u),
        )

    # The average of y_k a_k a_kᵀ is 2X + tr(X) I, and that of y_k is tr(X).
    def product(v):
        return operator.adjoint_matmul(y, v) - jnp.sum(y) * v

    return product, product


def _factors(products, n, rank, key, dtype, symmetric, power_iters) -> LowRank:
    """Balanced factors of the leading part of a matrix that is known by its products."""
    matmul, rmatmul = products
    # Half of the eigenvalues of noise are negative: look at twice as many as are kept.
    width = min(2 * rank, n) if symmetric else rank
    # Householder QR of tall matrices is far slower than the products themselves.
    orthonormal = functools.partial(orthonormalize, method="cholesky")
    start = orthonormal(jr.normal(key, (n, width), working_dtype(dtype)))
    basis = subspace_iteration(
        matmul, rmatmul, start, steps=power_iters, orthonormalize=orthonormal
    )
    image = matmul(basis)
    if symmetric:
        values, vectors = eigh(cross(basis, image))
        root = jnp.sqrt(jnp.maximum(values, 0))
        left = times(basis, (vectors * root[None, :])[:, width - rank :])
        return LowRank(left, left)
    columns = orthonormal(image)
    u, s, vt = svd(cross(columns, image))
    root = jnp.sqrt(s)
    return LowRank(times(columns, u * root[None, :]), outer(basis, vt * root[:, None]))

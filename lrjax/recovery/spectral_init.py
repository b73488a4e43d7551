from collections.abc import Callable

import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from .._sharding import einsum
from ..linalg import orthonormalize
from ..linalg.gram import working_dtype
from ..lowrank import LowRank
from .operators import Identity, Masked, Operator, RankOneSensing
from .problem import Problem


Products = tuple[Callable[[Array], Array], Callable[[Array], Array]]

SPREADS = 6.0  # entries further than this many median deviations count as outliers
SAMPLE = 256  # rows that column medians are taken from
HALVINGS = 40  # of the range of a column, to find its median


def spectral_init(
    problem: Problem,
    rank: int,
    *,
    key: PRNGKeyArray,
    trim: ArrayLike | None = None,
    symmetric: bool = False,
    power_iters: int = 4,
) -> LowRank:
    """A start near the truth: the leading singular vectors of the trimmed measurements.

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
        symmetric: for symmetric problems: equal factors from the leading positive
            eigenvalues.
        power_iters: subspace iterations.

    Returns:
        Balanced factors of the given width.

    Raises:
        ValueError: for a rank that is not between 1 and the smaller side.

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
    m, n = problem.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(
            f"rank must be between 1 and min(m, n) = {min(m, n)} for a matrix of shape "
            f"{(m, n)}, got {rank}."
        )
    if isinstance(problem.operator, Identity | Masked):
        matrix = filled(problem, trim)
        products = (
            lambda v: einsum("mn,nk->mk", matrix, v),
            lambda u: einsum("mn,mk->nk", matrix, u),
        )
        return _factors(products, n, rank, key, matrix.dtype, symmetric, power_iters)
    kept = _kept(problem.targets, trim)
    y = jnp.where(kept, problem.targets, 0)
    products = _back_projection(problem.operator, y, symmetric)
    start = _factors(products, n, rank, key, y.dtype, symmetric, power_iters)
    explained = jnp.sum(jnp.where(kept, jnp.abs(problem.operator(start)), 0))
    root = jnp.sqrt(jnp.sum(jnp.abs(y)) / jnp.where(explained > 0, explained, 1))
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
    transposed = operator.T
    if not (symmetric and isinstance(operator, RankOneSensing)):
        return (
            lambda v: operator.adjoint_matmul(y, v),
            lambda u: transposed.adjoint_matmul(y, u),
        )

    # The average of y_k a_k a_kᵀ is 2X + tr(X) I, and that of y_k is tr(X).
    def product(v):
        return operator.adjoint_matmul(y, v) - jnp.sum(y) * v

    return product, product


def filled(problem: Problem, trim: ArrayLike | None = None) -> Array:
    """The observed matrix with column medians for outliers and missing entries."""
    matrix = problem.targets
    mask = getattr(problem.operator, "mask", None)
    stride = -(-matrix.shape[0] // SAMPLE)
    sample = matrix[::stride]
    seen = jnp.ones_like(sample, bool) if mask is None else mask[::stride]
    center = _column_medians(sample, seen)
    distance = jnp.abs(matrix - center)
    if trim is None:
        limit = SPREADS * _column_medians(distance[::stride], seen)
    else:
        away = distance if mask is None else jnp.where(mask, distance, jnp.nan)
        limit = jnp.nanquantile(away, 1 - jnp.asarray(trim, matrix.dtype))
    keep = distance <= limit
    if mask is not None:
        keep = keep & mask
    return jnp.where(keep, matrix, center)


def _column_medians(x: Array, seen: Array) -> Array:
    """``(1, n)``: the medians of what is seen of each column, zero if that is nothing.

    By halving the range: sums over the rows alone, many times faster than sorting them,
    and no device needs the rows of another.
    """
    half = 0.5 * jnp.sum(seen, axis=0, keepdims=True)

    def halve(_, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * low + 0.5 * high
        below = jnp.sum(seen & (x <= middle), axis=0, keepdims=True) < half
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low = jnp.min(jnp.where(seen, x, jnp.inf), axis=0, keepdims=True)
    high = jnp.max(jnp.where(seen, x, -jnp.inf), axis=0, keepdims=True)
    low, high = lax.fori_loop(0, HALVINGS, halve, (low, high))
    return jnp.where(half > 0, high, 0)


def _basis(x: Array) -> Array:
    return orthonormalize(x, method="cholesky")


def _factors(products, n, rank, key, dtype, symmetric, power_iters) -> LowRank:
    """Subspace iteration on a matrix that is known by its products."""
    matmul, transposed_matmul = products
    dtype = working_dtype(dtype)
    # Half of the eigenvalues of noise are negative: look at twice as many as are kept.
    width = min(2 * rank, n) if symmetric else rank
    # Householder QR of tall matrices is far slower than the products themselves.
    basis = _basis(jr.normal(key, (n, width), dtype))
    for _ in range(power_iters):
        basis = _basis(transposed_matmul(_basis(matmul(basis))))
    if symmetric:
        values, vectors = jnp.linalg.eigh(einsum("nr,ns->rs", basis, matmul(basis)))
        root = jnp.sqrt(jnp.maximum(values, 0))
        left = einsum("nr,rs->ns", basis, (vectors * root[None, :])[:, width - rank :])
        return LowRank(left, left)
    image = _basis(matmul(basis))
    u, s, vt = jnp.linalg.svd(einsum("mr,ms->rs", image, matmul(basis)))
    root = jnp.sqrt(s)
    return LowRank(
        einsum("mr,rs->ms", image, u * root[None, :]),
        einsum("nr,sr->ns", basis, vt * root[:, None]),
    )

# ruff: noqa: D102 - the classes are called as functions, and documented as such
from typing import NamedTuple

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from ..._arguments import check_key
from ...linalg import orthonormalize
from ...lowrank import LowRank
from .losses import L1, Objective, Squared
from .operators import DenseSensing, Entries, Identity, Masked, RankOneSensing
from .problem import Problem


class _Corruption(NamedTuple):
    """What happens to clean measurements: gross errors and dense Gaussian noise."""

    fraction: ArrayLike
    scale: ArrayLike
    noise: ArrayLike

    def apply(self, key: PRNGKeyArray, y: Array) -> Array:
        k_where, k_size, k_noise = jr.split(key, 3)
        size = self.scale * jnp.max(jnp.abs(y))
        outliers = size * jr.uniform(k_size, y.shape, y.dtype, -1, 1)
        # An integer, 0 for none, is a share like any other.
        hit = jr.bernoulli(k_where, jnp.asarray(self.fraction, y.dtype), y.shape)
        noise = (
            self.noise * jnp.sqrt(jnp.mean(y * y)) * jr.normal(k_noise, y.shape, y.dtype)
        )
        return y + noise + jnp.where(hit, outliers, 0)


def _spectrum(condition: ArrayLike, rank: int, dtype) -> Array:
    """Singular values falling linearly from 1 to 1/κ."""
    fall = jnp.arange(rank, dtype=dtype) / max(rank - 1, 1)
    return 1 - (1 - 1 / jnp.asarray(condition, dtype)) * fall


def _random_truth(key, shape, rank, condition, symmetric, dtype) -> LowRank:
    m, n = shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank must be between 1 and {min(m, n)}, got {rank}.")
    if symmetric and m != n:
        raise ValueError(f"a symmetric problem needs a square shape, got {shape}.")
    k_left, k_right = jr.split(key)
    root = jnp.sqrt(_spectrum(condition, rank, dtype))[None, :]
    left = orthonormalize(jr.normal(k_left, (m, rank), dtype)) * root
    right = orthonormalize(jr.normal(k_right, (n, rank), dtype)) * root
    return LowRank(left, left if symmetric else right)


class matrix_sensing:
    """A matrix from inner products with dense Gaussian matrices, some of them wrong.

    ``y_k = ⟨A_k, X⟩``, with entries of ``A_k`` drawn from ``N(0, 1/measurements)`` so
    that ``‖A(X)‖² ≈ ‖X‖²``. The truth has random singular vectors and singular values
    that fall linearly from 1 to ``1/condition``.

    Args:
        key: for the truth, the operator and the corruption.
        shape: ``(m, n)``.
        rank: rank of the truth.
        measurements: their number. Robust recovery wants about ``4 (m + n) width`` of
            them, and it is the width of the factors that counts, not the rank: with a
            tenth of them wrong, 20 × 20 and rank 2, factors of width 2 are found from
            three times ``(m + n) width`` on and those of width 6 from twice, never from
            once.
        outlier_fraction: the share of measurements that get a gross error.
        outlier_scale: gross errors are uniform in ``± outlier_scale · max|y|``.
        noise: standard deviation of Gaussian noise relative to the size of y.
        condition: ``σ_1/σ_r`` of the truth.
        symmetric: a symmetric positive semi-definite truth and symmetric ``A_k``. From
            a start with equal factors the simultaneous methods keep them equal.
        objective: :class:`L1` by default.
        dtype: of all arrays.

    Returns:
        A :class:`Problem` with the truth. ``matrix_sensing.from_data(matrices, y)``
        takes given matrices ``(count, m, n)``.

    Raises:
        ValueError: for a rank out of range, or a symmetric problem that is not square.

    Example:
        >>> import jax, lrjax
        >>> problem = lrjax.matrix_sensing(jax.random.key(0), (9, 7), 2, 200)
        >>> problem.targets.shape, float(problem.loss(problem.truth).round(2))
        ((200,), 0.0)
    """

    def __new__(
        cls,
        key: PRNGKeyArray,
        shape: tuple[int, int],
        rank: int,
        measurements: int,
        *,
        outlier_fraction: ArrayLike = 0.0,
        outlier_scale: ArrayLike = 10.0,
        noise: ArrayLike = 0.0,
        condition: ArrayLike = 1.0,
        symmetric: bool = False,
        objective: Objective | None = None,
        dtype=jnp.float32,
    ) -> Problem:
        check_key("matrix_sensing", key)
        k_truth, k_operator, k_corrupt = jr.split(key, 3)
        truth = _random_truth(k_truth, shape, rank, condition, symmetric, dtype)
        m, n = shape
        rows = jr.normal(k_operator, (measurements, m * n), dtype) / measurements**0.5
        if symmetric:
            square = rows.reshape(-1, m, n)
            rows = (0.5 * (square + square.mT)).reshape(-1, m * n)
        operator = DenseSensing(rows, (m, n))
        corruption = _Corruption(outlier_fraction, outlier_scale, noise)
        y = corruption.apply(k_corrupt, operator(truth))
        return Problem(operator, y, _or_l1(objective), truth)

    @staticmethod
    def from_data(
        matrices: Float[Array, "count m n"],
        y: Float[Array, "..."],
        *,
        objective: Objective | None = None,
    ) -> Problem:
        """The problem of given measurement matrices and measurements."""
        if matrices.ndim != 3 or y.shape != matrices.shape[:1]:
            raise ValueError(
                "matrix_sensing.from_data needs matrices (count, m, n) and y (count,), "
                f"got shapes {matrices.shape} and {y.shape}."
            )
        count, m, n = matrices.shape
        operator = DenseSensing(matrices.reshape(count, -1), (m, n))
        return Problem(operator, y, _or_l1(objective))


class phase_retrieval:
    """A positive semi-definite matrix from quadratic measurements, some of them wrong.

    ``y_k = a_kᵀ X a_k = ‖Uᵀ a_k‖²`` of ``X = U Uᵀ`` with Gaussian ``a_k``: real phase
    retrieval for rank 1, covariance sketching beyond.

    Args:
        key: for the truth, the operator and the corruption.
        size: ``n``; X is ``(n, n)``.
        measurements: their number.
        rank: rank of the truth.
        outlier_fraction: see :class:`matrix_sensing`, as for the other options.
        outlier_scale: see there.
        noise: see there.
        condition: see there.
        objective: :class:`L1` by default.
        dtype: of all arrays.

    Returns:
        A :class:`Problem` with the truth. ``phase_retrieval.from_data(vectors, y)``
        takes given vectors ``(count, n)``.

    Raises:
        ValueError: for a rank out of range.

    Example:
        >>> import jax, lrjax
        >>> problem = lrjax.phase_retrieval(jax.random.key(0), 8, 60)
        >>> problem.shape, bool((problem.targets >= 0).all())
        ((8, 8), True)
    """

    def __new__(
        cls,
        key: PRNGKeyArray,
        size: int,
        measurements: int,
        rank: int = 1,
        *,
        outlier_fraction: ArrayLike = 0.0,
        outlier_scale: ArrayLike = 10.0,
        noise: ArrayLike = 0.0,
        condition: ArrayLike = 1.0,
        objective: Objective | None = None,
        dtype=jnp.float32,
    ) -> Problem:
        check_key("phase_retrieval", key)
        k_truth, k_operator, k_corrupt = jr.split(key, 3)
        truth = _random_truth(k_truth, (size, size), rank, condition, True, dtype)
        vectors = jr.normal(k_operator, (measurements, size), dtype)
        operator = RankOneSensing(vectors, vectors)
        corruption = _Corruption(outlier_fraction, outlier_scale, noise)
        y = corruption.apply(k_corrupt, operator(truth))
        return Problem(operator, y, _or_l1(objective), truth)

    @staticmethod
    def from_data(
        vectors: Float[Array, "count n"],
        y: Float[Array, "..."],
        *,
        objective: Objective | None = None,
    ) -> Problem:
        """The problem of given vectors and measurements."""
        if y.shape != vectors.shape[:1]:
            raise ValueError(
                "phase_retrieval.from_data needs vectors (count, n) and y (count,), got "
                f"shapes {vectors.shape} and {y.shape}."
            )
        return Problem(RankOneSensing(vectors, vectors), y, _or_l1(objective))


class matrix_completion:
    """A matrix from some of its entries, given by their indices.

    Args:
        key: for the truth, the observed places and the corruption.
        shape: ``(m, n)``.
        rank: rank of the truth, whose entries have a root mean square of one.
        observed: the share of entries that is observed, drawn without repetition.
        outlier_fraction: see :class:`matrix_sensing`, as for the other options.
        outlier_scale: see there.
        noise: see there.
        condition: see there.
        objective: :class:`Squared` by default.
        dtype: of all arrays.

    Returns:
        A :class:`Problem` with the truth. ``matrix_completion.from_data(rows, cols,
        values, shape)`` takes given entries.

    Raises:
        ValueError: for a rank out of range.

    Example:
        >>> import jax, lrjax
        >>> problem = lrjax.matrix_completion(jax.random.key(0), (20, 10), 2, observed=0.4)
        >>> problem.targets.shape, float(problem.loss(problem.truth).round(2))
        ((80,), 0.0)
    """

    def __new__(
        cls,
        key: PRNGKeyArray,
        shape: tuple[int, int],
        rank: int,
        *,
        observed: float = 0.2,
        outlier_fraction: ArrayLike = 0.0,
        outlier_scale: ArrayLike = 10.0,
        noise: ArrayLike = 0.0,
        condition: ArrayLike = 1.0,
        objective: Objective | None = None,
        dtype=jnp.float32,
    ) -> Problem:
        check_key("matrix_completion", key)
        k_truth, k_operator, k_corrupt = jr.split(key, 3)
        truth = _unit_entries(_random_truth(k_truth, shape, rank, condition, False, dtype))
        m, n = shape
        places = jr.choice(k_operator, m * n, (round(observed * m * n),), replace=False)
        operator = Entries(places // n, places % n, (m, n))
        corruption = _Corruption(outlier_fraction, outlier_scale, noise)
        y = corruption.apply(k_corrupt, operator(truth))
        return Problem(operator, y, Squared() if objective is None else objective, truth)

    @staticmethod
    def from_data(
        rows: Int[Array, " count"],
        cols: Int[Array, " count"],
        values: Float[Array, " count"],
        shape: tuple[int, int],
        *,
        objective: Objective | None = None,
    ) -> Problem:
        """The problem of given entries ``X[rows, cols] = values``."""
        m, n = shape
        operator = Entries(rows, cols, (m, n))
        return Problem(operator, values, Squared() if objective is None else objective)


class robust_pca:
    """A matrix from its own entries, of which some are grossly wrong and some missing.

    Args:
        key: for the truth, the missing places and the corruption.
        shape: ``(m, n)``.
        rank: rank of the truth, whose entries have a root mean square of one.
        outlier_fraction: the share of entries that get a gross error.
        observed: the share of entries that is observed; with 1 there is no mask.
        outlier_scale: gross errors are uniform in ``± outlier_scale · max|X|``.
        noise: standard deviation of Gaussian noise relative to the size of X.
        condition: ``σ_1/σ_r`` of the truth.
        objective: :class:`L1` by default.
        dtype: of all arrays.

    Returns:
        A :class:`Problem` with the truth. ``robust_pca.from_data(matrix, mask=None)``
        takes a given matrix; entries that are not finite count as missing.

    Raises:
        ValueError: for a rank out of range; ``from_data``: for a mask of another shape.

    Example:
        >>> import jax, lrjax
        >>> problem = lrjax.robust_pca(jax.random.key(0), (30, 20), 2, 0.1)
        >>> problem.targets.shape, round(float((problem.loss(problem.truth) > 0)))
        ((30, 20), 1)
    """

    def __new__(
        cls,
        key: PRNGKeyArray,
        shape: tuple[int, int],
        rank: int,
        outlier_fraction: ArrayLike = 0.1,
        *,
        observed: ArrayLike = 1.0,
        outlier_scale: ArrayLike = 1.0,
        noise: ArrayLike = 0.0,
        condition: ArrayLike = 1.0,
        objective: Objective | None = None,
        dtype=jnp.float32,
    ) -> Problem:
        check_key("robust_pca", key)
        k_truth, k_operator, k_corrupt = jr.split(key, 3)
        truth = _unit_entries(_random_truth(k_truth, shape, rank, condition, False, dtype))
        corruption = _Corruption(outlier_fraction, outlier_scale, noise)
        y = corruption.apply(k_corrupt, truth.materialize())
        if isinstance(observed, int | float) and observed == 1:
            return Problem(Identity(shape), y, _or_l1(objective), truth)
        mask = jr.bernoulli(k_operator, observed, shape)
        return Problem(Masked(mask), jnp.where(mask, y, 0), _or_l1(objective), truth)

    @staticmethod
    def from_data(
        matrix: Float[Array, "m n"],
        mask: Bool[Array, "..."] | None = None,
        *,
        truth: LowRank | Float[Array, "m n"] | None = None,
        objective: Objective | None = None,
    ) -> Problem:
        """The problem of a given matrix, of which ``mask`` tells the observed entries."""
        observed, mask = observed_entries(matrix, mask)
        return Problem(Masked(mask), observed, _or_l1(objective), truth)


def observed_entries(
    matrix: Float[Array, "m n"], mask: Bool[Array, "..."] | None
) -> tuple[Float[Array, "m n"], Bool[Array, "m n"]]:
    """The matrix with zeros for what is not observed, and the mask of what is."""
    finite = jnp.isfinite(matrix)
    if mask is None:
        mask = finite
    elif mask.shape != matrix.shape:
        raise ValueError(
            f"the mask must have the shape of the matrix, {matrix.shape}; got {mask.shape}."
        )
    else:
        mask = mask & finite
    return jnp.where(mask, matrix, 0), mask


def _unit_entries(x: LowRank) -> LowRank:
    """Scale a matrix to a root mean square of its entries of one."""
    m, n = x.shape
    size = jnp.sqrt(jnp.sum((x.left.mT @ x.left) * (x.right.mT @ x.right)) / (m * n))
    root = jnp.sqrt(size)
    return LowRank(x.left / root, x.right / root)


def _or_l1(objective: Objective | None) -> Objective:
    return L1() if objective is None else objective

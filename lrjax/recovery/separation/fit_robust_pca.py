import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ...linalg import nonzero, working_dtype
from ...lowrank import LowRank
from .._inputs import MatrixLike, as_matrix, check_not_negative, check_width
from ..derivatives import refuse_derivatives
from ..fill_in import fill_in
from ..problems import observed_entries
from .augmented_lagrangian import Parts, leading, separate


GROWTH = 1.5  # of the penalty; 1.3 takes 1.5 times the steps for the same errors
WEIGHT = 0.7  # of the nuclear norm, in units of sqrt(observed fraction · longer side)
WIDEST = 40  # default width where the rank is not given
NO_DERIVATIVE = (
    "{} has no derivative: at a matrix that is low-rank plus sparse its result moves by "
    "another amount for a small error than for minus that error. Differentiate the steps "
    "of lrjax.recovery.principal_component_pursuit(…, tol=None), or hold the fit constant "
    "with jax.lax.stop_gradient."
)
NOISE = 20.0  # singular values below NOISE · tol · σ_1 do not count as rank


class RobustPCAFit(eqx.Module):
    """A matrix taken apart into a low-rank and a sparse part.

    Attributes:
        low_rank: the low-rank part; ``right`` has orthonormal columns, the columns of
            ``left`` fall in size; those of both from ``rank`` on are zero.
        sparse: ``(m, n)``, the gross errors; zero where nothing is observed.
        values: singular values of all rows seen, by this fit and by those that it is an
            :meth:`update` of.
        rank: the number of columns in use.
        residual: ``‖matrix − low_rank − sparse‖ / ‖matrix‖`` over what is observed.
        steps: iterations taken.
        tol: the tolerance of the fit, also that of what follows from it.
        nuclear_weight: that of the fit, also that of its updates.
    """

    low_rank: LowRank
    sparse: Float[Array, "m n"]
    values: Float[Array, " r"]
    rank: Int[Array, ""]
    residual: Float[Array, ""]
    steps: Int[Array, ""]
    tol: Float[Array, ""]
    nuclear_weight: Float[Array, ""]

    @property
    def converged(self) -> Bool[Array, ""]:
        """Whether the residual fell to the tolerance."""
        return self.residual <= self.tol

    def transform(
        self, rows: MatrixLike, mask: MatrixLike | None = None
    ) -> Float[Array, "k r"]:
        """The coordinates of new rows in the basis ``low_rank.right``, robustly.

        Each row is regressed on the basis in the l1 norm, so that gross errors and
        missing entries are as harmless in new rows as they were in the fit.

        Args:
            rows: ``(k, n)``; entries that are not finite count as missing.
            mask: which entries are observed.

        Returns:
            ``(k, width)``: new rows of ``low_rank.left``. The clean rows are
            ``fit.transform(rows) @ fit.low_rank.right.T``.

        Raises:
            ValueError: if the rows have another length than those of the fit, or the
                mask another shape than the rows; where it is differentiated, as
                :func:`fit_robust_pca`.
        """
        (self,) = _without_derivative("RobustPCAFit.transform", self)
        matrix, seen = _observed("RobustPCAFit.transform", rows, mask)
        _check_length("transform", matrix, self.low_rank)
        parts = separate(
            matrix,
            seen,
            matrix,
            self.low_rank.right,
            sparse_weight=1.0,
            penalty=_first_penalty(jnp.sqrt(jnp.max(jnp.sum(matrix * matrix, axis=-1)))),
            penalty_growth=1.2,
            tol=self.tol,
            max_steps=300,
            adapt_basis=False,
        )
        return parts.vectors

    def update(
        self,
        rows: MatrixLike,
        mask: MatrixLike | None = None,
        *,
        max_steps: int = 100,
    ) -> "RobustPCAFit":
        """The fit of more rows of the same matrix: the basis learns, rows may go.

        For matrices larger than memory. What was seen before enters as ``diag(values) @
        low_rank.right.T``: ``width`` rows without errors, with the same singular values
        and right vectors. With the new rows below them it is taken apart as the matrix
        was, so that no more than one batch of rows is ever held. Where all rows fit a
        rank of ``width``, nothing is lost.

        A second pass over the data gives the coordinates of all rows in the last basis::

            fit = lrjax.fit_robust_pca(first)
            for rows in rest:
                fit = fit.update(rows)
            left = [fit.transform(rows) for rows in batches]

        Args:
            rows: ``(k, n)``; entries that are not finite count as missing.
            mask: which entries are observed.
            max_steps: as in :func:`fit_robust_pca`.

        Returns:
            A fit with ``low_rank.left`` and ``sparse`` of the new rows alone.

        Raises:
            ValueError: as :meth:`transform`.
        """
        (self,) = _without_derivative("RobustPCAFit.update", self)
        matrix, seen = _observed("RobustPCAFit.update", rows, mask)
        _check_length("update", matrix, self.low_rank)
        known = self.values[:, None] * self.low_rank.right.T
        width = len(self.values)
        start = _filled(matrix, seen)
        parts = _take_apart(
            jnp.concatenate([known, matrix]),
            jnp.concatenate([jnp.ones_like(known, bool), seen]),
            jnp.concatenate([known, start]),
            width,
            nuclear_weight=self.nuclear_weight * _scale(seen),
            trusted=width,
            tol=self.tol,
            max_steps=max_steps,
        )
        return _assemble(parts, self.tol, self.nuclear_weight, skip=width)


def fit_robust_pca(
    matrix: MatrixLike,
    *,
    mask: MatrixLike | None = None,
    rank: int | None = None,
    nuclear_weight: ArrayLike = WEIGHT,
    tol: ArrayLike = 1e-6,
    max_steps: int = 100,
) -> RobustPCAFit:
    """Robust PCA: a matrix taken apart into a low-rank part and sparse gross errors.

    Principal component pursuit, ``min w ‖L‖_* + ‖S‖_1`` with ``L + S = matrix`` where
    observed and ``w = nuclear_weight · sqrt(observed fraction · max(m, n))``, by the
    inexact augmented Lagrangian. Its singular vectors are tracked by one step of subspace
    iteration at a fixed width: three products with thin matrices and decompositions of
    ``width × width`` matrices an iteration, never an SVD of the matrix. Neither the
    rank, nor the share of errors, nor their size has to be known.

    Pure: jit it (with ``rank`` and ``max_steps`` static) and ``vmap`` it
    over matrices. Rows sharded over a mesh stay where they are. For a matrix that does
    not fit the memory see :meth:`RobustPCAFit.update`.

    Not differentiable, and refused in both modes: at ``L + S`` of rank r and support Ω the
    solution of the program follows changes within ``T_L + Ω``, where T_L is the tangent
    space, but with an error ``E`` outside it moves as an l1 regression does, which has
    another slope for ``E`` than for ``−E``. Decisions of its support would make it linear
    and another estimator.

    Args:
        matrix: real ``(m, n)``: an array, a ``numpy.ma`` array, a pandas table, with a mask
            also one of scipy.sparse. Integers count as float32. Entries that are not finite
            count as missing, also whole rows and columns: their low-rank part is zero.
        mask: boolean, true where an entry is observed.
        rank: the width of the factors: the rank, if it is known, or anything above it;
            by default 40 or the shorter side.
        nuclear_weight: of the nuclear norm, 1 in the theory. Exactly low-rank data are
            recovered for a range of weights; on real data more weight means a lower rank.
        tol: stop when low-rank and sparse part explain the observed matrix to this
            relative residual.
        max_steps: at most as many iterations; 20 to 40 are usual.

    Returns:
        A :class:`RobustPCAFit`.

    Raises:
        ValueError: for a matrix without entries or axes or with complex ones, a mask of
            another shape or that is not boolean, a sparse matrix without a mask, a rank out
            of range, or a negative weight or tolerance; where it is differentiated by the
            matrix or a number.
        TypeError: for a rank that is no integer; booleans, dates, text, other objects.

    Example:
        >>> import jax, lrjax
        >>> problem = lrjax.robust_pca(jax.random.key(0), (80, 60), 2, 0.1)
        >>> fit = lrjax.fit_robust_pca(problem.targets)
        >>> int(fit.rank), bool(problem.relative_error(fit.low_rank) < 1e-4)
        (2, True)

    Reference:
        E. J. Candès, X. Li, Y. Ma, J. Wright, "Robust principal component analysis?"
        (2011), arXiv 0912.3599; Z. Lin, M. Chen, Y. Ma, "The augmented Lagrange
        multiplier method for exact recovery of corrupted low-rank matrices" (2010),
        arXiv 1009.5055.
    """
    check_not_negative("fit_robust_pca", tol=tol, nuclear_weight=nuclear_weight)
    tol, nuclear_weight = _without_derivative("fit_robust_pca", tol, nuclear_weight)
    matrix, seen = _observed("fit_robust_pca", matrix, mask)
    tol, weight = (jnp.asarray(x, matrix.dtype) for x in (tol, nuclear_weight))
    parts = _take_apart(
        matrix,
        seen,
        _filled(matrix, seen),
        _width(matrix.shape, rank),
        nuclear_weight=weight * _scale(seen),
        tol=tol,
        max_steps=max_steps,
    )
    return _assemble(parts, tol, weight)


def _without_derivative(method: str, *inputs):
    return refuse_derivatives(NO_DERIVATIVE.format(method), inputs)


def _observed(
    method: str, matrix: MatrixLike, mask: MatrixLike | None
) -> tuple[Array, Array]:
    """Zeros for what is not observed, and the mask of what is."""
    matrix, mask = as_matrix(method, matrix, mask)
    (matrix,) = _without_derivative(method, jnp.asarray(matrix))
    dtype = working_dtype(jnp.result_type(matrix.dtype, jnp.float32))
    mask = None if mask is None else jnp.asarray(mask)
    return observed_entries(matrix.astype(dtype), mask)


def _check_length(method: str, rows: Array, fitted: LowRank) -> None:
    n = fitted.shape[-1]
    if rows.shape[-1] != n:
        raise ValueError(
            f"{method} needs rows of shape (k, {n}), as wide as the matrix of the fit; "
            f"got {rows.shape}."
        )


def _width(shape: tuple[int, ...], rank: int | None) -> int:
    """The width of the factors."""
    short = min(shape)
    if rank is None:
        return min(WIDEST, short)
    return check_width("fit_robust_pca", rank, short, shape)


def _scale(mask: Array) -> Array:
    """The natural scale of the weight, ``sqrt(observed fraction · longer side)``."""
    share = jnp.mean(mask, dtype=jnp.float32)
    return jnp.sqrt(jnp.maximum(share, 1 / mask.size) * max(mask.shape))


def _filled(matrix: Array, mask: Array) -> Array:
    """Medians over the longer side for outliers and missing entries.

    Zeros where a whole row or column is missing: there the low-rank part stays zero.
    """
    if matrix.shape[0] < matrix.shape[1]:
        return _filled(matrix.T, mask.T).T
    start = fill_in(matrix, mask)
    return jnp.where(jnp.any(mask, axis=1, keepdims=True), start, 0)


def _first_penalty(largest: Array) -> Array:
    # The first step cuts the singular values by 0.8 of the largest.
    return 1.25 / nonzero(largest)


def _take_apart(
    matrix: Array,
    mask: Array,
    start: Array,
    width: int,
    *,
    nuclear_weight: Array,
    tol: Array,
    max_steps: int,
    trusted: int = 0,
) -> Parts:
    """Separate a matrix, the first rows of which are known to be clean.

    With the longer side as rows: the basis that each step computes with is short.
    """
    m, n = matrix.shape
    # The program divided by the weight of the nuclear norm. An infinite weight of the
    # sparse part allows no errors in rows that are known to be clean.
    sparse_weight = jnp.where(jnp.arange(m) < trusted, jnp.inf, 1 / nuclear_weight)[:, None]
    wide = m < n
    if wide:
        matrix, mask, start = matrix.T, mask.T, start.T
        sparse_weight = sparse_weight.T
    # From random columns three steps settle the leading vectors, which the iteration
    # tracks, and their order, which its decompositions rely on.
    basis = jr.normal(jr.key(0), (min(m, n), width), matrix.dtype)
    _, values, basis = lax.fori_loop(
        0, 2, lambda _, found: leading(start, found[-1]), leading(start, basis)
    )
    parts = separate(
        matrix,
        mask,
        start,
        basis,
        sparse_weight=sparse_weight,
        penalty=_first_penalty(values[0]),
        penalty_growth=GROWTH,
        tol=tol,
        max_steps=max_steps,
    )
    if wide:
        parts = parts._replace(
            vectors=parts.basis, basis=parts.vectors, sparse=parts.sparse.T
        )
    return parts


def _assemble(parts: Parts, tol: Array, weight: Array, skip: int = 0) -> RobustPCAFit:
    # What is left of a singular value near the tolerance is not told from noise.
    values = parts.values
    values = jnp.where(values > NOISE * tol * values[0], values, 0)
    left = (parts.vectors * values[None, :])[skip:]
    right = jnp.where(values[None, :] > 0, parts.basis, 0)
    return RobustPCAFit(
        low_rank=LowRank(left, right),
        sparse=parts.sparse[skip:],
        values=values,
        rank=jnp.sum(values > 0, dtype=jnp.int32),
        residual=parts.residual,
        steps=parts.steps,
        tol=tol,
        nuclear_weight=weight,
    )

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ..._progress import Meter
from ...linalg import nonzero, working_dtype
from ...lowrank import LowRank
from .._inputs import MatrixLike, as_matrix, check_not_negative, check_width
from .._plots import norm_of_noise, plot_fit, refuse_batch, sampled_entries
from .._variance import explained_variance_ratio
from ..derivatives import refuse_derivatives
from ..problems import observed_entries
from .augmented_lagrangian import Parts
from .groups import Groups, groups_of
from .held_out import Choice, Weights
from .take_apart import coordinates, take_apart


WEIGHTS = Weights((0.85, 1.0, 0.7, 1.2), 0.7, 1.0)  # where none is given
WIDEST = 40  # width to begin with where the rank is not given
TRUSTED = 0.1  # error of entries held out, relative to the low-rank part
FINEST = 4.0  # rounding errors, the lowest tolerance
NOISE = 20.0  # singular values below NOISE · tol · σ_1 do not count as rank
NO_DERIVATIVE = (
    "{} has no derivative: at a matrix that is low-rank plus sparse its result moves by "
    "another amount for a small error than for minus that error. Differentiate the steps "
    "of lrjax.recovery.principal_component_pursuit(…, tol=None), or hold the fit constant "
    "with jax.lax.stop_gradient."
)


class RobustPCAFit(eqx.Module):
    """A matrix taken apart into a low-rank and a sparse part.

    Attributes:
        low_rank: the low-rank part; ``right`` has orthonormal columns, the columns of
            ``left`` fall in size; those of both from ``rank`` on are zero.
        sparse: ``(m, n)``, the gross errors; zero where nothing is observed.
        values: singular values of all rows seen, by this fit and by those that it is an
            :meth:`update` of.
        rank: the number of columns in use.
        residual: what low-rank part, sparse part and noise leave of the observed matrix,
            relative to the low-rank part.
        steps: iterations taken, of all weights that were tried.
        tol: the tolerance of the fit, also that of what follows from it.
        nuclear_weight: that of the fit, also that of its updates.
        noise: estimated standard deviation of what neither part explains, in the units
            of the matrix; zero where there is none or none was told from errors.
        held_out_error: the median error of the low-rank part where entries were hidden
            from it, relative to its root mean square; infinite where none was hidden, as
            the fit proved itself or there were too few entries. Gross errors among
            them, up to half, do not count.
        proven: whether the low-rank part is equal to more entries than it has free
            numbers, by a tenth of the entries: of the matrix, of each row and of each
            column. That is no accident: the fit is exact.
        predicted: whether the held-out error is at most a tenth, at a rank below the
            default width, and the same as for ``proven`` holds up to three times its
            size: no row and no column has a direction for itself alone.
        groups: of the entries that are wrong together.
    """

    low_rank: LowRank
    sparse: Float[Array, "m n"]
    values: Float[Array, " r"]
    rank: Int[Array, ""]
    residual: Float[Array, ""]
    steps: Int[Array, ""]
    tol: Float[Array, ""]
    nuclear_weight: Float[Array, ""]
    noise: Float[Array, ""]
    held_out_error: Float[Array, ""]
    proven: Bool[Array, ""]
    predicted: Bool[Array, ""]
    groups: Groups = eqx.field(static=True)

    @property
    def converged(self) -> Bool[Array, ""]:
        """Whether the residual fell to the tolerance."""
        return self.residual <= self.tol

    @property
    def trusted(self) -> Bool[Array, ""]:
        """Whether the fit converged and is proven or predicted; else do not use it unseen.

        A fit that is proven is exact; one that is predicted, as near as
        ``held_out_error`` says.
        """
        return self.converged & (self.proven | self.predicted)

    @property
    def explained_variance_ratio(self) -> Float[Array, " r"]:
        """The share of the variance along each principal component, falling.

        Of the rows of ``low_rank``, centered, over their whole variance without gross
        errors: theirs and that of ``noise``.
        """
        m, n = self.low_rank.shape
        # The low-rank part has taken up its share of the noise.
        free = jnp.maximum(m - 1 - self.rank, 0) * (n - self.rank)
        return explained_variance_ratio(self.low_rank, free * self.noise**2)

    def plot(self) -> Any:
        """Draw the singular values with the rank, and all sizes that tell of errors.

        Right: how many entries of the low-rank part and gross errors are how large, with
        lines at the error where entries were held out and at the noise. A fit is good
        where these are far left of the low-rank part.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: for a batch of fits.
        """
        refuse_batch(self)
        entries = sampled_entries(self.low_rank)
        levels = {
            "error of entries held out": self.held_out_error
            * jnp.sqrt(jnp.mean(entries**2)),
            "noise": self.noise,
        }
        spectra = {"": (self.values, self.rank)}
        noise = norm_of_noise(self.noise, self.low_rank.shape)
        return plot_fit(self, spectra, entries, self.sparse, levels, noise)

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
        return coordinates(matrix, seen, self.low_rank.right, self.tol)

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
        width = len(self.values)
        parts, choice = take_apart(
            matrix,
            seen,
            width,
            weights=_all(self.nuclear_weight),
            tol=self.tol,
            max_steps=max_steps,
            groups=self.groups,
            known=self.values[:, None] * self.low_rank.right.T,
        )
        return _assemble(parts, choice, self.tol, self.groups, width)


def fit_robust_pca(
    matrix: MatrixLike,
    *,
    mask: MatrixLike | None = None,
    rank: int | None = None,
    nuclear_weight: ArrayLike | None = None,
    errors: str | tuple[int, int] = "entries",
    tol: ArrayLike = 1e-6,
    max_steps: int = 100,
    progress: bool = False,
) -> RobustPCAFit:
    """Robust PCA: a matrix taken apart into a low-rank part and sparse gross errors.

    Principal component pursuit, ``min w ‖L‖_* + ‖S‖_1`` with ``L + S = matrix`` where
    observed and ``w = nuclear_weight · sqrt(observed fraction · max(m, n))``, by an
    augmented Lagrangian whose penalty grows only as fast as the iteration stays optimal.
    Its singular vectors are tracked by one step of subspace
    iteration at a fixed width: three products with thin matrices and decompositions of
    ``width × width`` matrices an iteration, never an SVD of the matrix. Neither the
    rank, nor the share of errors, nor their size has to be known.

    What is not told is chosen by the data. A low-rank part that is equal to many more
    entries than it has free numbers, in every row and every column, is no accident: the
    first weight that gives one is taken. Where none does, the weight is 0.7, and one entry
    in twenty, at most 10,000, is hidden: they show whether there is noise on all entries
    beside the errors on a few. With noise of standard deviation σ the weight is 1 and
    the program is the stable one, ``min ‖L‖_* + ‖S‖_1/w + ‖matrix − L − S‖²/2τ`` with τ a
    quarter above the norm of a matrix of noise, ``σ (√m + √n)``, and least squares at its
    rank and its errors follow. All entries are fitted in the end. Of a matrix with more
    than 512 rows or columns all are fitted once in a hurry, and where that does not prove
    itself, once more as is best for 512 of them. The same evidence says whether the result
    can be ``trusted``: a small residual does not, since any matrix is the sum of two parts.

    Pure: jit it (with ``rank``, ``errors`` and ``max_steps`` static) and ``vmap`` it
    over matrices. Rows sharded over a mesh stay where they are. For a matrix that does
    not fit the memory see :meth:`RobustPCAFit.update`. The fit of ``a · matrix`` is ``a``
    times the fit: bit by bit for a power of two, and else to rounding.

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
        rank: the width of the factors: the rank, if it is known, or anything above it.
            By default 40 or the shorter side, and twice as much as long as the rank found
            uses up all of it and a wider fit is better. Under ``jit`` shapes are fixed:
            there the width stays 40, and the fit is not trusted if that is not enough.
        nuclear_weight: of the nuclear norm, 1 in the theory; by default chosen.
        errors: what is wrong together. ``"entries"``, each for itself; ``"rows"`` or
            ``"columns"`` as a whole; ``(h, w)``: blocks of h rows and w columns. For all
            but entries, lengths of the groups take the place of absolute values in
            ``‖S‖_1``, which is outlier pursuit. The low-rank part of a row that is wrong
            as a whole is what its column space has nearest to zero, not the truth.
        tol: stop when low-rank and sparse part explain the observed matrix to this
            residual, relative to the low-rank part; at least four rounding errors.
        max_steps: at most as many iterations of a fit; 20 to 80 are usual.
        progress: show a progress bar with the residual for each fit that is made on the
            way, as :func:`lrjax.solve` does.

    Returns:
        A :class:`RobustPCAFit`.

    Raises:
        ValueError: for a matrix without entries or axes or with complex ones, a mask of
            another shape or that is not boolean, a sparse matrix without a mask, a rank out
            of range, a negative weight or tolerance, or errors of another kind; where it is
            differentiated by the matrix or a number.
        TypeError: for a rank that is no integer; booleans, dates, text, other objects.
        ImportError: with ``progress`` where tqdm is not installed.

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
        arXiv 1009.5055; with noise: Z. Zhou, X. Li, J. Wright, E. Candès, Y. Ma, "Stable
        principal component pursuit" (2010), arXiv 1001.2363; errors of rows and columns:
        H. Xu, C. Caramanis, S. Sanghavi, "Robust PCA via outlier pursuit" (2010),
        arXiv 1010.4237.
    """
    weights = WEIGHTS
    if nuclear_weight is not None:
        check_not_negative("fit_robust_pca", nuclear_weight=nuclear_weight)
        weights = _all(*_without_derivative("fit_robust_pca", nuclear_weight))
    check_not_negative("fit_robust_pca", tol=tol)
    (tol,) = _without_derivative("fit_robust_pca", tol)
    matrix, seen = _observed("fit_robust_pca", matrix, mask)
    tol = jnp.maximum(jnp.asarray(tol, matrix.dtype), FINEST * jnp.finfo(matrix.dtype).eps)
    groups = groups_of(errors, matrix.shape)
    meter = Meter("lrjax.fit_robust_pca", max_steps, "residual") if progress else None

    def fit(width: int) -> RobustPCAFit:
        parts, choice = take_apart(
            matrix,
            seen,
            width,
            weights=weights,
            tol=tol,
            max_steps=max_steps,
            groups=groups,
            meter=meter,
        )
        saturates = min(matrix.shape) if rank else width
        return _assemble(parts, choice, tol, groups, saturates)

    found = fit(_width(matrix.shape, rank))
    return found if rank is not None else _widened(fit, found)


def _widened(fit: Callable[[int], RobustPCAFit], found: RobustPCAFit) -> RobustPCAFit:
    """Fits of twice the width, while the rank found uses up all of it and that helps.

    A fit of the whole width that proves itself needs no more.
    """
    short = min(found.sparse.shape)
    while not isinstance(found.rank, Tracer):
        width = found.low_rank.rank
        if width == short or found.rank < width or found.trusted:
            break
        wider = fit(min(2 * width, short))
        if not (wider.trusted | (wider.held_out_error < found.held_out_error)):
            break
        found = wider
    return found


def _all(weight: ArrayLike) -> Weights:
    return Weights((weight,), weight, weight)


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


def _assemble(
    parts: Parts, choice: Choice, tol: Array, groups: Groups, width: int
) -> RobustPCAFit:
    # What is left of a singular value near the tolerance is not told from noise.
    values = parts.values
    values = jnp.where(values > NOISE * tol * values[0], values, 0)
    left = parts.vectors * values[None, :]
    right = jnp.where(values[None, :] > 0, parts.basis, 0)
    rank = jnp.sum(values > 0, dtype=jnp.int32)
    full = (rank == width) & (width < min(parts.sparse.shape))
    predicted = choice.alike & ~full & (choice.error <= TRUSTED * choice.size)
    told = (choice.size > 0) | (choice.error == 0)  # relative to something
    return RobustPCAFit(
        low_rank=LowRank(left, right),
        sparse=parts.sparse,
        values=values,
        rank=rank,
        residual=parts.residual,
        steps=parts.steps,
        tol=tol,
        nuclear_weight=choice.weight,
        noise=choice.noise,
        held_out_error=jnp.where(told, choice.error / nonzero(choice.size), jnp.inf),
        proven=choice.certain,
        predicted=predicted & (choice.size > 0),
        groups=groups,
    )

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from ..._sharding import einsum
from ...linalg import gram, orthonormalize
from ...linalg.gram import working_dtype
from ...lowrank import LowRank
from ..problem import Problem
from ..problems import robust_pca
from ..spectral_init import filled, spectral_init
from .augmented_lagrangian import Separation, separate, threshold


GROWTH = 1.5  # of the penalty; 1.2 takes twice the steps for the same errors
WEIGHT = 0.7  # of the nuclear norm, in units of sqrt(observed fraction · longer side)
WIDEST = 40  # default width where the rank is not given
NOISE = 20.0  # singular values below NOISE · tol · σ_1 do not count as rank


class RobustPCAFit(eqx.Module):
    """A matrix taken apart into a low-rank and a sparse part.

    Attributes:
        low_rank: the low-rank part; ``right`` has orthonormal columns, ``left`` is
            sorted by size, its columns from ``rank`` on are zero.
        sparse: ``(m, n)``, the gross errors; zero where nothing is observed.
        rank: the number of columns in use.
        residual: ``‖matrix − low_rank − sparse‖ / ‖matrix‖`` over what is observed.
        steps: iterations taken.
        tol: the tolerance of the fit, also that of :meth:`transform`.
    """

    low_rank: LowRank
    sparse: Float[Array, "m n"]
    rank: Int[Array, ""]
    residual: Float[Array, ""]
    steps: Int[Array, ""]
    tol: Float[Array, ""]

    def transform(
        self, rows: Real[Array, "..."], mask: Bool[Array, "..."] | None = None
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
            ValueError: if the rows have another length than those of the fit.
        """
        n = self.low_rank.shape[-1]
        if rows.ndim != 2 or rows.shape[-1] != n:
            raise ValueError(
                f"transform needs rows of shape (k, {n}), as wide as the matrix of the "
                f"fit; got {rows.shape}."
            )
        problem = robust_pca.from_data(_floating(rows), mask)
        basis = self.low_rank.right
        basis = jnp.where(jnp.arange(basis.shape[-1])[None, :] < self.rank, basis, 0)
        parts = separate(
            problem.targets,
            problem.operator.mask,
            problem.targets,
            basis,
            weight=1.0,
            penalty=_first_penalty(_largest_row(problem.targets)),
            growth=1.2,
            tol=self.tol,
            max_steps=300,
            shrink=False,
            adapt_basis=False,
        )
        return parts.image


def fit_robust_pca(
    matrix: Real[Array, "..."],
    *,
    mask: Bool[Array, "..."] | None = None,
    rank: int | None = None,
    max_rank: int | None = None,
    weight: ArrayLike = WEIGHT,
    tol: ArrayLike = 1e-6,
    max_steps: int = 100,
) -> RobustPCAFit:
    """Take a matrix apart into a low-rank part and sparse gross errors.

    Principal component pursuit, ``min w ‖L‖_* + ‖S‖_1`` with ``L + S = matrix`` where
    observed and ``w = weight · sqrt(observed fraction · max(m, n))``, by the inexact
    augmented Lagrangian on factors of fixed width: two decompositions of ``width ×
    width`` and ``min(m, n) × width`` matrices an iteration, never an SVD of the matrix.
    Neither the rank, nor the share of errors, nor their size has to be known.

    Pure: jit it (with ``rank``, ``max_rank``, ``max_steps`` static) and ``vmap`` it
    over matrices.

    Args:
        matrix: real ``(m, n)``; entries that are not finite count as missing.
        mask: true where an entry is observed.
        rank: the rank, if it is known: then L is the projection on that many singular
            vectors, which is not biased toward zero.
        max_rank: the width of the factors where the rank is not given, at least the
            rank to be found; by default 40 or the shorter side.
        weight: of the nuclear norm. Exactly low-rank data are recovered for a range of
            weights; on real data more weight means a lower rank.
        tol: stop when low-rank and sparse part explain the observed matrix to this
            relative residual.
        max_steps: at most as many iterations; the default takes a residual of 1 far
            below the rounding error of float32.

    Returns:
        A :class:`RobustPCAFit`.

    Raises:
        ValueError: for a matrix without entries or axes, a mask of another shape, a
            rank out of range, or both ``rank`` and ``max_rank``.

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
    width = _check_fit(matrix, rank, max_rank)
    m, n = matrix.shape
    if m < n:
        flipped = fit_robust_pca(
            matrix.T,
            mask=None if mask is None else mask.T,
            rank=rank,
            max_rank=max_rank,
            weight=weight,
            tol=tol,
            max_steps=max_steps,
        )
        return _transpose(flipped)
    problem = robust_pca.from_data(_floating(matrix), mask)
    basis, largest = _first_basis(problem, width)
    observed = jnp.mean(problem.operator.mask, dtype=problem.targets.dtype)
    scale = jnp.sqrt(jnp.maximum(observed, 1 / (m * n)) * m)
    parts = separate(
        problem.targets,
        problem.operator.mask,
        filled(problem),
        basis,
        weight=1 / (jnp.asarray(weight, scale.dtype) * scale),
        penalty=_first_penalty(largest),
        growth=GROWTH,
        tol=tol,
        max_steps=max_steps,
        shrink=rank is None,
    )
    return _assemble(problem, parts, jnp.asarray(tol, scale.dtype), rank is None)


def _check_fit(matrix: Array, rank: int | None, max_rank: int | None) -> int:
    """Refuse what cannot be fitted; the width of the factors."""
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(
            f"fit_robust_pca needs a matrix (m, n) with entries, got shape {matrix.shape}. "
            "For several matrices at once use jax.vmap."
        )
    if rank is not None and max_rank is not None:
        raise ValueError("give rank (it is known) or max_rank (it is not), not both.")
    short = min(matrix.shape)
    width = rank if rank is not None else max_rank
    if width is None:
        return min(WIDEST, short)
    if not 1 <= width <= short:
        name = "rank" if rank is not None else "max_rank"
        raise ValueError(
            f"{name} must be between 1 and {short} for a matrix of shape "
            f"{matrix.shape}, got {width}."
        )
    return width


def _floating(matrix: Array) -> Array:
    return matrix.astype(working_dtype(jnp.result_type(matrix.dtype, jnp.float32)))


def _first_basis(problem: Problem, width: int) -> tuple[Array, Array]:
    """Right singular vectors of the filled matrix and its largest singular value."""
    start = spectral_init(problem, width, key=jr.key(0), power_iters=2)
    basis = orthonormalize(start.right, method="cholesky")
    return basis, jnp.sqrt(jnp.max(jnp.diagonal(gram(filled(problem) @ basis))))


def _first_penalty(largest: Array) -> Array:
    return 1.25 / jnp.where(largest > 0, largest, 1)


def _largest_row(rows: Array) -> Array:
    return jnp.sqrt(jnp.max(jnp.sum(rows * rows, axis=-1)))


def _assemble(
    problem: Problem, parts: Separation, tol: Array, shrink: bool
) -> RobustPCAFit:
    image = parts.image
    if shrink:
        image = einsum("md,de->me", image, threshold(image, parts.penalty))
    # Not from the Gram matrix, which cannot resolve values below sqrt(eps) σ_1.
    triangular = einsum("md,me->de", orthonormalize(image, method="cholesky"), image)
    _, values, vt = jnp.linalg.svd(triangular)
    vectors = vt.T
    used = values > NOISE * tol * values[0]
    left = einsum("md,de->me", image, jnp.where(used[None, :], vectors, 0))
    right = einsum("nd,de->ne", parts.basis, vectors)
    return RobustPCAFit(
        low_rank=LowRank(left, right),
        sparse=jnp.where(problem.operator.mask, parts.sparse, 0),
        rank=jnp.sum(used, dtype=jnp.int32),
        residual=parts.residual,
        steps=parts.steps,
        tol=tol,
    )


def _transpose(fit: RobustPCAFit) -> RobustPCAFit:
    """The fit of the transpose, its right factor orthonormal again."""
    left = fit.low_rank.left
    sizes = jnp.sqrt(jnp.sum(left * left, axis=0, keepdims=True))
    used = jnp.arange(left.shape[-1])[None, :] < fit.rank
    right = jnp.where(used, left / jnp.where(used, sizes, 1), 0)
    low_rank = LowRank(fit.low_rank.right * jnp.where(used, sizes, 0), right)
    return RobustPCAFit(low_rank, fit.sparse.T, fit.rank, fit.residual, fit.steps, fit.tol)

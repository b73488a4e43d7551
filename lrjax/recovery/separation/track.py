import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float

from ...linalg import (
    cross,
    nonzero,
    order_statistic,
    orthonormalize,
    outer,
    svd,
    times,
)
from .._inputs import MatrixLike, as_matrix
from ..problems import observed_entries
from .fit_robust_pca import RobustPCAFit


REWEIGHTINGS = 10  # of the regression of a row
SPREADS = 6.0  # median deviations beyond which an entry is a gross error
RIDGE = 1e-6  # of the regression: rows with fewer entries than directions stay finite


class TrackedRows(eqx.Module):
    """Rows taken apart by a tracker, ``rows ≈ clean + sparse``.

    Attributes:
        clean: ``(k, n)``, their projections on the subspace of their time.
        sparse: ``(k, n)``, the gross errors; zero where nothing is observed.
    """

    clean: Float[Array, "k n"]
    sparse: Float[Array, "k n"]


class SubspaceTracker(eqx.Module):
    """A subspace that moves, followed through rows with gross errors and gaps.

    Rows come one by one or in batches. Each is regressed on the basis in the l1 norm;
    entries further off than six median deviations count as gross errors and are replaced
    by the regression, as gaps are. With the cleaned rows below them, the memory
    ``forget · diag(values) basisᵀ`` is decomposed anew:

        u ← argmin ‖x − basis u‖_1,   c ← x where it is right, basis u elsewhere,
        diag(values) basisᵀ ← leading part of the SVD of [forget · diag(values) basisᵀ; c].

    A row costs ``O(n r²)``, and nothing but the basis is kept. What
    :meth:`RobustPCAFit.update` does is another thing: it forgets nothing and takes
    batches apart together, for a subspace that stays.

    Attributes:
        basis: ``(n, r)``, orthonormal columns.
        values: ``(r,)``, their weights in the memory.
        forget: what a batch leaves of them, between 0 and 1.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> problem = lrjax.robust_pca(jax.random.key(0), (90, 40), 2, 0.05)
        >>> fit = lrjax.fit_robust_pca(problem.targets[:60])
        >>> tracker = lrjax.recovery.SubspaceTracker.from_fit(fit)
        >>> tracker, seen = tracker.track(problem.targets[60:])
        >>> error = seen.clean - problem.truth.materialize()[60:]
        >>> bool(jnp.linalg.norm(error) < 1e-2 * jnp.linalg.norm(seen.clean))
        True

    Reference:
        J. He, L. Balzano, A. Szlam, "Incremental gradient on the Grassmannian for online
        foreground and background separation in subsampled video" (2012), IEEE Conference on
        Computer Vision and Pattern Recognition; P.
        Narayanamurthy, N. Vaswani, "Provable dynamic robust PCA or robust subspace
        tracking" (2019), arXiv 1705.08948. Special case: without errors, gaps and
        forgetting, the incremental SVD.
    """

    basis: Float[Array, "n r"]
    values: Float[Array, " r"]
    forget: Float[Array, ""]

    @staticmethod
    def from_fit(
        fit: RobustPCAFit, *, rank: int | None = None, forget: ArrayLike = 0.9
    ) -> "SubspaceTracker":
        """Start from a fit of the first rows.

        Args:
            fit: of some rows.
            rank: the number of directions, by default ``int(fit.rank)``; to be given
                where the fit is traced.
            forget: what a batch leaves of the memory: near 1 for a slow motion and much
                noise; ``1/(1 − forget)`` batches are remembered.
        """
        width = max(1, int(fit.rank)) if rank is None else rank
        dtype = fit.low_rank.dtype
        basis = fit.low_rank.right[:, :width]
        return SubspaceTracker(basis, fit.values[:width], jnp.asarray(forget, dtype))

    def update(
        self, rows: MatrixLike, mask: MatrixLike | None = None
    ) -> tuple["SubspaceTracker", TrackedRows]:
        """Take a batch of rows apart, and follow them.

        Args:
            rows: ``(k, n)``; what is not finite counts as missing.
            mask: boolean, true where an entry is observed.

        Returns:
            The tracker after the rows, and their parts.

        Raises:
            ValueError: for rows of another length.
        """
        matrix, seen = self._observed("SubspaceTracker.update", rows, mask)
        low_rank = outer(_regressed(matrix, seen, self.basis), self.basis)
        rest = jnp.where(seen, matrix - low_rank, 0)
        wrong = jnp.abs(rest) > SPREADS * _medians(rest, seen)
        filled = jnp.where(seen & ~wrong, matrix, low_rank)
        known = self.forget * self.values[:, None] * self.basis.T
        stacked = jnp.concatenate([known, filled])
        # QR of the few long rows, then all in their space.
        directions = orthonormalize(stacked.T)
        _, values, turn = svd(times(stacked, directions))
        width = len(self.values)
        basis = times(directions, turn[:width].T)
        sparse = jnp.where(wrong, rest, 0)
        return SubspaceTracker(basis, values[:width], self.forget), TrackedRows(
            low_rank, sparse
        )

    def track(
        self, rows: MatrixLike, mask: MatrixLike | None = None, *, batch: int = 1
    ) -> tuple["SubspaceTracker", TrackedRows]:
        """Follow many rows, in order and by batches, in one ``lax.scan``.

        Args:
            rows: ``(k, n)``; what is not finite counts as missing.
            mask: boolean, true where an entry is observed.
            batch: rows of a batch, a divisor of k.

        Returns:
            The tracker after all rows, and their parts.

        Raises:
            ValueError: for rows of another length, or a batch that does not divide them.
        """
        matrix, seen = self._observed("SubspaceTracker.track", rows, mask)
        k, n = matrix.shape
        if k % batch:
            raise ValueError(f"batch must divide the {k} rows, got {batch}.")
        split = lambda x: x.reshape(k // batch, batch, n)

        def step(tracker: SubspaceTracker, x):
            return tracker.update(*x)

        end, parts = lax.scan(step, self, (split(matrix), split(seen)))
        return end, jax.tree.map(lambda x: x.reshape(k, n), parts)

    def _observed(self, owner: str, rows, mask) -> tuple[Array, Array]:
        rows, mask = as_matrix(owner, rows, mask)
        n = self.basis.shape[0]
        if rows.shape[1] != n:
            raise ValueError(f"{owner} needs rows of shape (k, {n}), got {rows.shape}.")
        matrix = jnp.asarray(rows).astype(self.basis.dtype)
        return observed_entries(matrix, None if mask is None else jnp.asarray(mask))


def _regressed(
    rows: Float[Array, "k n"], seen: Bool[Array, "k n"], basis: Float[Array, "n r"]
) -> Float[Array, "k r"]:
    """l1 regression of every row, by reweighted least squares."""
    eye = jnp.eye(basis.shape[1], dtype=basis.dtype)

    def solve(row: Array, weight: Array) -> Array:
        weighted = basis * weight[:, None]
        squares = cross(weighted, basis)
        ridge = RIDGE * nonzero(jnp.trace(squares))
        return jnp.linalg.solve(squares + ridge * eye, cross(weighted, row[:, None]))[:, 0]

    def step(_, u: Array) -> Array:
        rest = jnp.where(seen, jnp.abs(rows - outer(u, basis)), 0)
        scale = _medians(rest, seen)
        # Relative to the scale, so that weights are numbers near one in any units.
        weights = seen / (rest / nonzero(scale) + 0.1)
        return jax.vmap(solve)(rows, weights)

    start = jax.vmap(solve)(rows, seen.astype(rows.dtype))
    return lax.fori_loop(0, REWEIGHTINGS, step, start)


def _medians(rest: Float[Array, "k n"], seen: Bool[Array, "k n"]) -> Float[Array, "k 1"]:
    """Of the absolute values that are seen, by row."""
    half = (jnp.sum(seen, axis=1, dtype=jnp.int32) + 1) // 2
    median = lambda x, k: order_statistic(jnp.abs(x), k, axis=0)
    return jax.vmap(median)(jnp.where(seen, rest, 0), half)

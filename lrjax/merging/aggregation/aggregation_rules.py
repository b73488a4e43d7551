"""How the gradients of workers become one: by inner products, or by coordinates."""

import abc

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ...linalg import eigh, nonzero


LEAST = 1e-3  # of the typical distance: nearer than this, a weight grows no more


class GramRule(eqx.Module):
    """A weight for each worker, from the inner products ``⟨g_i, g_j⟩`` alone."""

    def check(self, workers: int) -> None:
        """Refuse a number of workers that the rule cannot do with."""
        del workers

    @abc.abstractmethod
    def weights(self, gram: Float[Array, "p p"]) -> Float[Array, " p"]:
        """The aggregate is ``Σ_k w_k g_k``."""


class CoordinateRule(eqx.Module):
    """One number of the numbers that the workers have at each coordinate."""

    def check(self, workers: int) -> None:
        """Refuse a number of workers that the rule cannot do with."""
        del workers

    @abc.abstractmethod
    def reduce(self, values: Float[Array, "p ..."]) -> Float[Array, "..."]:
        """The aggregate of a stack."""


class Mean(GramRule):
    """The mean: best where all are honest, and moved anywhere by a single one that is not.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> rule = lrjax.merging.Mean()
        >>> print(lrjax.merging.aggregate_gradients(jnp.array([1.0, 3.0]), rule))
        2.0
    """

    def weights(self, gram: Float[Array, "p p"]) -> Float[Array, " p"]:
        """All the same."""
        return jnp.full(len(gram), 1 / len(gram), gram.dtype)


class GeometricMedian(GramRule):
    """The point with the least sum of distances, ``argmin_g Σ_k ‖g − g_k‖``.

    By Weiszfeld's iteration ``w_k ∝ 1/‖g − g_k‖``. Less than half of the workers may be
    anything.

    Args:
        steps: of the iteration.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> rule = lrjax.merging.GeometricMedian()
        >>> x = jnp.array([[1.0, 0.0], [1.0, 0.1], [-99.0, 50.0]])
        >>> bool(abs(lrjax.merging.aggregate_gradients(x, rule) - x[0]).max() < 0.2)
        True

    Reference:
        K. Pillutla, S. M. Kakade, Z. Harchaoui, "Robust aggregation for federated learning"
        (2019), arXiv 1912.13445.
    """

    steps: int = eqx.field(default=50, static=True)

    def weights(
        self, gram: Float[Array, "p p"], own: Float[Array, " p"] | None = None
    ) -> Float[Array, " p"]:
        """After all steps, from those that the workers have: even ones by default."""
        squares = jnp.diagonal(gram)
        own = jnp.ones_like(squares) if own is None else own.astype(squares.dtype)
        own = own / nonzero(jnp.sum(own))

        def step(_, w: Array) -> Array:
            gaps = squares - 2 * gram @ w + w @ gram @ w
            distances = jnp.sqrt(jnp.maximum(gaps, 0))
            floor = LEAST * jnp.median(distances) + jnp.finfo(w.dtype).tiny
            w = own / jnp.maximum(distances, floor)
            return w / nonzero(jnp.sum(w))

        return lax.fori_loop(0, self.steps, step, own)


class FlagMean(GramRule):
    """The mean direction within the subspace that most workers are near to.

    See :func:`flag_mean`, which has the formula. The length is the median of those of the
    workers.

    Args:
        rank: of the subspace; keep it at 1 if in doubt.
        steps: of reweighting.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> rule = lrjax.merging.FlagMean()
        >>> x = jnp.array([[1.0, 0.0], [0.9, 0.1], [0.0, 500.0]])
        >>> mean = lrjax.merging.aggregate_gradients(x, rule)
        >>> bool(mean[0] > 5 * mean[1])
        True

    Reference:
        H. Almasi, H. Mishra, B. Vamanan, S. N. Ravi, "Flag aggregator: scalable distributed
        training under failures and augmented losses using convex optimization" (2023),
        arXiv 2302.05865.
    """

    rank: int = eqx.field(default=1, static=True)
    steps: int = eqx.field(default=1, static=True)

    def check(self, workers: int) -> None:
        """A subspace of so many."""
        if not 1 <= self.rank <= workers:
            raise ValueError(
                "The rank of a flag mean is from 1 to the number of workers or trees, "
                f"{workers}; got {self.rank}."
            )

    def weights(self, gram: Float[Array, "p p"]) -> Float[Array, " p"]:
        """Of the projection of the mean of unit gradients, times the median length."""
        lengths = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))
        unit = gram / nonzero(lengths)[:, None] / nonzero(lengths)[None, :]
        ones = jnp.ones_like(lengths)

        def projected(a: Array) -> tuple[Array, Array]:
            """``Y = X diag(a) Z``: the coefficients, and ``Yᵀ X``."""
            values, vectors = eigh(a[:, None] * unit * a[None, :])
            values, vectors = values[-self.rank :], vectors[:, -self.rank :]
            coefficients = a[:, None] * vectors / jnp.sqrt(nonzero(values))[None, :]
            return coefficients, coefficients.T @ unit

        def step(_, a: Array) -> Array:
            inside = jnp.sum(projected(a)[1] ** 2, axis=0)
            return (jnp.abs(1 - inside) + 1e-7) ** -0.25

        coefficients, inside = projected(lax.fori_loop(0, self.steps, step, ones))
        mean = coefficients @ (inside @ ones) / len(gram)
        return jnp.median(lengths) * mean / nonzero(lengths)


class Krum(GramRule):
    """The mean of the ``keep`` workers that have the nearest neighbours.

    The score of a worker is the sum of the squared distances to its ``p − outliers − 2``
    nearest others; those with the lowest scores are kept.

    Args:
        outliers: how many workers may be anything, at most ``(p − 3) / 2`` of p, which is
            the default.
        keep: one, or more of them: multi-Krum.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.array([[1.0], [1.1], [0.9], [1.2], [-99.0]])
        >>> print(lrjax.merging.aggregate_gradients(x, lrjax.merging.Krum(outliers=1)))
        [1.]

    Reference:
        P. Blanchard, E. M. El Mhamdi, R. Guerraoui, J. Stainer, "Byzantine-tolerant machine
        learning" (2017), arXiv 1703.02757.
    """

    outliers: int | None = eqx.field(default=None, static=True)
    keep: int = eqx.field(default=1, static=True)

    def check(self, workers: int) -> None:
        """Enough workers for so many outliers."""
        most = (workers - 3) // 2
        if most < 0 or not 0 <= self._outliers(workers) <= most:
            raise ValueError(
                f"Krum with {self.outliers} outliers needs 2 · outliers + 3 workers, got "
                f"{workers}: it bears {max(most, 0)} of them. Others bear less than half."
            )
        if not 1 <= self.keep <= workers:
            raise ValueError(f"Krum keeps from 1 to {workers} workers, got {self.keep}.")

    def _outliers(self, workers: int) -> int:
        return (workers - 3) // 2 if self.outliers is None else self.outliers

    def weights(self, gram: Float[Array, "p p"]) -> Float[Array, " p"]:
        """Even ones, for those that are kept."""
        p = len(gram)
        squares = jnp.diagonal(gram)
        gaps = jnp.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0)
        gaps = jnp.where(jnp.eye(p, dtype=bool), jnp.inf, gaps)
        near = jnp.sort(gaps, axis=1)[:, : p - self._outliers(p) - 2]
        kept = jnp.argsort(jnp.sum(near, axis=1))[: self.keep]
        return jnp.zeros(p, gram.dtype).at[kept].set(1 / self.keep)


class TrimmedMean(CoordinateRule):
    """At each coordinate the mean without the largest and the smallest numbers.

    Args:
        outliers: how many are left out on each side, less than half of the workers. By
            default as many as there can be: the coordinate-wise median.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.array([1.0, 2.0, 4.0, 1e9])
        >>> for rule in (lrjax.merging.TrimmedMean(1), lrjax.merging.TrimmedMean()):
        ...     print(lrjax.merging.aggregate_gradients(x, rule))
        3.0
        3.0

    Reference:
        D. Yin, Y. Chen, K. Ramchandran, P. Bartlett, "Byzantine-robust distributed
        learning: towards optimal statistical rates" (2018), arXiv 1803.01498.
    """

    outliers: int | None = eqx.field(default=None, static=True)

    def check(self, workers: int) -> None:
        """Something has to be left."""
        if self.outliers is not None and not 0 <= 2 * self.outliers < workers:
            raise ValueError(
                f"TrimmedMean leaves out less than half of {workers} workers on each side, "
                f"got outliers={self.outliers}."
            )

    def reduce(self, values: Float[Array, "p ..."]) -> Float[Array, "..."]:
        """The mean of what is in the middle."""
        p = len(values)
        out = (p - 1) // 2 if self.outliers is None else self.outliers
        return jnp.mean(jnp.sort(values, axis=0)[out : p - out], axis=0)

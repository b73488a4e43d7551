"""What a completion has found, and the completion of new rows by it."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ...linalg import cross, gram, nonzero, orthonormalize, outer, svd, times
from ...lowrank import LowRank
from ...metrics import singular_values
from .._center import meet
from .._inputs import VectorLike
from .._plots import norm_of_noise, plot_fit, refuse_batch, sampled_entries
from .._variance import explained_variance_ratio
from ..derivatives import refuse_derivatives
from ..problems import Entries
from .bayes import Side, regress, whiten
from .entries import check_entries, observed
from .features import Units, check_features, pattern_features
from .grouped import Reduce, group_by_row, identity
from .iteration import HeldOut, Model, State, joined


SUPPORTED = 0.1  # a direction counts if data explain this share of both its priors
TRUSTED = 2.0  # times the expected error that the error held out may be
NEGLIGIBLE = 1e-2  # an error of this share of the spread of the values is trusted, too
NEW_ROW_STEPS = 20  # of the reweighting of new rows
NO_DERIVATIVE = (
    "{} cannot be differentiated: it iterates until it has converged and decides on a "
    "rank. Continue from fit.low_rank by a fixed number of steps of lrjax.solve, which can "
    "be, on lrjax.matrix_completion.from_data(rows, cols, values, shape), or hold the fit "
    "constant with jax.lax.stop_gradient."
)


class Prior(NamedTuple):
    """What the fit learned about rows: the setting in which new ones are regressed.

    A row is ``gauge @ [u, 1]`` in the basis ``low_rank.right``; without any effects,
    ``gauge @ u``.

    Attributes:
        gauge: ``(w, k)``; columns are regressed on ``(right @ gauge) / scale``.
        mean: ``(p, f)``, the mean of u is ``units(features) @ mean``, the covariance the
            identity.
        units: center and scale of the features: a constant, those given, and those of
            the pattern.
        pattern: ``(n, k)``, see ``features.pattern_features``; ``None`` if it tells
            nothing.
        spread: ``(k, k)``, the average posterior covariance of the rows of
            ``(right @ gauge) / scale``.
        scale: ``(n,)`` or ``(1,)``, the units of the columns.
        noise: ``(n,)``, the variance of the noise of each column in these units.
    """

    gauge: Float[Array, "w k"]
    mean: Float[Array, "p f"]
    units: Units
    pattern: Float[Array, "n q"] | None
    spread: Float[Array, "k k"]
    scale: Float[Array, " c"]
    noise: Float[Array, " n"]


class CompletionFit(eqx.Module):
    """A low-rank matrix, and effects of rows and columns, fitted to some entries.

    Attributes:
        low_rank: the whole matrix, with its effects; ``right`` has orthonormal columns
            (in units of the columns, if these have their own), ``left`` is sorted by
            size. Its columns from ``rank`` on are zero, without effects; with them one or
            two more are not.
        rank: the number of directions that the data support beside the effects.
        noise: the standard deviation of the noise in the entries, as estimated; for each
            column if they have units of their own.
        residual: how far the last step moved the matrix, relative to its norm.
        steps: iterations taken.
        converged: whether the last one moved it by less than the tolerance, or by next to
            nothing against the uncertainty of the matrix.
        held_out_error: the root mean square error at entries that were held out (a tenth,
            at most a thousand), by a fit of the others from which this one went on. In
            units of the columns if they have their own.
        trusted: whether that is what the fit expects of itself, or next to nothing. If
            not, there are too few entries for what was to be found.
        prior: what :meth:`transform` needs beside ``low_rank``.
        limits: the range that predictions are clipped to, if any.
        robust: whether gross errors were reckoned with.
        effects: whether rows, and whether columns have effects.
    """

    low_rank: LowRank
    rank: Int[Array, ""]
    noise: Float[Array, " *c"]
    residual: Float[Array, ""]
    steps: Int[Array, ""]
    converged: Bool[Array, ""]
    held_out_error: Float[Array, ""]
    trusted: Bool[Array, ""]
    prior: Prior
    limits: tuple[Float[Array, ""], Float[Array, ""]] | None
    robust: bool = eqx.field(static=True)
    effects: tuple[bool, bool] = eqx.field(static=True)

    @property
    def explained_variance_ratio(self) -> Float[Array, " w"]:
        """The share of the variance along each principal component, falling.

        Of the rows of the whole matrix, centered: effects of rows are a component. Over
        its whole variance, with that of the noise; in the units of the values.
        """
        m, n = self.low_rank.shape
        rest = (m - 1) * n * jnp.mean(self.noise**2)
        return explained_variance_ratio(self.low_rank, rest)

    def plot(self) -> Any:
        """Draw the singular values with the rank, and all sizes that tell of errors.

        Of what is beside the effects, in units of the columns, if these have their own.
        Right: how many of its entries are how large, with lines at the error where entries
        were held out and at the noise. A fit is good where these are far left.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: for a batch of fits.
        """
        refuse_batch(self)
        part = self._beside_effects()
        spectra = {"": (singular_values(part), self.rank)}
        noise = jnp.sqrt(jnp.mean(self.prior.noise)) if self.noise.ndim else self.noise
        levels = {"error of entries held out": self.held_out_error, "noise": noise}
        norm = norm_of_noise(noise, part.shape)
        return plot_fit(self, spectra, sampled_entries(part), None, levels, norm)

    def _beside_effects(self) -> LowRank:
        """The matrix without its effects, each column in its unit."""
        left, right = self.low_rank.left, self.low_rank.right
        if self.noise.ndim:
            right = right / self.prior.scale[:, None]
        of_rows, of_cols = self.effects
        if of_cols or self.noise.ndim:  # columns of their own units have their own center
            left = left - jnp.mean(left, axis=0, keepdims=True)
        if of_rows:
            right = right - jnp.mean(right, axis=0, keepdims=True)
        return LowRank(left, right)

    def predict(self, rows: VectorLike, cols: VectorLike) -> Float[Array, " k"]:
        """The entries ``(rows, cols)`` of the matrix, clipped to the limits, if any."""
        shape = self.low_rank.shape
        rows, cols, _ = check_entries("predict", rows, cols, rows, shape)
        found = Entries(rows, cols, (shape[0], shape[1]))(self.low_rank)
        return found if self.limits is None else jnp.clip(found, *self.limits)

    def transform(
        self,
        rows: VectorLike,
        cols: VectorLike,
        values: VectorLike,
        count: int,
        *,
        features: ArrayLike | None = None,
    ) -> Float[Array, "count w"]:
        """The coordinates of new rows in the basis ``low_rank.right``.

        Every row is regressed on the basis as in the fit, with its noise and its prior:
        a row with few entries stays near the mean row, one without any is the mean row.
        To fit more rows than fit into memory, fit a random share of them and transform
        the others batch by batch.

        Args:
            rows: which of the new rows an entry belongs to, in ``[0, count)``.
            cols: the columns of the entries.
            values: the entries; those that are not finite count as missing.
            count: the number of new rows.
            features: ``(count, p)``, those of the new rows, if the fit was given some.

        Returns:
            ``(count, w)``: new rows of ``low_rank.left``. The completed rows are
            ``fit.transform(…) @ fit.low_rank.right.T``.

        Raises:
            ValueError: for indices out of range, arrays of different lengths or other
                features than the fit was given; where it is differentiated, as
                :func:`fit_completion`.
            TypeError: for values that are no numbers.

        Example:
            >>> import jax.numpy as jnp, lrjax
            >>> i, j = jnp.divmod(jnp.arange(60), 6)
            >>> fit = lrjax.fit_completion(i, j, (i + 1.0) * (j + 1.0), (10, 6))
            >>> new = fit.transform([0, 0, 0], [0, 1, 2], [20.0, 40.0, 60.0], 1)
            >>> print(jnp.round(new @ fit.low_rank.right.T)[0])
            [ 20.  40.  60.  80. 100. 120.]
        """
        prior, shape = self.prior, (count, self.low_rank.shape[1])
        checked = check_entries("transform", rows, cols, values, shape)
        told = 0 if prior.pattern is None else 1 + prior.pattern.shape[1]
        features = check_features("row", features, count, len(prior.mean) - 1 - told)
        sentence = NO_DERIVATIVE.format("CompletionFit.transform")
        self, values = refuse_derivatives(sentence, (self, checked[2]))
        return _transform(self, *checked[:2], values, features, count=count)


# Compiled once for entries of one shape: rows also come outside of jit, batch by batch.
@functools.partial(jax.jit, static_argnames="count")
def _transform(
    fit: CompletionFit,
    rows: Array,
    cols: Array,
    values: Array,
    features: Array,
    *,
    count: int,
) -> Array:
    """The coordinates of new rows, whose entries and features are checked."""
    prior = fit.prior
    rows, cols, values = observed(rows, cols, values, (count, fit.low_rank.shape[1]))
    # In units of the noise, which is one then.
    unit = prior.scale * jnp.sqrt(prior.noise)
    vectors = times(fit.low_rank.right, prior.gauge) / unit[:, None]
    values = values / jnp.take(unit, cols, mode="clip")
    entries = group_by_row(rows, cols, values.astype(vectors.dtype), count)
    features = features.astype(vectors.dtype)
    if prior.pattern is not None:
        told = pattern_features(entries, prior.pattern)
        features = jnp.concatenate([features, told], axis=1)
    mean = prior.units(features) @ prior.mean
    known = prior.gauge.shape[1] - prior.mean.shape[1]
    extend = lambda u: jnp.pad(u, ((0, 0), (0, known)), constant_values=1)
    noise, spread = jnp.ones(count, vectors.dtype), prior.spread[None]

    def step(_, u):
        found, _ = regress(
            entries, extend(u), mean, vectors, spread, noise, robust=fit.robust
        )
        return found.factor

    u = lax.fori_loop(0, NEW_ROW_STEPS if fit.robust else 2, step, mean)
    return outer(extend(u), prior.gauge)


def assemble(
    state: State,
    held_out: HeldOut,
    model: Model,
    center: Array,
    scale: Array,
    units: Units,
    pattern: Array | None,
    limits: tuple[Array, Array] | None,
) -> CompletionFit:
    """The fit, in units of the values; directions without support are left out."""
    d, reduce = model.width, model.reduce
    left, right = whiten(state.left, state.right, gram(state.right.factor[:, :d]))
    right, rank = _supported(left, right, state.noise, model)
    sizes = jnp.sqrt(jnp.diagonal(left.prior))
    rows, _, columns, spread = joined(left, right, sizes, model)
    if model.row_effects and not model.col_effects:
        # The center needs a constant of the rows, as the effects of columns do.
        rows = jnp.pad(rows, ((0, 0), (0, 1)), constant_values=1)
        columns = jnp.pad(columns, ((0, 0), (0, 1)))
        spread = jnp.pad(spread, ((0, 0), (0, 1), (0, 1)))
    extra = columns.shape[1] - d
    if extra:
        mean_row = columns[:, -1] * scale + center
        columns = columns.at[:, -1].add(center / scale)
    basis, gauge = _orthogonal(columns)
    # Sorted by what the rows make of it.
    lower = _root(reduce(gram(rows)))
    turn = svd(gauge @ lower)[0]
    basis = times(basis, turn)
    gauge = cross(basis, columns)
    # A center far from zero magnifies by how much the basis misses to be orthonormal.
    gauge += cross(basis, columns - times(basis, gauge))
    # Rounding would give the others sizes, too.
    kept = jnp.arange(len(gauge)) < rank + extra
    gauge = jnp.where(kept[:, None], gauge, 0)
    shared = len(scale) == 1
    gauge, basis = (gauge * scale[0], basis) if shared else (gauge, basis * scale[:, None])
    if extra:
        basis = meet(mean_row, basis, gauge[:, -1])
    noise = jnp.sqrt(state.pooled if shared else state.noise)
    # In units of the columns, if these have their own.
    unit = scale[0] if shared else jnp.ones_like(scale[0])
    fine = held_out.error <= jnp.maximum(TRUSTED * held_out.expected, NEGLIGIBLE)
    return CompletionFit(
        low_rank=LowRank(outer(rows, gauge), basis),
        rank=rank,
        noise=noise * unit if shared else noise * scale,
        residual=state.move,
        steps=state.taken,
        converged=state.settled,
        held_out_error=held_out.error * unit,
        trusted=fine & (held_out.count > 0) & state.settled,
        prior=Prior(
            gauge, left.mean / sizes[None, :], units, pattern, spread[0], scale, state.noise
        ),
        limits=limits,
        robust=model.robust,
        effects=(model.row_effects, model.col_effects),
    )


def _supported(left: Side, right: Side, noise: Array, model: Model) -> tuple[Side, Array]:
    """The columns' factor without the directions that the data do not support.

    What is the same for all columns is an effect of the rows, if these have any, and
    remains; likewise for the rows.
    """
    d, reduce = model.width, model.reduce
    mean = jnp.mean(right.factor[:, :d], axis=0) * model.row_effects
    factor = right.factor[:, :d] - mean[None, :]
    rows = left.factor[:, :d]
    total = reduce(jnp.asarray(len(rows), rows.dtype))
    mean_row = reduce(jnp.sum(rows, axis=0)) / total * model.col_effects
    rows = rows - mean_row[None, :]
    # The factors are well-conditioned but for the sizes of their columns.
    sizes = jnp.sqrt(jnp.sum(factor**2, axis=0))
    columns = factor / nonzero(sizes)[None, :]
    basis = orthonormalize(columns, method="cholesky")
    triangular = cross(basis, columns) * sizes[None, :]
    turned = times(basis, svd(triangular @ _root(reduce(gram(rows))))[0])

    def known(rows: Array, spread: Array, over: Reduce) -> Array:
        # What features or means carry is known, too: moments, not prior covariances.
        total = over(jnp.asarray(len(rows), rows.dtype))
        spread = jnp.diagonal(jnp.mean(spread, axis=0))[:d]
        return 1 - spread / nonzero(over(jnp.sum(rows**2, axis=0)) / total + spread)

    # The spread of the columns is in units of their noise.
    scaled = factor * lax.rsqrt(noise)[:, None]
    share = known(rows, left.spread, reduce) * known(scaled, right.spread, identity)
    rank = jnp.sum((share > SUPPORTED) & (sizes > 0), dtype=jnp.int32)
    kept = jnp.where(jnp.arange(d)[None, :] < rank, turned, 0)
    supported = outer(kept, cross(factor, kept))
    new = right.factor.at[:, :d].set(supported + mean[None, :])
    if model.col_effects:
        new = new.at[:, d].add((factor - supported) @ mean_row)
    return right._replace(factor=new), rank


def _orthogonal(columns: Float[Array, "n k"]) -> tuple[Array, Array]:
    """``basis @ gauge = columns`` with an orthonormal basis ``(n, w)``, ``w ≤ n``."""
    n, k = columns.shape
    if k >= n:
        return jnp.eye(n, dtype=columns.dtype), columns
    # No column is small next to the others: their sum is not to drown in one of them.
    sizes = jnp.sqrt(jnp.sum(columns**2, axis=0))
    basis = orthonormalize(columns / nonzero(sizes)[None, :])
    return basis, cross(basis, columns)


def _root(second: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """A triangular root of a Gram matrix, shifted by its rounding error."""
    diagonal = jnp.diagonal(second)
    shift = 4 * len(diagonal) * jnp.finfo(second.dtype).eps * diagonal + 1e-20
    return lax.linalg.cholesky(second + jnp.diag(shift))

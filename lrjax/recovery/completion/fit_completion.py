import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ...linalg import (
    cross,
    gram,
    nonzero,
    orthonormalize,
    outer,
    subspace_iteration,
    svd,
    times,
    working_dtype,
)
from ...lowrank import LowRank, relative_step
from .._inputs import VectorLike, as_indices, as_numbers, check_not_negative, check_width
from ..derivatives import refuse_derivatives
from ..operators import Entries
from .bayes import Side, regress, student_weights, whiten
from .grouped import Grouped, Reduce, back_project, group_by_row, identity


WIDEST = 40  # default width where the rank is not given
SUPPORTED = 0.1  # a direction counts if data explain this share of both its priors
POWER_STEPS = 3  # of the start
FIRST_NOISE = 1e-3  # share of the variance: more would let weak directions fade at once
CLIP = 3.0  # robust scales beyond which the start cuts values off
SCALE_STEPS = 20  # of the iteration for the robust scale of the values
NEW_ROW_STEPS = 20  # of the reweighting of new rows
NO_DERIVATIVE = (
    "{} cannot be differentiated: it iterates until it has converged and decides on a "
    "rank. Continue from fit.low_rank by a fixed number of steps of lrjax.solve, which can "
    "be, on lrjax.matrix_completion.from_data(rows, cols, values, shape), or hold the fit "
    "constant with jax.lax.stop_gradient."
)


class Prior(NamedTuple):
    """What the fit learned about rows: the setting in which new ones are regressed.

    Attributes:
        gauge: ``(r, r)``; ``right @ gauge`` is regressed on, ``u @ gauge.T`` are the
            coordinates.
        mean: ``(r,)``, the mean of u, whose covariance is the identity.
        spread: ``(r, r)``, the average posterior covariance of the rows of
            ``right @ gauge``.
    """

    gauge: Float[Array, "r r"]
    mean: Float[Array, " r"]
    spread: Float[Array, "r r"]


class CompletionFit(eqx.Module):
    """A low-rank matrix fitted to some of its entries.

    Attributes:
        low_rank: the matrix; ``right`` has orthonormal columns, ``left`` is sorted by
            size, the columns from ``rank`` on are zero.
        rank: the number of directions that the data support.
        noise: the standard deviation of the noise in the entries, as estimated.
        residual: how far the last step moved the matrix, relative to its norm.
        steps: iterations taken.
        converged: whether the last one moved it by less than the tolerance.
        prior: what :meth:`transform` needs beside ``low_rank``.
        robust: whether gross errors were reckoned with.
    """

    low_rank: LowRank
    rank: Int[Array, ""]
    noise: Float[Array, ""]
    residual: Float[Array, ""]
    steps: Int[Array, ""]
    converged: Bool[Array, ""]
    prior: Prior
    robust: bool = eqx.field(static=True)

    def predict(self, rows: VectorLike, cols: VectorLike) -> Float[Array, " k"]:
        """The entries ``(rows, cols)`` of the low-rank matrix."""
        rows, cols, _ = _check_entries("predict", rows, cols, rows, self.low_rank.shape)
        m, n = self.low_rank.shape
        return Entries(rows, cols, (m, n))(self.low_rank)

    def transform(
        self,
        rows: VectorLike,
        cols: VectorLike,
        values: VectorLike,
        count: int,
    ) -> Float[Array, "count r"]:
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

        Returns:
            ``(count, width)``: new rows of ``low_rank.left``. The completed rows are
            ``fit.transform(…) @ fit.low_rank.right.T``.

        Raises:
            ValueError: for indices out of range or arrays of different lengths; where it
                is differentiated, as :func:`fit_completion`.
        """
        sentence = NO_DERIVATIVE.format("CompletionFit.transform")
        values = jnp.asarray(as_numbers("CompletionFit.transform", values, "values"))
        self, values = refuse_derivatives(sentence, (self, values))
        shape = (count, self.low_rank.shape[1])
        rows, cols, values = _check_entries("transform", rows, cols, values, shape)
        rows, cols, values = _observed(rows, cols, values, shape)
        basis = times(self.low_rank.right, self.prior.gauge)
        entries = group_by_row(rows, cols, values.astype(basis.dtype), count)

        def step(_, u):
            mean, spread = self.prior.mean, self.prior.spread
            noise = self.noise**2
            weigh = student_weights(noise) if self.robust else None
            return regress(entries, u, mean, basis, spread, noise, weigh=weigh)[0]

        start = jnp.broadcast_to(self.prior.mean[None, :], (count, basis.shape[1]))
        u = lax.fori_loop(0, NEW_ROW_STEPS if self.robust else 2, step, start)
        return outer(u, self.prior.gauge)


class _State(NamedTuple):
    left: Side
    right: Side
    noise: Float[Array, ""]  # variance
    move: Float[Array, ""]
    taken: Int[Array, ""]


def fit_completion(
    rows: VectorLike,
    cols: VectorLike,
    values: VectorLike,
    shape: Sequence[int],
    *,
    rank: int | None = None,
    robust: bool = False,
    tol: ArrayLike = 1e-5,
    max_steps: int = 100,
    reduce: Reduce | None = None,
) -> CompletionFit:
    """Complete a matrix of which some entries are known, ``X[rows, cols] ≈ values``.

    Alternating least squares with everything estimated that one usually has to tune.
    With ``X = L Rᵀ`` of fixed width, rows of L drawn from ``N(μ, S)``, those of R from
    another Gaussian, and noise of variance σ², the posterior of the rows of one factor
    given the other is a ridge regression for each row,

        u_i = (Σ_j (v_j v_jᵀ + C) + σ² S⁻¹)⁻¹ (Σ_j x_ij v_j + σ² S⁻¹ μ),

    summed over the observed columns j of row i; C is the average posterior covariance
    of the rows ``v_j``. Then μ, S, σ² are estimated from it, and the factors change
    places (mean-field variational Bayes). The ridge follows the noise: exactly low-rank
    data are fitted to rounding error, noisy ones are shrunk as they should. Directions
    that the data do not support fade out: so the rank is found.

    An iteration takes ``O(count · width² + (m + n) width³)`` operations; beside the data,
    sorted by row and by column, and the factors it needs the memory of a few hundred
    rows. Pure: jit it (``shape``, ``rank``, ``robust``, ``max_steps``, ``reduce`` static)
    and ``vmap`` it over matrices; where they have different numbers of entries, fill up
    with NaN.

    Not differentiable, and refused in both modes: it iterates for as long as it takes, and
    where the width exceeds the rank of data without noise the solution has no derivative.
    A fixed number of steps of :func:`lrjax.solve` from ``fit.low_rank`` has one.

    Args:
        rows: ``(count,)``, integers in ``[0, m)``, in any order.
        cols: ``(count,)``, integers in ``[0, n)``.
        values: ``(count,)``; entries that are not finite count as missing. Those of a
            table or a sparse matrix are :func:`matrix_entries`. An entry that is given
            several times counts as so many observations. Rows and columns without entries
            are completed as mean row and mean column.
        shape: ``(m, n)``.
        rank: the largest rank, by default 40 or the shorter side. A rank that is too
            large costs time, not accuracy.
        robust: noise with heavy tails, Student's t with two degrees of freedom, by
            reweighting in the same iteration: gross errors in a fifth of the entries do
            no harm.
        tol: stop when an iteration moves the matrix by less than this share of its norm.
        max_steps: at most as many iterations.
        reduce: where the rows of the matrix are spread over devices, within
            ``shard_map``: ``lambda x: jax.lax.psum(x, "rows")``. Then ``rows`` and ``m``
            are those of one device, and so is the result but for its ``right`` factor.

    Returns:
        A :class:`CompletionFit`.

    Raises:
        ValueError: for arrays that are no vectors of one length, no entries, indices or
            a rank out of range. What is traced is not checked: then entries with indices
            out of range count as missing. Where it is differentiated by the values.

    Example:
        >>> import jax, lrjax
        >>> p = lrjax.matrix_completion(jax.random.key(0), (60, 50), 2, observed=0.3)
        >>> at = p.operator
        >>> fit = lrjax.fit_completion(at.rows, at.cols, p.targets, (60, 50), rank=8)
        >>> int(fit.rank), bool(p.relative_error(fit.low_rank) < 1e-4)
        (2, True)

    Reference:
        Y. J. Lim, Y. W. Teh, "Variational Bayesian approach to movie rating prediction"
        (2007), KDD Cup; A. Ilin, T. Raiko, "Practical approaches to principal component
        analysis in the presence of missing values" (2010), JMLR.
    """
    shape = tuple(shape)
    sentence = NO_DERIVATIVE.format("fit_completion")
    check_not_negative("fit_completion", tol=tol)
    values = jnp.asarray(as_numbers("fit_completion", values, "values"))
    values, tol = refuse_derivatives(sentence, (values, tol))
    rows, cols, values = _check_entries("fit_completion", rows, cols, values, shape)
    width = _check_rank(shape, rank, spread=reduce is not None)
    reduce = identity if reduce is None else reduce
    rows, cols, values = _observed(rows, cols, values, shape)
    scale = _scale(values, rows < shape[0], robust, reduce)
    values = values / scale
    by_row = group_by_row(rows, cols, values, shape[0])
    by_col = group_by_row(cols, rows, values, shape[1], reduce)

    def step(state: _State) -> _State:
        left, right, noise = _half(
            by_row, state.left, state.right, state.noise, robust, reduce, identity
        )
        right, left, noise = _half(by_col, right, left, noise, robust, identity, reduce)
        factors = LowRank(left.factor, right.factor)
        changes = LowRank(left.change, right.change)
        move = relative_step(factors, changes, reduce=reduce)
        return _State(left, right, noise, move, state.taken + 1)

    def running(state: _State) -> Array:
        return (state.move > tol) & (state.taken < max_steps)

    start = _start(by_row, by_col, width, robust, reduce)
    end = lax.while_loop(running, step, start)
    return _assemble(end, scale, tol, robust, reduce)


def _check_entries(owner, rows, cols, values, shape) -> tuple[Array, Array, Array]:
    """The entries as arrays; refuse what are none of a matrix of the given shape."""
    rows, cols = as_indices(owner, "rows", rows), as_indices(owner, "cols", cols)
    values = jnp.asarray(values)
    if not (rows.ndim == 1 and rows.shape == cols.shape == values.shape):
        raise ValueError(
            f"{owner} needs vectors rows, cols and values of one length, got shapes "
            f"{rows.shape}, {cols.shape} and {values.shape}."
        )
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{owner} needs a shape (m, n) with m, n >= 1, got {shape}.")
    if rows.shape[0] == 0:
        raise ValueError(f"{owner} needs at least one observed entry, got none.")
    for name, index, size in zip(("rows", "cols"), (rows, cols), shape, strict=True):
        if isinstance(index, Tracer):
            continue
        # With numpy: under jit even the minimum of a constant is traced.
        least, most = np.asarray(index).min(), np.asarray(index).max()
        if least < 0 or most >= size:
            raise ValueError(
                f"{owner} needs {name} in [0, {size}) for a matrix of shape {shape}; got "
                f"{least} to {most}."
            )
    return rows, cols, values


def _check_rank(shape: tuple[int, ...], rank: int | None, spread: bool) -> int:
    """The width of the factors."""
    short = shape[1] if spread else min(shape)
    if rank is None:
        return min(WIDEST, short)
    return check_width("fit_completion", rank, short, shape)


def _observed(rows, cols, values, shape):
    """Entries in floating point; what is missing gets the indices ``(m, n)``."""
    m, n = shape
    values = values.astype(working_dtype(jnp.result_type(values.dtype, jnp.float32)))
    inside = (rows >= 0) & (rows < m) & (cols >= 0) & (cols < n)
    seen = inside & jnp.isfinite(values)
    rows = jnp.where(seen, rows, m).astype(jnp.int32)
    cols = jnp.where(seen, cols, n).astype(jnp.int32)
    return rows, cols, jnp.where(seen, values, 0)


def _scale(values: Array, seen: Array, robust: bool, reduce: Reduce) -> Array:
    """The size of the values; that of the bulk of them if some are grossly wrong."""

    def step(_, square):
        # Without the floor, mostly zeros would have the scale zero.
        w = student_weights(jnp.maximum(square, floor))(values)
        w = jnp.where(seen, w, 0)
        return reduce(jnp.sum(w * values * values)) / jnp.maximum(reduce(jnp.sum(w)), 1)

    count = jnp.maximum(reduce(jnp.sum(seen, dtype=values.dtype)), 1)
    mean = reduce(jnp.sum(values * values)) / count
    floor = 1e-6 * mean + jnp.finfo(values.dtype).tiny
    square = lax.fori_loop(0, SCALE_STEPS, step, mean) if robust else mean
    return jnp.where(square > 0, jnp.sqrt(square), 1)


def _start(
    by_row: Grouped, by_col: Grouped, width: int, robust: bool, reduce: Reduce
) -> _State:
    """Singular vectors of the matrix with zeros for what is missing, by power iteration."""
    m, n = len(by_row.order), len(by_col.order)
    dtype = by_row.values.dtype
    if robust:
        by_row = by_row._replace(values=jnp.clip(by_row.values, -CLIP, CLIP))
        by_col = by_col._replace(values=jnp.clip(by_col.values, -CLIP, CLIP))
    orthonormal = functools.partial(orthonormalize, method="cholesky")
    basis = orthonormal(jr.normal(jr.key(0), (n, width), dtype))
    product = lambda v: reduce(back_project(by_col, back_project(by_row, v)))

    # One step at a time within a loop: the products are long programs.
    def power(_, basis):
        return subspace_iteration(product, None, basis, steps=1, orthonormalize=orthonormal)

    basis = lax.fori_loop(0, POWER_STEPS, power, basis)
    total = reduce(jnp.asarray(m, dtype))
    share = jnp.maximum(reduce(by_row.starts[-1].astype(dtype)) / total / n, 1 / n)
    left = back_project(by_row, basis) / (share * math.sqrt(n))
    right = basis * math.sqrt(n)
    none = jnp.zeros((width, width), dtype)
    zero = jnp.zeros(width, dtype)
    return _State(
        Side(left, left, none, zero, reduce(gram(left)) / total),
        Side(right, right, none, zero, jnp.eye(width, dtype=dtype)),
        # The weights of robust fits need a noise that covers the error of the start.
        jnp.full((), 1 if robust else FIRST_NOISE, dtype),
        jnp.full((), jnp.inf, dtype),
        jnp.zeros((), jnp.int32),
    )


def _half(entries, this, other, noise, robust, over_this, over_other):
    """Regress one factor on the other and estimate its prior and the noise.

    ``over_this`` and ``over_other`` sum what was summed over rows of the two factors
    over the devices that share them.
    """
    other_rows = over_other(jnp.asarray(len(other.factor), noise.dtype))
    moment = over_other(gram(other.factor)) / other_rows + other.spread
    this, other = whiten(this, other, moment)
    factor, sums = regress(
        entries,
        this.factor,
        this.mean,
        other.factor,
        other.spread,
        noise,
        weigh=student_weights(noise) if robust else None,
        combine=over_other,
    )
    sums = jax.tree.map(over_this, sums)
    count = jnp.maximum(sums.count, 1)
    used = entries.used[:, None]
    mean = over_this(jnp.sum(jnp.where(used, factor, 0), axis=0)) / count
    centered = jnp.where(used, factor - mean[None, :], 0)
    prior = (over_this(gram(centered)) + sums.covariance) / count
    weight = jnp.maximum(sums.weight, 1)
    spread = sums.spread / weight
    noise = sums.squares / weight
    noise = jnp.maximum(noise, jnp.finfo(noise.dtype).eps ** 2)
    return Side(factor, factor - this.factor, spread, mean, prior), other, noise


def _assemble(
    state: _State, scale: Array, tol: ArrayLike, robust: bool, reduce: Reduce
) -> CompletionFit:
    moment = gram(state.right.factor)
    left, right = whiten(state.left, state.right, moment)
    # The factors are well-conditioned but for the sizes of their columns.
    sizes = jnp.sqrt(jnp.sum(right.factor**2, axis=0))
    columns = right.factor / nonzero(sizes)[None, :]
    basis = orthonormalize(columns, method="cholesky")
    triangular = cross(basis, columns) * sizes[None, :]
    second = reduce(gram(left.factor))
    d = len(sizes)
    diagonal = jnp.diagonal(second)
    shift = 4 * d * jnp.finfo(second.dtype).eps * diagonal + 1e-20
    lower = lax.linalg.cholesky(second + jnp.diag(shift))
    turned = times(basis, svd(triangular @ lower)[0])
    gauge = cross(turned, right.factor)
    known = lambda side: 1 - jnp.diagonal(side.spread) / jnp.diagonal(side.prior)
    share = known(left) * known(right)
    rank = jnp.sum((share > SUPPORTED) & (sizes > 0), dtype=jnp.int32)
    kept = jnp.arange(d)[None, :] < rank
    gauge = jnp.where(kept.T, gauge, 0) * scale
    return CompletionFit(
        low_rank=LowRank(outer(left.factor, gauge), turned),
        rank=rank,
        noise=jnp.sqrt(state.noise) * scale,
        residual=state.move,
        steps=state.taken,
        converged=state.move <= tol,
        prior=Prior(gauge, left.mean, right.spread * scale**2),
        robust=robust,
    )

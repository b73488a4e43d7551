"""Complete a low-rank matrix with effects of its rows and columns."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike

from ..._progress import Meter
from .._inputs import VectorLike, check_not_negative, check_width, matrix_entries
from ..derivatives import refuse_derivatives
from .completed import NO_DERIVATIVE, CompletionFit, assemble
from .entries import check_entries, observed
from .features import check_features, pattern_basis, pattern_features, units_of
from .grouped import Reduce, group_by_row, identity
from .iteration import Data, Model, held_out, iterate, share_held, start, windows
from .standardize import center_and_scale


WIDEST = 40  # default width where the rank is not given
PATTERNS = 16  # singular vectors of the pattern that are features,
ROWS_OF_PATTERN = 32  # but at most one for so many rows or columns
UNKNOWNS = 1.5  # that each entry can stand for, if most are shrunk
EFFECTS = {"both": (True, True), "rows": (True, False), "cols": (False, True)}


def fit_completion(
    rows: VectorLike,
    cols: VectorLike = None,
    values: VectorLike = None,
    shape: Sequence[int] | None = None,
    *,
    rank: int | None = None,
    effects: Literal["both", "rows", "cols"] | None = "both",
    units: Literal["shared", "columns"] = "shared",
    robust: bool = False,
    row_features: ArrayLike | None = None,
    col_features: ArrayLike | None = None,
    pattern: bool = True,
    limits: tuple[ArrayLike, ArrayLike] | None = None,
    tol: ArrayLike = 1e-5,
    max_steps: int = 100,
    progress: bool = False,
    reduce: Reduce | None = None,
) -> CompletionFit:
    """Complete a matrix of which some entries are known, ``X[rows, cols] ≈ values``.

    Rows and columns have effects of their own, and the rest is of low rank:

        x_ij = center + b_i + c_j + u_iᵀ v_j + noise of variance σ_j².

    Everything is estimated that one usually has to tune. ``(u_i, b_i)`` are drawn from a
    Gaussian with mean μ and covariance S, ``(v_j, c_j)`` from another one. Given the
    columns, the posterior of a row is a ridge regression on ``w_j = (v_j, 1)``,

        (u_i, b_i) = (Σ_j λ_j (w_j w_jᵀ + C_j) + S⁻¹)⁻¹ (Σ_j λ_j (x_ij − c_j) w_j + S⁻¹ μ),

    ``λ_j = 1/σ_j²``, over the observed columns j of row i; C_j is the covariance of w_j
    (that with c_j goes into the sum, too), of which ``λ_j C_j`` is averaged. Then μ, S are
    estimated from it, and rows and columns change places (mean-field variational Bayes),
    where the covariance of the rows is averaged over those that column j was observed in
    if the table is small. Each column has noise of its own, drawn to that of the others; if
    gross errors are reckoned with, all have the same. The ridge
    follows the noise: exactly low-rank data are fitted to rounding error, noisy ones are
    shrunk as they should, and so are effects that there are not. Directions that the
    data do not support fade out: so the rank is found. A fit of ``a X + c`` is ``a`` times
    that of ``X``, plus ``c``.

    First a part of the entries is held out. When the others are fitted, those tell how
    well, ``fit.held_out_error``; then the fit goes on with all.

    An iteration takes ``O(count · width² + (m + n) width³)`` operations; beside the data,
    sorted by row and by column, and the factors it needs the memory of a few hundred
    rows. Pure: jit it (``shape``, ``rank``, ``effects``, ``units``, ``robust``,
    ``pattern``, ``max_steps``, ``reduce`` static) and ``vmap`` it over matrices; where
    they have different numbers of entries, fill up with NaN.

    Not differentiable, and refused in both modes: it iterates for as long as it takes, and
    where the width exceeds the rank of data without noise the solution has no derivative.
    A fixed number of steps of :func:`lrjax.solve` from ``fit.low_rank`` has one.

    Args:
        rows: ``(count,)``, integers in ``[0, m)``, in any order. Alone the matrix itself,
            with NaN for what is missing: a table, an array or what else
            :func:`matrix_entries` takes.
        cols: ``(count,)``, integers in ``[0, n)``.
        values: ``(count,)``, integers or floats; entries that are not finite count as
            missing. An
            entry that is given several times counts as so many observations. Rows and
            columns without entries are completed as their features say or, without any,
            as mean row and mean column.
        shape: ``(m, n)``.
        rank: the largest rank of what is not effects, by default 40, the shorter side or
            what so many entries can determine. A rank that is too large costs time, not
            accuracy.
        effects: of rows and columns, of one of them, or ``None``: a matrix that is of low
            rank as it is, and whose values have no center either.
        units: ``"columns"`` if each column has a unit of its own, as in a table of
            measurements: then a fit of columns in other units is that fit in these units.
            Every column is centered and scaled by itself. ``"shared"`` as in ratings or
            pixels.
        robust: noise with heavy tails, Student's t with two degrees of freedom, by
            reweighting in the same iteration: gross errors in a quarter of the entries do
            no harm.
        row_features: ``(m, p)``, what is known of the rows: the prior mean of a row is
            linear in it.
        col_features: ``(n, q)``, what is known of the columns, likewise.
        pattern: whether it may tell something which entries there are, as what people have
            chosen to rate, or what was too small to be measured: how many entries a row
            has and where they lie (leading singular vectors of the pattern) are features,
            too. What does not help fades out.
        limits: ``(least, most)``, to which ``predict`` clips.
        tol: stop when an iteration moves the matrix by less than this share of its norm,
            or by next to nothing against its uncertainty.
        max_steps: at most as many iterations.
        progress: show a progress bar with how far a step moves the matrix, relative to its
            norm, once without the entries held out and once with all, as
            :func:`lrjax.solve` does.
        reduce: where the rows of the matrix are spread over devices, within
            ``shard_map``: ``lambda x: jax.lax.psum(x, "rows")``. Then ``rows`` and ``m``
            are those of one device, and so is the result but for its ``right`` factor.

    Returns:
        A :class:`CompletionFit`.

    Raises:
        ValueError: for arrays that are no vectors of one length, no entries, indices or
            a rank out of range. What is traced is not checked: then entries with indices
            out of range count as missing. Where it is differentiated by the values.
        TypeError: for values that are no numbers, booleans and dates among them; for one
            or two of ``cols``, ``values`` and ``shape`` without the others.
        ImportError: with ``progress`` where tqdm is not installed.

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
    rows, cols, values, shape = _entries_of(rows, cols, values, shape)
    check_not_negative("fit_completion", tol=tol)
    rows, cols, values = check_entries("fit_completion", rows, cols, values, shape)
    of_rows = check_features("row", row_features, shape[0])
    of_cols = check_features("column", col_features, shape[1])
    limits = _check_limits(limits)
    sentence = NO_DERIVATIVE.format("fit_completion")
    values, tol, of_rows, of_cols = refuse_derivatives(
        sentence, (values, tol, of_rows, of_cols)
    )
    spread = reduce is not None
    reduce = identity if reduce is None else reduce
    width = _width(shape, len(values), rank, spread)
    return _fit(
        rows,
        cols,
        values,
        of_rows,
        of_cols,
        limits,
        tol,
        shape=(shape[0], shape[1]),
        model=Model(width, *_check_effects(effects, units), robust, reduce),
        by_column=units == "columns",
        pattern=pattern,
        max_steps=max_steps,
        meter=Meter("lrjax.fit_completion", max_steps, "step") if progress else None,
    )


# Compiled once for data of one shape: fits are also called outside of jit, again and again.
@functools.partial(
    jax.jit,
    static_argnames=("shape", "model", "by_column", "pattern", "max_steps", "meter"),
)
def _fit(
    rows: Array,
    cols: Array,
    values: Array,
    of_rows: Array,
    of_cols: Array,
    limits: tuple[Array, Array] | None,
    tol: Array,
    *,
    shape: tuple[int, int],
    model: Model,
    by_column: bool,
    pattern: bool,
    max_steps: int,
    meter: Meter | None,
) -> CompletionFit:
    """The fit of entries and features that are checked."""
    reduce = model.reduce
    rows, cols, values = observed(rows, cols, values, shape)
    center, scale = center_and_scale(
        values,
        rows < shape[0],
        cols,
        shape[1],
        by_column=by_column,
        centered=model.row_effects or model.col_effects,
        robust=model.robust,
        reduce=reduce,
    )
    at = cols if by_column else jnp.zeros_like(cols)
    values = (values - jnp.take(center, at, mode="clip")) / jnp.take(scale, at, mode="clip")
    by_row = group_by_row(rows, cols, values, shape[0])
    by_col = group_by_row(cols, rows, values, shape[1], reduce)
    of_rows = of_rows.astype(values.dtype)
    of_cols = of_cols.astype(values.dtype)
    basis, k = None, -1
    if pattern:
        k = max(1, min(PATTERNS, min(shape) // ROWS_OF_PATTERN))
        row_basis, basis = pattern_basis(by_row, by_col, k, reduce)
        told = pattern_features(by_row, basis)
        of_rows = jnp.concatenate([of_rows, told], axis=1)
        told = pattern_features(by_col, row_basis, reduce)
        of_cols = jnp.concatenate([of_cols, told], axis=1)
    row_units = units_of(of_rows, jnp.diff(by_row.starts) > 0, 1 + k, reduce)
    col_units = units_of(of_cols, reduce(jnp.diff(by_col.starts)) > 0, 1 + k, identity)
    data = Data(by_row, by_col, row_units(of_rows), col_units(of_cols))
    held, others = windows(share_held(len(values)))

    def phase(state, window_and_limit):
        window, limit = window_and_limit
        seen = data._replace(
            by_row=data.by_row._replace(window=window),
            by_col=data.by_col._replace(window=window),
        )
        state = iterate(seen, model, state, tol=tol, limit=limit, meter=meter)
        return state, held_out(data, model, state, held)

    # First without the entries held out, then with all.
    every = jnp.stack([others, data.by_row.window])
    limits_of_phases = jnp.asarray([-(-3 * max_steps // 4), max_steps])
    state, errors = lax.scan(phase, start(data, model), (every, limits_of_phases))
    error = jax.tree.map(lambda x: x[0], errors)
    return assemble(state, error, model, center, scale, row_units, basis, limits)


def _entries_of(rows, cols, values, shape) -> tuple[Any, Any, Any, tuple[int, ...]]:
    """The four arguments, or those of a matrix that is given alone."""
    if cols is None and values is None and shape is None:
        return matrix_entries(rows)
    if cols is None or values is None or shape is None:
        raise TypeError(
            "fit_completion takes a matrix alone, with NaN for what is missing, or rows, "
            "cols, values and shape, all of them. A mask: fit_completion(*lrjax.recovery."
            "matrix_entries(matrix, mask))."
        )
    return rows, cols, values, tuple(shape)


def _check_effects(effects: str | None, units: str) -> tuple[bool, bool]:
    """Whether rows and columns have effects."""
    if units not in ("shared", "columns"):
        raise ValueError(f"units must be 'shared' or 'columns', got {units!r}.")
    if effects is None:
        return False, False
    if effects not in EFFECTS:
        raise ValueError(
            f"effects must be 'both', 'rows', 'cols' or None, got {effects!r}."
        )
    return EFFECTS[effects]


def _check_limits(limits) -> tuple[Array, Array] | None:
    """The range of predictions as two arrays."""
    if limits is None:
        return None
    if len(limits) != 2:
        raise ValueError(f"limits are a pair (least, most), got {limits!r}.")
    least, most = (jnp.asarray(x) for x in limits)
    if not any(isinstance(x, Tracer) for x in (least, most)) and not least < most:
        raise ValueError(f"limits are a pair (least, most), least first; got {limits!r}.")
    return least, most


def _width(shape: tuple[int, ...], count: int, rank: int | None, spread: bool) -> int:
    """The width of the factors."""
    short = shape[1] if spread else min(shape)
    if rank is None:
        # More directions than entries can determine only cost time.
        enough = short if spread else int(UNKNOWNS * count / sum(shape)) + 1
        return min(WIDEST, short, enough)
    return check_width("fit_completion", rank, short, shape)

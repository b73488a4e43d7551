"""The whole fit of a matrix in parts: its unit, its start, its weight and its noise."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float

from ..._progress import Meter
from ...linalg import nonzero
from ..fill_in import fill_in
from .augmented_lagrangian import Parts, leading, separate
from .groups import ENTRIES, Groups
from .held_out import Choice, Run, Table, Weights, choose, choose_by_sample


CLOSE = 100.0  # times the tolerance: exact, for entries held out
MARGIN = 1.25  # over the largest singular value that noise alone is expected to have
OUTSIDE = 3.0  # standard deviations of noise that an error is beyond
POLISH = 5  # steps without the bias of thresholds, where there is noise
STEPS_OF_ROWS = 300  # of new rows, at most
SIDE = 512  # rows, and columns, that tell of more of them
HEADROOM = 100  # powers of two that the largest entry may be above the unit


# Compiled once for matrices of one shape: fits are also called outside of jit, again and
# again.
@functools.partial(jax.jit, static_argnames=("width", "max_steps", "groups", "meter"))
def take_apart(
    matrix: Float[Array, "m n"],
    mask: Bool[Array, "m n"],
    width: int,
    *,
    weights: Weights,
    tol: ArrayLike,
    max_steps: int,
    groups: Groups = ENTRIES,
    known: Float[Array, "k n"] | None = None,
    meter: Meter | None = None,
) -> tuple[Parts, Choice]:
    """Take a matrix apart at the best of several settings.

    The iteration sees the longer side as rows, so that the basis that each step computes
    with is short, and the matrix in a power of two as unit, so that data of any size
    take the same steps. Of a large matrix a sample of the rows and columns chooses.

    Args:
        matrix: what is observed, zeros elsewhere.
        mask: where it is observed.
        width: of the factors.
        weights: of the nuclear norm.
        tol: of the residual.
        max_steps: of one fit.
        groups: entries that are wrong together.
        known: rows without errors and noise, on top of the matrix.
        meter: is told how far every fit is.

    Returns:
        The parts, without the known rows, and the choice.
    """
    start = _filled(matrix, mask)
    unit = _unit_of(matrix, start)
    matrix, start = matrix / unit, start / unit
    skip = 0
    if known is not None:
        # Blocks of rows begin where those of the matrix do.
        known = jnp.pad(known / unit, ((-len(known) % (groups.rows or 1), 0), (0, 0)))
        skip = len(known)
        matrix, start = (jnp.concatenate([known, x]) for x in (matrix, start))
        mask = jnp.concatenate([jnp.ones_like(known, bool), mask])
    shape = matrix.shape
    table = Table(matrix, mask, start, (jnp.arange(shape[0]) < skip)[:, None])
    rows = np.arange(skip), skip + _some(shape[0] - skip, groups.rows)
    rows, cols = np.concatenate(rows), _some(shape[1], groups.cols)
    part = lambda x: x[rows][:, cols]
    sample = Table(part(matrix), part(mask), part(start), table.known[rows])
    wide = shape[0] < shape[1]
    if wide:
        table, sample, groups = table.T, sample.T, groups.T
    program = functools.partial(
        _program, width=width, tol=tol, max_steps=max_steps, groups=groups, meter=meter
    )
    options = {"whole_lines": groups != ENTRIES, "close": CLOSE * tol}
    if sample.matrix.shape == table.matrix.shape:
        parts, choice = choose(program(table), table, weights, **options)
    else:
        both = program(table), table, program(sample), sample
        parts, choice = choose_by_sample(*both, weights, **options)
    if wide:
        parts = parts._replace(
            vectors=parts.basis, basis=parts.vectors, sparse=parts.sparse.T
        )
    parts = parts._replace(
        vectors=parts.vectors[skip:],
        values=parts.values * unit,
        sparse=parts.sparse[skip:] * unit,
    )
    return parts, choice._replace(noise=choice.noise * unit)


@jax.jit
def coordinates(
    rows: Float[Array, "k n"],
    mask: Bool[Array, "k n"],
    basis: Float[Array, "n r"],
    tol: Float[Array, ""],
) -> Float[Array, "k r"]:
    """The coordinates of new rows in a basis that is held, beside their gross errors.

    Compiled once for rows of one shape: they also come outside of jit, batch by batch.
    """
    unit = _unit_of(rows, rows)
    rows = rows / unit
    parts = separate(
        rows,
        mask,
        rows,
        basis,
        sparse_weight=1.0,
        penalty=_first_penalty(jnp.sqrt(jnp.max(jnp.sum(rows * rows, axis=-1)))),
        tol=tol,
        max_steps=STEPS_OF_ROWS,
        adapt_basis=False,
    )
    return parts.vectors * unit


def _program(
    table: Table,
    width: int,
    tol: ArrayLike,
    max_steps: int,
    groups: Groups,
    meter: Meter | None,
) -> Run:
    """The fit of a table, all of it or with entries hidden, at any setting."""
    matrix, exact = table.matrix, table.known
    basis, largest = _first_basis(table.start, min(width, *matrix.shape))

    def run(mask: Array, weight: Array, noise: Array, patience: Array) -> Parts:
        share = _share(mask)
        scale = weight * _scale(share, matrix.shape, groups)
        level = MARGIN * noise * _sides(matrix.shape) * jnp.sqrt(share)
        parts = separate(
            matrix,
            mask,
            table.start,
            basis,
            # The program divided by the weight of the nuclear norm. An infinite weight
            # allows no errors.
            sparse_weight=jnp.where(exact, jnp.inf, 1 / scale),
            penalty=_first_penalty(largest),
            tol=tol,
            max_steps=max_steps,
            noise=level,
            groups=groups,
            patience=patience,
            meter=meter,
        )
        # A block of noise alone is as long as this, or a little longer.
        length = noise * jnp.sqrt(jnp.maximum(groups.size(matrix.shape) * share, 1))
        outside = jnp.where(exact, jnp.inf, OUTSIDE * length)
        return _polish(parts, matrix, mask, groups, outside, level / share)

    return run


def _some(side: int, block: int | None) -> np.ndarray:
    """Some of many rows or columns, blocks of them as a whole; all of a few."""
    size = block or 1
    blocks = -(-side // size)
    most = max(SIDE // size, 1)
    if side <= SIDE or blocks <= most:
        return np.arange(side)
    chosen = np.random.default_rng(0).choice(blocks, most, replace=False)
    index = np.sort(chosen)[:, None] * size + np.arange(size)
    return index[index < side]


def _first_penalty(largest: Array) -> Array:
    """The penalty of which the first step cuts singular values by 0.8 of the largest."""
    return 1.25 / nonzero(largest)


def _unit_of(matrix: Array, start: Array) -> Array:
    """A power of two near the largest entry of the first guess.

    Not of the matrix, whose errors may be of any size, so long as none of them overflows.
    """
    exponent = lambda x: jnp.frexp(jnp.max(jnp.abs(x)))[1]
    most = jnp.maximum(exponent(start), exponent(matrix) - HEADROOM)
    return jnp.ldexp(jnp.ones((), matrix.dtype), jnp.clip(most, -125, 125))


def _share(mask: Array) -> Array:
    return jnp.maximum(jnp.mean(mask, dtype=jnp.float32), 1 / mask.size)


def _scale(share: Array, shape: tuple[int, ...], groups: Groups) -> Array:
    """The natural scale of the weight: ``sqrt(observed share · longer side)`` for entries.

    The multiplier of a group is spread over its entries. Twice that, as the lengths of
    groups vary less than entries do.
    """
    natural = jnp.sqrt(share * max(shape))
    if groups == ENTRIES:
        return natural
    return 2 * natural / jnp.sqrt(jnp.maximum(groups.size(shape) * share, 1))


def _sides(shape: tuple[int, ...]) -> float:
    """The norm of a matrix of independent entries of unit variance."""
    return sum(side**0.5 for side in shape)


def _polish(
    parts: Parts,
    matrix: Array,
    mask: Array,
    groups: Groups,
    outside: Array,
    shrunk: Array,
) -> Parts:
    """Least squares of the same rank where there are no errors.

    Singular values first get back what the threshold of the noise took from them,
    ``shrunk``. Errors are what is then farther than ``outside`` from the low-rank part.
    Exact parts, of which nothing was taken, stay as they are.
    """
    used = parts.values > 0

    def refit(_, parts: Parts) -> Parts:
        low_rank = parts.low_rank
        rest = jnp.where(mask, matrix - low_rank, 0)
        wrong = groups.reach(rest, outside)
        cleaned = low_rank + jnp.where(wrong, 0, rest)
        vectors, values, basis = leading(cleaned, parts.basis)
        return parts._replace(
            vectors=vectors,
            values=jnp.where(used, values, 0),
            basis=basis,
            sparse=jnp.where(wrong, rest, 0),
        )

    whole = parts._replace(values=jnp.where(used, parts.values + shrunk, 0))
    return lax.fori_loop(0, jnp.where(shrunk > 0, POLISH, 0), refit, whole)


def _filled(matrix: Array, mask: Array) -> Array:
    """Medians over the longer side for outliers and missing entries.

    Zeros where a whole row or column is missing: there the low-rank part stays zero.
    """
    if matrix.shape[0] < matrix.shape[1]:
        return _filled(matrix.T, mask.T).T
    start = fill_in(matrix, mask)
    return jnp.where(jnp.any(mask, axis=1, keepdims=True), start, 0)


def _first_basis(start: Array, width: int) -> tuple[Array, Array]:
    """Leading right singular vectors of the first guess, and its largest singular value.

    From random columns three steps settle the leading vectors, which the iteration
    tracks, and their order, which its decompositions rely on.
    """
    basis = jr.normal(jr.key(0), (start.shape[1], width), start.dtype)
    settle = lambda _, found: leading(start, found[1])[1:]
    values, basis = lax.fori_loop(0, 3, settle, (jnp.zeros(width, start.dtype), basis))
    return basis, values[0]

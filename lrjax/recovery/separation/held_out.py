from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ...linalg import order_statistic
from .augmented_lagrangian import PATIENCE, Parts


SHARE, MOST = 0.05, 10_000  # entries held out: a share of them, at most so many
FEWEST = 10  # entries that a row or a column keeps, or none of it is held out
NORMAL_MEDIAN = 0.6745  # of the absolute values of a standard normal variable
ROUNDS = 2  # of a fit with noise, whose size the one before has left
SURPLUS = 0.1  # of the entries, beyond as many as are free, that prove exactness
GAIN, SLACK = 0.98, 1.02  # times the loss that a fit with noise may have; at half the rank
CHANCE = 0.01  # closeness that far fewer entries than these have by chance
ALIKE = 3.0  # standard deviations of the error held out that count as near it


class Weights(NamedTuple):
    """Of the nuclear norm: to prove exactness, and for what is not exact.

    Attributes:
        exact: tried in this order.
        plain: where none of them proves itself.
        noisy: the same with noise.
    """

    exact: Sequence[ArrayLike]
    plain: ArrayLike
    noisy: ArrayLike


class Choice(NamedTuple):
    """What the data say of a fit: its exactness, or else entries held out.

    Attributes:
        weight: of the nuclear norm.
        noise: standard deviation of what neither part explains, zero where leaving it
            out predicts as well.
        loss: the mean of the absolute errors of the prediction, none of which counts more
            than the size of the first guess: gross errors add the same to every choice.
        error: the median of the absolute errors, which they do not touch up to half;
            infinite where none was held out.
        size: the root mean square of the low-rank part that predicts, to measure by.
        rank: of that low-rank part.
        alike: whether the low-rank part is :func:`certain` up to that error: no row and no
            column has a direction for itself alone, of which others say nothing.
        certain: whether the low-rank part proves itself, see :func:`certain`.
    """

    weight: Float[Array, ""]
    noise: Float[Array, ""]
    loss: Float[Array, ""]
    error: Float[Array, ""]
    size: Float[Array, ""]
    rank: Int[Array, ""]
    alike: Bool[Array, ""]
    certain: Bool[Array, ""]


class _State(NamedTuple):
    turn: Int[Array, ""]
    error: Array  # of the last turn
    chosen: Choice
    parts: Parts
    steps: Int[Array, ""]


class Table(NamedTuple):
    """What a fit sees.

    Attributes:
        matrix: ``(m, n)``.
        mask: what is observed.
        start: the first guess of the low-rank part.
        known: rows ``(m, 1)`` or columns ``(1, n)`` without errors, never held out.
    """

    matrix: Float[Array, "m n"]
    mask: Bool[Array, "m n"]
    start: Float[Array, "m n"]
    known: Bool[Array, "..."]

    @property
    def seen(self) -> tuple[Array, Array, Array]:
        """All but the guess."""
        return self.matrix, self.mask, self.known

    @property
    def T(self) -> "Table":
        """Of the transpose."""
        return Table(*(x.T for x in self))


Run = Callable[[Array, Array, Array, Array], Parts]  # (mask, weight, noise, patience)


def choose(
    run: Run,
    table: Table,
    weights: Weights,
    *,
    whole_lines: bool,
    close: ArrayLike,
    skip: ArrayLike = False,
) -> tuple[Parts, Choice]:
    """The parts at a weight that proves itself, or else at the noise that predicts best.

    The weights are tried one after the other on all entries, until a fit is
    :func:`certain`; the first of them also in a hurry, before, with a penalty that always
    grows fast: a third of the steps, and enough for most matrices. Where none is, the
    matrix is not exactly low-rank plus sparse, and no weight predicts entries better than
    the others: a low one takes up the most. Some entries are hidden to see whether there
    is noise on all entries beside the errors on a few, of the size that the errors on the
    hidden entries show; once these are predicted nearly exactly no noise is tried. Then
    all entries are fitted, with noise if that predicted better or as well at half the
    rank. Half of the hidden entries may be gross errors: the median does not notice.

    One loop around one program, in place of a program for each weight.

    Args:
        run: the fit of this table at a setting.
        table: the matrix.
        weights: of the nuclear norm, the likeliest first.
        whole_lines: whether rows and columns may be wrong everywhere.
        close: what counts as exact, relative to the root mean square of the low-rank part.
        skip: take no turn, and choose the first of the weights.

    Returns:
        The parts of the fit of all entries, with the steps of all fits, and the choice.
    """
    matrix, mask, known = table.matrix, table.mask, table.known
    dtype = matrix.dtype
    held = _held_out(mask) & ~known
    count = jnp.sum(held, dtype=jnp.int32)
    largest = jnp.sqrt(jnp.mean(table.start**2))
    # Turns: all entries in a hurry; a weight after the other on them; with some hidden,
    # without noise and then with noise; all entries, as chosen.
    path = [weights.exact[0], *weights.exact, weights.plain, *[weights.noisy] * ROUNDS]
    path = jnp.stack([jnp.asarray(weight, dtype) for weight in path])
    hidden = 1 + len(weights.exact)
    last = len(path)

    def judge(parts: Parts, weight: Array, noise: Array, whole: Array) -> Choice:
        low_rank = parts.low_rank
        errors = jnp.where(held, jnp.abs(matrix - low_rank), 0)
        error, size = _median(errors, count), _size(low_rank, known)
        near = jnp.where(whole, jnp.minimum(close, CHANCE) * size, ALIKE * deviation(error))
        alike = certain(parts, *table.seen, near=near, whole_lines=whole_lines)
        return Choice(
            weight,
            noise,
            loss=jnp.sum(jnp.minimum(errors, largest)),
            error=error,
            size=size,
            rank=jnp.sum(parts.values > 0, dtype=jnp.int32),
            alike=alike,
            certain=whole & alike & (parts.residual <= close),
        )

    def take_turn(state: _State) -> _State:
        turn, chosen = state.turn, state.chosen
        whole, final = (turn < hidden) | (turn == last), turn == last
        noise = jnp.where(turn > hidden, deviation(state.error), 0)
        noise = jnp.where(final, chosen.noise, noise)
        weight = jnp.where(final, chosen.weight, path[turn % last])
        patience = jnp.where((turn > 0) & (turn < hidden), PATIENCE, 0)
        parts = run(mask & (whole | ~held), weight, noise, patience)
        tried = judge(parts, weight, noise, whole)
        sure = tried.certain & ~final
        exact = tried.error <= close * tried.size
        most = jnp.where(2 * tried.rank <= chosen.rank, SLACK, GAIN) * chosen.loss
        better = (turn == hidden) | ((turn == last - 1) & (tried.loss < most))
        best = none._replace(weight=weight, size=tried.size, certain=sure)
        chosen = _where(sure, best, _where(better, tried, chosen))
        settled = ((turn == hidden) & exact) | ((turn == hidden - 1) & (count == 0))
        following = jnp.where(settled, last, turn + 1)
        return _State(
            turn=jnp.where(sure, last + 1, following),
            error=tried.error,
            chosen=chosen,
            parts=parts,
            steps=state.steps + parts.steps,
        )

    deviation = lambda error: error / NORMAL_MEDIAN
    none = _nothing(path[0])
    state = _State(
        turn=jnp.where(skip, last + 1, 0).astype(jnp.int32),
        error=none.error,
        chosen=none,
        parts=_empty(run, mask, path[0], none.noise, jnp.zeros((), jnp.int32)),
        steps=jnp.zeros((), jnp.int32),
    )
    state = lax.while_loop(lambda state: state.turn <= last, take_turn, state)
    return state.parts._replace(steps=state.steps), state.chosen


def choose_by_sample(
    run: Run,
    table: Table,
    run_sample: Run,
    sample: Table,
    weights: Weights,
    *,
    whole_lines: bool,
    close: ArrayLike,
) -> tuple[Parts, Choice]:
    """As :func:`choose`, by what is best for a sample of the rows and columns.

    The whole is fitted once in a hurry, and if that does not prove itself once more, at
    the choice for the sample.
    """

    def take_turn(state: _State) -> _State:
        tries, choice = choose(
            run_sample,
            sample,
            weights,
            whole_lines=whole_lines,
            close=close,
            skip=state.turn == 0,
        )
        patience = jnp.where(choice.certain, PATIENCE, 0)
        parts = run(table.mask, choice.weight, choice.noise, patience)
        size = _size(parts.low_rank, table.known)
        near = jnp.minimum(close, CHANCE) * size
        sure = certain(parts, *table.seen, near=near, whole_lines=whole_lines)
        sure &= parts.residual <= close
        size = jnp.where(sure, size, choice.size)
        return _State(
            turn=jnp.where(sure, 2, state.turn + 1),
            error=choice.error,
            chosen=choice._replace(certain=sure, size=size),
            parts=parts,
            steps=state.steps + tries.steps + parts.steps,
        )

    zero = jnp.zeros((), jnp.int32)
    none = _nothing(jnp.asarray(weights.exact[0], table.matrix.dtype))
    parts = _empty(run, table.mask, none.weight, none.noise, zero)
    state = _State(zero, none.error, none, parts, zero)
    state = lax.while_loop(lambda state: state.turn < 2, take_turn, state)
    return state.parts._replace(steps=state.steps), state.chosen


def certain(
    parts: Parts,
    matrix: Float[Array, "m n"],
    mask: Bool[Array, "m n"],
    known: Bool[Array, "..."] | bool = False,
    *,
    near: ArrayLike,
    whole_lines: bool = False,
) -> Bool[Array, ""]:
    """Whether the low-rank part is equal to more entries than its freedom explains.

    A matrix of rank r has ``r (m + n − r)`` free numbers and can be made
    equal to as many entries of anything; that it is equal to many more is no accident.
    Of these numbers ``r + h (n − r)`` are those of a row with the leverage h, which is its
    share of the left singular vectors: near one where a direction is there for this row
    alone. The same must hold for every row and every column.

    Args:
        parts: of the matrix.
        matrix: ``(m, n)``.
        mask: the entries that are observed.
        known: rows or columns without errors, which have nothing to prove.
        near: what counts as equal.
        whole_lines: whether the parts may leave rows and columns out, wrong everywhere.
    """
    used = parts.values > 0
    rank = jnp.sum(used)
    low_rank, known = parts.low_rank, jnp.asarray(known)
    # Known lines of zeros say nothing.
    mask = mask & (~known | (low_rank != 0))
    equal = mask & (jnp.abs(matrix - low_rank) <= near)
    claimed = equal if whole_lines else mask
    rows, cols = (jnp.sum(jnp.any(claimed, axis=axis)) for axis in (1, 0))
    free = rank * (rows + cols - rank)
    fine = jnp.sum(equal) - free > SURPLUS * jnp.sum(mask)
    for vectors, length, axis in ((parts.vectors, cols, 1), (parts.basis, rows, 0)):
        leverage = jnp.sum(jnp.where(used, vectors, 0) ** 2, axis=1)
        free = rank + leverage * (length - rank)
        enough = jnp.sum(equal, axis) - free > SURPLUS * jnp.sum(mask, axis)
        fine &= jnp.all(enough | ~jnp.any(claimed & ~known, axis))
    return fine


def _where(condition: Array, new: Choice, old: Choice) -> Choice:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _size(low_rank: Array, known: Array) -> Array:
    """The root mean square of what is not known."""
    count = low_rank.size / known.size * jnp.sum(~known)
    return jnp.sqrt(jnp.sum(jnp.where(known, 0, low_rank**2)) / count)


def _nothing(weight: Array) -> Choice:
    """Before anything is known."""
    nothing, endless = jnp.zeros_like(weight), jnp.full_like(weight, jnp.inf)
    return Choice(
        weight,
        noise=nothing,
        loss=endless,
        error=endless,
        size=nothing,
        rank=jnp.zeros((), jnp.int32),
        alike=jnp.zeros((), bool),
        certain=jnp.zeros((), bool),
    )


def _empty(run: Callable, *inputs: Array) -> Parts:
    """Zeros, placed as the parts of the matrix will be."""
    shapes = jax.eval_shape(run, *inputs)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _held_out(mask: Array) -> Array:
    share = min(SHARE, MOST / mask.size)
    chosen = jr.bernoulli(jr.key(1), share, mask.shape) & mask
    enough = [jnp.sum(mask, axis=axis, keepdims=True) >= FEWEST for axis in (0, 1)]
    return chosen & enough[0] & enough[1]


def _median(errors: Array, count: Array) -> Array:
    """Of the ``count`` positive ones among zeros."""
    flat = errors.reshape(-1)
    found = order_statistic(flat, (count + 1) // 2, axis=0)[0]
    return jnp.where(count > 0, found, jnp.inf)

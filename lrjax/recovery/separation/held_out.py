from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ...linalg import order_statistic
from .augmented_lagrangian import PATIENCE, Parts


SHARE, MOST = 0.05, 2000  # entries held out: a share of them, at most so many
FEWEST = 10  # entries that a row or a column keeps, or none of it is held out
NORMAL_MEDIAN = 0.6745  # of the absolute values of a standard normal variable
NOISY = 1.0  # the weight of a fit with noise, which depends on it little
ROUNDS = 2  # of a fit with noise, whose size the one before has left
SURPLUS = 0.1  # of the entries, beyond as many as are free, that prove exactness
SLACK = 1.02  # times the loss that a fit with noise may have at half the rank
CHANCE = 0.01  # closeness that far fewer entries than these have by chance


class Choice(NamedTuple):
    """What the data say of a fit: its exactness, or else entries held out.

    Attributes:
        weight: of the nuclear norm: the first at which the fit is certain, or the one that
            predicts entries held out best.
        noise: standard deviation of what neither part explains, zero where leaving it
            out predicts better.
        loss: the mean of the absolute errors of the prediction, none of which counts more
            than the size of the first guess: gross errors add the same to every choice.
        error: the median of the absolute errors, which they do not touch up to half;
            infinite where none was held out.
        size: the root mean square of the low-rank part that predicts, to measure by.
        rank: of that low-rank part.
        certain: whether the low-rank part proves itself, see :func:`certain`.
    """

    weight: Float[Array, ""]
    noise: Float[Array, ""]
    loss: Float[Array, ""]
    error: Float[Array, ""]
    size: Float[Array, ""]
    rank: Int[Array, ""]
    certain: Bool[Array, ""]


class _State(NamedTuple):
    turn: Int[Array, ""]
    plain: Choice
    noisy: Choice
    chosen: Choice
    parts: Parts
    steps: Int[Array, ""]


def choose(
    run: Callable[[Array, Array, Array, Array], Parts],
    matrix: Float[Array, "m n"],
    mask: Bool[Array, "m n"],
    known: Bool[Array, "..."],
    weights: Sequence[ArrayLike],
    *,
    whole_lines: bool,
    largest: ArrayLike,
    close: ArrayLike,
) -> tuple[Parts, Choice]:
    """The parts at the weight and the noise that predict entries held out best.

    The weights are tried one after the other on all entries, until a fit is
    :func:`certain`; the first of them also in a hurry, before, with a penalty that always
    grows fast: a third of the steps, and enough for most matrices. Where none is, some
    entries are hidden, and the weights are tried again, and then noise of the size that
    the errors on the hidden entries show; once these are predicted nearly exactly no more
    is tried. Then all entries are fitted at the best weight, and with noise if that
    predicted better. Half of the hidden entries may be gross errors: the median does not
    notice.

    One loop around one program, in place of a program for each weight.

    Args:
        run: ``(mask, weight, noise, patience) -> Parts``.
        matrix: ``(m, n)``.
        mask: what is observed.
        known: rows ``(m, 1)`` or columns ``(1, n)`` without errors, never held out.
        weights: of the nuclear norm, the likeliest first.
        whole_lines: whether rows and columns may be wrong everywhere.
        largest: error that counts in the loss.
        close: what counts as exact, relative to the root mean square of the low-rank part.

    Returns:
        The parts of the fit of all entries, with the steps of all fits, and the choice.
    """
    dtype = matrix.dtype
    path = jnp.stack([jnp.asarray(weight, dtype) for weight in weights])
    held = _held_out(mask) & ~known
    count = jnp.sum(held, dtype=jnp.int32)
    # Turns: all entries in a hurry; a weight after the other on them; the same with some
    # hidden; with noise and some hidden; all entries without noise; all with noise.
    hidden, noisily = len(path) + 1, 2 * len(path) + 1
    whole = noisily + ROUNDS

    def judge(parts: Parts, weight: Array, noise: Array) -> Choice:
        low_rank = parts.low_rank
        errors = jnp.where(held, jnp.abs(matrix - low_rank), 0)
        return Choice(
            weight,
            noise,
            loss=jnp.sum(jnp.minimum(errors, largest)),
            error=_median(errors, count),
            size=_size(low_rank, known),
            rank=jnp.sum(parts.values > 0, dtype=jnp.int32),
            certain=jnp.zeros((), bool),
        )

    def take_turn(state: _State) -> _State:
        turn, plain, noisy = state.turn, state.plain, state.noisy
        first, alone, last = turn < hidden, turn < noisily, turn == whole + 1
        size = jnp.where(turn == noisily, plain.error, noisy.error) / NORMAL_MEDIAN
        turns = [alone, turn < whole, ~last]
        tried_alone = path[jnp.maximum(turn - 1, 0) % len(path)]
        with_noise = path[0] if len(path) == 1 else jnp.asarray(NOISY, dtype)
        weight = jnp.select(turns, [tried_alone, with_noise, plain.weight], noisy.weight)
        noise = jnp.select(turns, [nothing, size, nothing], noisy.noise)
        patience = jnp.where(turn == 0, 0, PATIENCE)
        shown = mask & (first | (turn >= whole) | ~held)
        parts = run(shown, weight, noise, patience)
        tried = judge(parts, weight, noise)
        proven = certain(parts, matrix, mask, known, close=close, whole_lines=whole_lines)
        sure = first & proven & (parts.residual <= close)
        better = alone & ~first & (tried.loss < plain.loss)
        plain = _where(better, tried, plain)
        noisy = _where(~alone & (turn < whole), tried, noisy)
        exact = plain.error <= close * plain.size
        simpler = 2 * noisy.rank <= plain.rank
        more = ~exact & (noisy.loss < jnp.where(simpler, SLACK, 1) * plain.loss)
        best = none._replace(weight=weight, size=tried.size, certain=sure)
        chosen = _where(sure, best, _where(last, noisy, plain))
        done = sure | ((turn == whole) & ~more)
        settled = jnp.where(first, (count == 0) & (turn == hidden - 1), alone & exact)
        following = jnp.where(settled, whole, turn + 1)
        return _State(
            turn=jnp.where(done, whole + 2, following),
            plain=plain,
            noisy=noisy,
            chosen=chosen,
            parts=parts,
            steps=state.steps + parts.steps,
        )

    nothing, endless = jnp.zeros((), dtype), jnp.asarray(jnp.inf, dtype)
    none = Choice(
        weight=path[0],
        noise=nothing,
        loss=endless,
        error=endless,
        size=nothing,
        rank=jnp.zeros((), jnp.int32),
        certain=jnp.zeros((), bool),
    )
    state = _State(
        turn=jnp.zeros((), jnp.int32),
        plain=none,
        noisy=none,
        chosen=none,
        parts=_empty(run, mask, path[0], nothing, jnp.zeros((), jnp.int32)),
        steps=jnp.zeros((), jnp.int32),
    )
    state = lax.while_loop(lambda state: state.turn < whole + 2, take_turn, state)
    return state.parts._replace(steps=state.steps), state.chosen


def certain(
    parts: Parts,
    matrix: Float[Array, "m n"],
    mask: Bool[Array, "m n"],
    known: Bool[Array, "..."] | bool = False,
    *,
    close: ArrayLike,
    whole_lines: bool = False,
) -> Bool[Array, ""]:
    """Whether the low-rank part is equal to more entries than its freedom explains.

    Without noise. A matrix of rank r has ``r (m + n − r)`` free numbers and can be made
    equal to as many entries of anything; that it is equal to many more is no accident.
    Of these numbers ``r + h (n − r)`` are those of a row with the leverage h, which is its
    share of the left singular vectors: near one where a direction is there for this row
    alone. The same must hold for every row and every column.

    Args:
        parts: of the matrix.
        matrix: ``(m, n)``.
        mask: the entries that are observed.
        known: rows or columns without errors, which have nothing to prove.
        close: what counts as equal, relative to the root mean square of the low-rank part.
        whole_lines: whether the parts may leave rows and columns out, wrong everywhere.
    """
    used = parts.values > 0
    rank = jnp.sum(used)
    low_rank, known = parts.low_rank, jnp.asarray(known)
    # Known lines of zeros say nothing.
    mask = mask & (~known | (low_rank != 0))
    near = jnp.minimum(close, CHANCE) * _size(low_rank, known)
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

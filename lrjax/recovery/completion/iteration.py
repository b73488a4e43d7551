"""The alternation of the two factors: start, steps, error at entries held out."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, UInt

from ..._progress import Meter
from ...linalg import gram, nonzero, orthonormalize, subspace_iteration
from ...lowrank import LowRank, relative_step
from .bayes import Side, regress, student_weights, whiten
from .features import first_precision, prior_mean
from .grouped import EVERY, Grouped, Reduce, back_project, identity, scan_rows
from .normal_equations import contract


POWER_STEPS = 3  # of the start
FIRST_NOISE = 5e-2  # share of the variance: more would let weak directions fade at once
FIRST_EFFECT = 0.1  # likewise, variance of the effects
LEAST_EFFECT = 1e-14
LEAST_NOISE = 1e-14
POOLED = 5.0  # entries of average noise that each column counts beside its own
CLIP = 3.0  # robust scales beyond which the start cuts values off
HELD = 1000  # entries held out, about,
LARGEST_SHARE = 0.1  # but at most this share
SETTLED = 2e-2  # a step is small that is this share of how unsure the matrix is
SETTLED_ROBUST = 3e-3  # likewise: weights that change draw steps out


@dataclasses.dataclass(frozen=True)
class Model:
    """What is decided before the data are seen.

    Attributes:
        width: ``d``, the columns of the factors.
        row_effects: whether each row has an effect of its own.
        col_effects: whether each column has.
        robust: whether gross errors are reckoned with.
        reduce: sums over the devices that share the rows.
    """

    width: int
    row_effects: bool
    col_effects: bool
    robust: bool
    reduce: Reduce

    def transposed(self) -> "Model":
        """The model of the transposed matrix."""
        return dataclasses.replace(
            self, row_effects=self.col_effects, col_effects=self.row_effects
        )


class Data(NamedTuple):
    """The entries and what is known of rows and columns, the constant one first."""

    by_row: Grouped
    by_col: Grouped
    row_features: Float[Array, "m p"]
    col_features: Float[Array, "n q"]


class State(NamedTuple):
    """What an iteration updates.

    Attributes:
        left: the rows.
        right: the columns.
        noise: ``(n,)``, the variance of the noise of each column.
        pooled: its average over the observed entries.
        unsure: the variance of the matrix, on average over the observed entries.
        move: how far the last step moved the matrix, relative to its norm.
        settled: whether that is little.
        taken: the number of steps.
    """

    left: Side
    right: Side
    noise: Float[Array, " n"]
    pooled: Float[Array, ""]
    unsure: Float[Array, ""]
    move: Float[Array, ""]
    settled: Bool[Array, ""]
    taken: Int[Array, ""]


class HeldOut(NamedTuple):
    """What was found where the fit had not seen the entries.

    Attributes:
        error: root mean square.
        expected: what the fit expects it to be, from noise and uncertainty.
        count: the weight of the entries, how many if not robust.
    """

    error: Float[Array, ""]
    expected: Float[Array, ""]
    count: Float[Array, ""]


def joined(
    side: Side, other: Side, sizes: Array, model: Model
) -> tuple[Array, Array, Array, Array]:
    """A matrix with effects as a product: what rows are regressed on, and how they start.

    ``x_ij ≈ u_iᵀ v_j + b_i + c_j`` is the product of ``[u_i, b_i / s, 1]`` and ``[v_j, s,
    c_j]``.

    Args:
        side: the rows ``[u_i, b_i]``.
        other: the columns ``[v_j, c_j]``.
        sizes: ones, and s for the effects.
        model: says which effects there are.

    Returns:
        The rows and their change, the columns and their spread.
    """
    d = model.width
    effect, known = int(model.row_effects), int(model.col_effects)
    start = jnp.pad(side.factor / sizes[None, :], ((0, 0), (0, known)), constant_values=1)
    change = jnp.pad(side.change / sizes[None, :], ((0, 0), (0, known)))
    ones = jnp.broadcast_to(sizes[None, d:], (len(other.factor), effect))
    vectors = jnp.concatenate([other.factor[:, :d], ones, other.factor[:, d:]], axis=1)
    # The constant has no spread.
    at = jnp.asarray([*range(d), *range(d + effect, d + effect + known)])
    width = d + effect + known
    spread = jnp.zeros((len(other.spread), width, width), sizes.dtype)
    spread = spread.at[:, at[:, None], at].set(other.spread)
    return start, change, vectors, spread


def start(data: Data, model: Model) -> State:
    """Singular vectors of the matrix with zeros for what is missing, by power iteration."""
    by_row, by_col, width = data.by_row, data.by_col, model.width
    m, n = len(by_row.order), len(by_col.order)
    dtype = by_row.values.dtype
    reduce = model.reduce
    if model.robust:
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

    def side(factor, prior, effect, features, groups):
        factor = jnp.pad(factor, ((0, 0), (0, int(effect))))
        f = factor.shape[1]
        prior = jnp.pad(prior, (0, f - width)) + FIRST_EFFECT * _effect(f, width, dtype)
        mean = jnp.zeros((features.shape[1], f), dtype)
        precision = first_precision(features, f)
        spread = jnp.zeros((groups, f, f), dtype)
        return Side(factor, factor, spread, mean, prior, precision)

    one = jnp.eye(width, dtype=dtype)
    prior = reduce(gram(left)) / total
    # For each column its own, where these are not many more numbers than the data.
    groups = n if n * (width + 1) ** 2 <= 2 * len(by_row.values) else 1
    return State(
        side(left, prior, model.row_effects, data.row_features, groups),
        side(right, one, model.col_effects, data.col_features, 1),
        # The weights of robust fits need a noise that covers the error of the start.
        jnp.full(n, 1 if model.robust else FIRST_NOISE, dtype),
        jnp.ones((), dtype),
        jnp.zeros((), dtype),
        jnp.full((), jnp.inf, dtype),
        jnp.array(False),
        jnp.zeros((), jnp.int32),
    )


def iterate(
    data: Data,
    model: Model,
    state: State,
    *,
    tol: ArrayLike,
    limit: ArrayLike,
    meter: Meter | None,
) -> State:
    """Regress the two factors on each other until the matrix moves no more.

    The meter is told how far each step moves it.
    """
    reduce, turned = model.reduce, model.transposed()
    by_row, by_col, row_features, col_features = data

    def step(state: State) -> State:
        left, right, found, sums = half(
            by_row,
            state.left,
            state.right,
            jnp.ones(len(state.left.factor), state.noise.dtype),
            lax.rsqrt(state.noise),
            row_features,
            model,
            reduce,
            identity,
        )
        # These squares are in units of the noise.
        weight = jnp.maximum(jnp.sum(sums.weight), 1)
        share = reduce(jnp.sum(found.squares)) / weight
        noise = jnp.maximum(state.noise * share, LEAST_NOISE)
        right, left, found, sums = half(
            by_col, right, left, noise, None, col_features, turned, identity, reduce
        )
        weight = jnp.maximum(sums.weight[0], 1)
        unsure = sums.unsure / weight
        pooled = jnp.sum(found.squares) / weight
        if model.robust:  # a column's gross errors are not to pass for its noise
            noise = jnp.full_like(noise, pooled)
        else:
            noise = (found.squares + POOLED * pooled) / (found.weight + POOLED)
        noise = jnp.maximum(noise, LEAST_NOISE)
        ones = jnp.ones(left.factor.shape[1], noise.dtype)
        rows, row_change, cols, _ = joined(left, right, ones, model)
        ones = jnp.ones(right.factor.shape[1], noise.dtype)
        _, col_change, _, _ = joined(right, left, ones, turned)
        if model.row_effects and model.col_effects:
            # [v, c, 1], where the columns are [v, 1, c].
            d = model.width
            col_change = col_change[:, [*range(d), d + 1, d]]
        factors, changes = LowRank(rows, cols), LowRank(row_change, col_change)
        move = relative_step(factors, changes, reduce=reduce)
        places = reduce(jnp.asarray(len(rows), noise.dtype)) * len(cols)
        size = jnp.sum(reduce(gram(rows)) * gram(cols)) / places
        if meter is not None:
            meter.at(state.taken, move)
        share = SETTLED_ROBUST if model.robust else SETTLED
        little = move**2 * size <= share**2 * unsure
        settled = (move <= tol) | little
        taken = state.taken + 1
        return State(left, right, noise, pooled, unsure, move, settled, taken)

    def running(state: State) -> Array:
        return ~state.settled & (state.taken < limit)

    state = state._replace(settled=jnp.array(False))
    state = lax.while_loop(running, step, state)
    if meter is not None:
        meter.end(state.taken)
    return state


def half(entries, this, other, noise, scale, features, model, over_this, over_other):
    """Regress one factor on the other and estimate its prior.

    ``noise`` is that of each row of ``this``; with a ``scale`` of the others, theirs is the
    unit that the regression is in. ``over_this`` and ``over_other`` sum what was summed
    over rows of the two factors over the devices that share them.
    """
    d = model.width
    other_rows = over_other(jnp.asarray(len(other.factor), noise.dtype))
    scaled = other.factor[:, :d] if scale is None else scale[:, None] * other.factor[:, :d]
    moment = over_other(gram(scaled)) / other_rows
    moment += jnp.mean(other.spread[:, :d, :d], axis=0)
    this, other = whiten(this, other, moment)
    sizes = jnp.sqrt(jnp.diagonal(this.prior))
    start, _, vectors, spread = joined(this, other, sizes, model)
    vectors = vectors if scale is None else scale[:, None] * vectors
    rows, sums = regress(
        entries,
        start,
        (features @ this.mean) / sizes[None, :],
        vectors,
        spread,
        noise,
        groups=len(this.spread),
        scale=scale,
        robust=model.robust,
        combine=over_other,
    )
    sums = jax.tree.map(over_this, sums)
    factor, real = rows.factor, (rows.weight > 0).astype(noise.dtype)
    mean, precision = prior_mean(features, factor, real, this.precision, d, over_this)
    centered = real[:, None] * (factor - features @ mean)
    prior = over_this(gram(centered)) + sums.covariance
    prior = prior / jnp.maximum(sums.count, 1) * jnp.outer(sizes, sizes)
    # The effects are independent of the factor; what they share with it is its mean.
    f = len(sizes)
    effect = _effect(f, d, prior.dtype)
    prior = jnp.where(effect > 0, jnp.maximum(prior, LEAST_EFFECT), prior)
    factors = jnp.arange(f) < d
    prior = jnp.where(factors[:, None] == factors[None, :], prior, 0)
    weight = jnp.maximum(sums.weight, 1)[:, None, None]
    spread = sums.spread / weight * jnp.outer(sizes, sizes)[None]
    factor = factor * sizes[None, :]
    side = Side(
        factor, factor - this.factor, spread, mean * sizes[None, :], prior, precision
    )
    return side, other, rows, sums


def _effect(f: int, d: int, dtype) -> Array:
    """``(f, f)``: one at the place of the effects, zero elsewhere."""
    at = jnp.arange(f) >= d
    return (at[:, None] & at[None, :]).astype(dtype)


def share_held(count: int) -> float:
    """Which share of the entries is held out."""
    return min(LARGEST_SHARE, HELD / count)


def windows(share: float) -> tuple[UInt[Array, "2"], UInt[Array, "2"]]:
    """The lots of the entries that are held out, and those of the others."""
    cut = int(share * EVERY[1])
    low, high = ((0, cut), (cut, EVERY[1]))
    return jnp.asarray(np.array(low, np.uint32)), jnp.asarray(np.array(high, np.uint32))


def held_out(data: Data, model: Model, state: State, window: Array) -> HeldOut:
    """The error at the entries in a window, and what it is expected to be."""
    sizes = jnp.ones(state.left.factor.shape[1], state.noise.dtype)
    rows, _, vectors, _ = joined(state.left, state.right, sizes, model)
    padded = jnp.pad(rows, ((0, 1), (0, 0)))
    # The last column carries the noise of each entry.
    vectors = jnp.concatenate([vectors, state.noise[:, None]], axis=1)

    def work(sums, block):
        ours = padded[block.rows]

        def add(sums, slab):
            noise = jnp.where(slab.seen, slab.vectors[..., -1], 1)
            e = slab.values - contract("bwr,br->bw", slab.vectors[..., :-1], ours)
            w = jnp.ones_like(e)
            if model.robust:
                w = student_weights(e * lax.rsqrt(noise))
            w = jnp.where(slab.seen, w, 0)
            new = jnp.sum(w * e * e), jnp.sum(w * noise), jnp.sum(w)
            return tuple(a + b for a, b in zip(sums, new, strict=True))

        return block.fold(add, sums), block.rows[:, None]

    zero = jnp.zeros((), rows.dtype)
    entries = data.by_row._replace(window=window)
    sums, _ = scan_rows(work, (zero, zero, zero), entries, vectors)
    squares, noise, weight = jax.tree.map(model.reduce, sums)
    share = 1 / nonzero(weight)
    expected = jnp.sqrt(noise * share + state.unsure)
    return HeldOut(jnp.sqrt(squares * share), expected, weight)

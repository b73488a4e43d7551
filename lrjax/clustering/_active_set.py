"""The lasso of every sample on all others, by one active set for each, all at once."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..linalg import cholesky, nonzero, outer, rounding, times


WIDTHS = (32, 128)  # supports that most samples need; the few others start from there
AT_ONCE = 3  # the atoms that may join in one step
REFINEMENTS = 2  # steps at the end, each of which corrects the rounding of the last


class Lassos(NamedTuple):
    """What all the problems are made of, n of them.

    Attributes:
        x: samples ``(n, d)``.
        products: ``x xᵀ``.
        weight: λ, that of ``‖c‖_1``, one a sample.
        ridge: δ, that of ``½ ‖c‖²``.
        tol: of the optimality conditions, in units of λ.
    """

    x: Float[Array, "n d"]
    products: Float[Array, "n n"]
    weight: Float[Array, " n"]
    ridge: Float[Array, " n"]
    tol: Float[Array, " n"]


class State(NamedTuple):
    """Supports in ``w`` slots of a sample each, in no order.

    Attributes:
        atoms: the samples in the slots.
        values: their coefficients.
        signs: those that they are held to; zero in a free slot.
        gram: the products of the atoms.
        slope: ``x_iᵀ (x_j − Σ c x) − δ c_i``, row j.
        multiplier: ν of ``Σ c = 1``.
        one: whether one atom alone may join, after several have blocked each other.
        residual: how far from optimal; infinite where the last step was cut short.
        full: whether an atom found no free slot.
        calm: steps since all are optimal that could be.
        steps: taken.
    """

    atoms: Int[Array, "n w"]
    values: Float[Array, "n w"]
    signs: Float[Array, "n w"]
    gram: Float[Array, "n w w"]
    slope: Float[Array, "n n"]
    multiplier: Float[Array, " n"]
    one: Bool[Array, " n"]
    residual: Float[Array, " n"]
    full: Bool[Array, " n"]
    calm: Int[Array, ""]
    steps: Int[Array, ""]


def floor_of(x: Array, weight: Array) -> Array:
    """What rounding leaves of the optimality conditions, in units of λ."""
    sizes = jnp.sqrt(jnp.sum(x**2, axis=1))
    return rounding(x.dtype, x.shape[1]) * sizes * jnp.max(sizes) / weight


# Compiled once for samples of one shape: fits are also called outside of jit.
@functools.partial(jax.jit, static_argnames=("affine", "support"))
def minimize(
    lassos: Lassos, *, affine: bool, support: int, max_steps: Array
) -> tuple[Array, Array, Array]:
    """All minima, ``(n, n)`` with rows of coefficients, their residuals, and the steps."""
    widths = [w for w in WIDTHS if w < support] + [support]
    n = len(lassos.x)
    state = _start(lassos, affine, widths[0])
    for width in widths:
        # Who found no slot goes on with more of them.
        calm = jnp.where(jnp.any(state.full), 0, state.calm)
        state = _widened(state, width)._replace(calm=calm, full=jnp.zeros(n, bool))
        state = lax.while_loop(
            lambda s: (s.steps < max_steps) & (s.calm <= REFINEMENTS),
            lambda s: _step(lassos, s, affine),
            state,
        )
    return _dense(state, n), state.residual, state.steps


def _start(lassos: Lassos, affine: bool, width: int) -> State:
    """Nothing in the support; of the affine problem the nearest sample alone."""
    x, products = lassos.x, lassos.products
    n, dtype = len(x), x.dtype
    # No constant, or the compiler would search it for free slots, and take long to.
    empty = jnp.broadcast_to(0 * products[:, :1], (n, width))
    state = State(
        atoms=jnp.zeros((n, width), jnp.int32),
        values=empty,
        signs=empty,
        gram=jnp.zeros((n, width, width), dtype),
        slope=products,
        multiplier=jnp.zeros(n, dtype),
        one=jnp.zeros(n, bool),
        residual=jnp.full(n, jnp.inf, dtype),
        full=jnp.zeros(n, bool),
        calm=jnp.zeros((), jnp.int32),
        steps=jnp.zeros((), jnp.int32),
    )
    if affine:
        squares = jnp.diagonal(products)
        distances = squares[None, :] - 2 * products
        nearest = jnp.argmin(jnp.where(_same(n), jnp.inf, distances), axis=1)
        state = state._replace(
            atoms=state.atoms.at[:, 0].set(nearest.astype(jnp.int32)),
            values=empty.at[:, 0].set(1),
            signs=empty.at[:, 0].set(1),
            gram=state.gram.at[:, 0, 0].set(squares[nearest]),
        )
        slope = _slope(lassos, state)
        at_nearest = jnp.take_along_axis(slope, nearest[:, None], axis=1)[:, 0]
        state = state._replace(slope=slope, multiplier=at_nearest - lassos.weight)
    return _joined(lassos, state, jnp.ones(n, bool))[0]


def _step(lassos: Lassos, state: State, affine: bool) -> State:
    """To the minimum on the support, or until a coefficient changes its sign."""
    direction, multiplier = _newton(lassos, state, affine)
    values, signs = state.values, state.signs
    crosses = (signs != 0) & ((values + direction) * signs < 0)
    reach = jnp.where(crosses, -values / jnp.where(crosses, direction, 1), jnp.inf)
    length = jnp.minimum(1, jnp.min(reach, axis=1))
    leaves = crosses & (reach <= length[:, None])
    values = jnp.where(leaves, 0, values + length[:, None] * direction)
    signs = jnp.where(leaves, 0, signs)
    state = state._replace(values=values, signs=signs, multiplier=multiplier)
    state = state._replace(slope=_slope(lassos, state))
    inside = jnp.take_along_axis(state.slope, state.atoms, axis=1) - multiplier[:, None]
    weight = lassos.weight[:, None]
    residual = jnp.max(jnp.where(signs != 0, jnp.abs(inside - weight * signs), 0), axis=1)
    residual = residual / lassos.weight
    if affine:
        residual = jnp.maximum(residual, jnp.abs(jnp.sum(values, axis=1) - 1))
    whole = length == 1
    # Atoms that joined together may point the wrong way, and then leave at once.
    one = state.one | (length == 0)
    state, outside = _joined(lassos, state._replace(one=one), whole)
    residual = jnp.where(whole, jnp.maximum(residual, outside), jnp.inf)
    done = jnp.all(state.full | ~(residual > lassos.tol))  # what is no number stays so
    return state._replace(
        one=one & ~whole,
        residual=residual,
        calm=jnp.where(done, state.calm + 1, 0),
        steps=state.steps + 1,
    )


def _newton(lassos: Lassos, state: State, affine: bool) -> tuple[Array, Array]:
    """From the values to the minimum with these signs, and the multiplier there."""
    used = state.signs != 0
    width = used.shape[1]
    squares = jnp.where(used, jnp.diagonal(state.gram, axis1=1, axis2=2), 0)
    gram, lift = state.gram, jnp.zeros((), squares.dtype)
    if affine:
        # Directions that keep the sum at one do not see a constant; d + 1 points that
        # have no linear dependence left but this one get a matrix of full rank by it.
        lift = jnp.mean(jnp.diagonal(lassos.products))
        gram, squares = gram + lift, jnp.where(used, squares + lift, 0)
    # Dependent atoms have a factor with rounding on the diagonal; steps correct themselves.
    eps = jnp.finfo(squares.dtype).eps
    diagonal = lassos.ridge + 8 * eps * jnp.sum(squares, axis=1)
    diagonal = jnp.where(used, diagonal[:, None], 1)
    matrix = jnp.where(used[:, :, None] & used[:, None, :], gram, 0)
    matrix = matrix + diagonal[:, :, None] * jnp.eye(width, dtype=matrix.dtype)[None]
    lower = cholesky(matrix)
    slope = jnp.take_along_axis(state.slope, state.atoms, axis=1)
    slope = jnp.where(used, slope - lassos.weight[:, None] * state.signs, 0)
    both = jnp.stack([slope, used.astype(slope.dtype)], axis=-1)
    both = lax.linalg.triangular_solve(lower, both, left_side=True, lower=True)
    both = lax.linalg.triangular_solve(
        lower, both, left_side=True, lower=True, transpose_a=True
    )
    direction, ones = both[..., 0], both[..., 1]
    if not affine:
        return direction, state.multiplier
    missing = 1 - jnp.sum(state.values, axis=1)
    multiplier = (jnp.sum(direction, axis=1) - missing) / nonzero(jnp.sum(ones, axis=1))
    direction = direction - multiplier[:, None] * ones
    return direction, multiplier + lift * missing


def _joined(lassos: Lassos, state: State, whole: Array) -> tuple[State, Array]:
    """With the atoms of the steepest slopes, and how much too steep the steepest is."""
    n, width = state.atoms.shape
    each = jnp.arange(n)
    slope = state.slope - state.multiplier[:, None]
    excess = jnp.abs(slope) / lassos.weight[:, None] - 1
    excess = jnp.where(_same(n), -1, excess)
    taken = jnp.where(state.signs != 0, -jnp.inf, 0)
    excess = excess.at[each[:, None], state.atoms].add(taken)
    worst = jnp.max(excess, axis=1)

    def join(place, carry):
        atoms, signs, gram, full, excess = carry
        atom = jnp.argmax(excess, axis=1).astype(jnp.int32)
        size = excess[each, atom]
        wanted = whole & (size > lassos.tol) & (size >= worst / 2)
        wanted &= ~(state.one & (place > 0))
        slot = jnp.argmax(signs == 0, axis=1)
        free = signs[each, slot] == 0
        full |= wanted & ~free
        joins = wanted & free
        sign = jnp.sign(slope[each, atom])
        atoms = atoms.at[each, slot].set(jnp.where(joins, atom, atoms[each, slot]))
        signs = signs.at[each, slot].set(jnp.where(joins, sign, signs[each, slot]))
        products = lassos.products[atoms[each, slot][:, None], atoms]
        gram = gram.at[each, slot, :].set(products).at[each, :, slot].set(products)
        excess = excess.at[each, atom].add(jnp.where(joins, -jnp.inf, 0))
        return atoms, signs, gram, full, excess

    carry = (state.atoms, state.signs, state.gram, state.full, excess)
    atoms, signs, gram, full, _ = lax.fori_loop(0, min(AT_ONCE, width), join, carry)
    state = state._replace(atoms=atoms, signs=signs, gram=gram, full=full)
    return state, jnp.maximum(worst, 0)


def _slope(lassos: Lassos, state: State) -> Array:
    coefficients = _dense(state, len(lassos.x))
    rest = lassos.x - times(coefficients, lassos.x)
    return outer(rest, lassos.x) - lassos.ridge[:, None] * coefficients


def _dense(state: State, n: int) -> Array:
    zero = jnp.zeros((n, n), state.values.dtype)
    return zero.at[jnp.arange(n)[:, None], state.atoms].add(state.values)


def _same(n: int) -> Array:
    """The diagonal, as no constant: the compiler would fold all that depends on it."""
    return lax.broadcasted_iota(jnp.int32, (n, n), 0) == lax.broadcasted_iota(
        jnp.int32, (n, n), 1
    )


def _widened(state: State, width: int) -> State:
    more = width - state.atoms.shape[1]
    wide = lambda x: jnp.pad(x, ((0, 0), (0, more)))
    return state._replace(
        atoms=wide(state.atoms),
        values=wide(state.values),
        signs=wide(state.signs),
        gram=jnp.pad(state.gram, ((0, 0), (0, more), (0, more))),
    )

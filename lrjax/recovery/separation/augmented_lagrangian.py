from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ..._progress import Meter
from ...linalg import cholesky, cross, gram, identity_like, nonzero, outer, svd, times
from .groups import ENTRIES, Groups


FAST = 1.5  # growth of the penalty while the constraint is what is missing
SLOW = 1.05  # … while optimality is
PATIENCE = 60  # steps after which it grows fast in any case, by default
ROUNDINGS = 1.0  # that the clip of an entry stays above


class Parts(NamedTuple):
    """A matrix taken apart: ``matrix ≈ vectors @ diag(values) @ basis.T + sparse``.

    Attributes:
        vectors: ``(m, d)``, orthonormal where the basis was adapted.
        values: ``(d,)`` falling: the singular values of the low-rank part, zeros behind
            its rank; ones where the basis was fixed.
        basis: ``(n, d)`` orthonormal, spans the rows of the low-rank part.
        sparse: ``(m, n)``, zero where the low-rank part explains the matrix or nothing
            is observed.
        residual: ``‖matrix − low rank − sparse − noise‖ / ‖low rank‖`` at the end.
        steps: iterations made.
    """

    vectors: Float[Array, "m d"]
    values: Float[Array, " d"]
    basis: Float[Array, "n d"]
    sparse: Float[Array, "m n"]
    residual: Float[Array, ""]
    steps: Int[Array, ""]

    @property
    def low_rank(self) -> Float[Array, "m n"]:
        """The dense low-rank part."""
        return outer(self.vectors * self.values[None, :], self.basis)


class _State(NamedTuple):
    rest: Array  # matrix − sparse
    clipped: Array  # the multiplier in the units of the matrix, Λ/μ
    vectors: Array
    values: Array
    basis: Array
    penalty: Array  # of the step before, as the clipped is in its units
    growth: Array  # to the penalty of the next
    residual: Array
    steps: Array


def separate(
    matrix: Float[Array, "m n"],
    mask: Bool[Array, "m n"],
    start: Float[Array, "m n"],
    basis: Float[Array, "n d"],
    *,
    sparse_weight: ArrayLike,
    penalty: ArrayLike,
    tol: ArrayLike,
    max_steps: int,
    noise: ArrayLike = 0.0,
    groups: Groups = ENTRIES,
    patience: ArrayLike = PATIENCE,
    adapt_basis: bool = True,
    meter: Meter | None = None,
) -> Parts:
    """The augmented Lagrangian of ``min ‖L‖_* + w ‖S‖_1 + ‖N‖²/2τ, L + S + N = matrix``.

    With the multiplier Λ and the cleaned matrix ``C = matrix − S − N + Λ/μ``::

        L ← soft threshold of the singular values of C at 1/μ
        R ← matrix − L + Λ/μ
        Λ ← μ P(R / (1 + τ μ)),   S + N ← R − Λ/μ,   μ ← growth · μ

    where P is a clip to ``± w/μ``, and for groups of entries, whose lengths take the place
    of the absolute values in ``‖S‖_1``, a projection of each on a ball of that radius.
    Without noise, ``τ = 0``, N is zero.
    Where nothing is observed the clip is to zero: S takes up everything there, and L
    fills in. No SVD of C: its leading singular vectors are tracked by :func:`leading`
    from those of the step before. The rows meet only matrix products and sums, so that
    they may be sharded.

    The penalty grows fast while the constraint is what is missing, ``‖matrix − L − S −
    N‖ / ‖matrix‖`` above ``‖S − S_before‖ / ‖Λ/μ‖``, and slowly while it is optimality:
    a penalty that always grew fast would freeze the iteration before it is optimal. It
    stays where the clip is above the rounding error of the matrix.

    Args:
        matrix: what is observed, zeros elsewhere.
        mask: where it is observed.
        start: first guess of C.
        basis: first guess of the right singular vectors, orthonormal.
        sparse_weight: ``w``; may differ by row ``(m, 1)`` or column ``(1, n)``,
            infinite where there is neither error nor noise.
        penalty: first ``μ``, in the units of one over the matrix.
        tol: stop at this residual.
        max_steps: at most as many iterations.
        noise: ``τ``, in the units of the matrix: singular values of L that the noise
            alone may have.
        groups: which entries are wrong together.
        patience: steps after which the penalty grows fast in any case.
        adapt_basis: if false, the basis is fixed: robust regression of the rows on it.
        meter: is told the residuals.

    Returns:
        The parts.
    """
    dtype = matrix.dtype
    size = nonzero(_norm(matrix))
    weight = jnp.asarray(sparse_weight, dtype)
    exact = jnp.isinf(weight)
    noise = jnp.where(exact, 0, jnp.asarray(noise, dtype))
    largest = jnp.min(weight) / (ROUNDINGS * jnp.finfo(dtype).eps)

    def project(rest: Array, penalty: Array) -> Array:
        rest = jnp.where(mask, rest / (1 + noise * penalty), 0)
        return groups.project(rest, weight / penalty)

    def step(state: _State) -> _State:
        vectors, values, basis = state.vectors, state.values, state.basis
        # Λ/μ of the last step in the units of the new μ.
        before = state.clipped / state.growth
        cleaned = state.rest + before
        penalty = state.penalty * state.growth
        if adapt_basis:
            vectors, values, basis = leading(cleaned, basis)
            values = jnp.maximum(values - 1 / penalty, 0)
        else:
            vectors = times(cleaned, basis)
        low_rank = outer(vectors * values[None, :], basis)
        clipped = project(matrix - low_rank + before, penalty)
        rest = low_rank - before + clipped
        primal, dual = _norm(clipped - before), _norm(rest - state.rest)
        fast = (primal / size > dual / nonzero(_norm(clipped))) | (state.steps >= patience)
        residual = primal / nonzero(_norm(low_rank))
        if meter is not None:
            meter.at(state.steps, residual)
        growth = jnp.where(fast, FAST, SLOW).astype(dtype)
        return _State(
            rest=rest,
            clipped=clipped,
            vectors=vectors,
            values=values,
            basis=basis,
            penalty=penalty,
            growth=jnp.clip(largest / penalty, 1, growth),
            residual=residual,
            steps=state.steps + 1,
        )

    def unfinished(state: _State) -> Bool[Array, ""]:
        return (state.steps < max_steps) & (state.residual > tol)  # false for NaN

    width = basis.shape[-1]
    first = _State(
        rest=start,
        clipped=jnp.zeros_like(matrix),
        vectors=times(jnp.zeros_like(matrix), basis),
        values=jnp.zeros(width, dtype) if adapt_basis else jnp.ones(width, dtype),
        basis=basis,
        penalty=jnp.asarray(penalty, dtype),
        growth=jnp.ones((), dtype),
        residual=jnp.asarray(jnp.inf, dtype),
        steps=jnp.zeros((), jnp.int32),
    )
    end = lax.while_loop(unfinished, step, first)
    if meter is not None:
        meter.end(end.steps)
    # What was not clipped is explained by L and noise: zero, and not up to rounding only.
    hit = mask & groups.reach(end.clipped, 0.999 * weight / end.penalty)
    errors = matrix - end.rest - noise * end.penalty * end.clipped
    sparse = jnp.where(hit, errors, 0)
    return Parts(end.vectors, end.values, end.basis, sparse, end.residual, end.steps)


def leading(
    matrix: Float[Array, "m n"], basis: Float[Array, "n d"]
) -> tuple[Float[Array, "m d"], Float[Array, " d"], Float[Array, "n d"]]:
    """The leading singular triplets, tracked by one step of subspace iteration.

    With U an orthonormal basis of the columns of ``matrix @ basis``, the SVD of
    ``U Uᵀ matrix``. Apart from two products with the matrix it works on ``d × d``
    matrices.

    Args:
        matrix: ``(m, n)``.
        basis: ``(n, d)``, near the right singular vectors and in their order.

    Returns:
        Left vectors, falling values and right vectors.
    """
    image = times(matrix, basis)
    columns = times(image, _thin_svd(image)[0])
    image_rows = cross(matrix, columns)
    to_right, values, rotation = _thin_svd(image_rows)
    return times(columns, rotation), values, times(image_rows, to_right)


def _thin_svd(x: Array) -> tuple[Array, Array, Array]:
    """``K, s, W`` with ``x = (x K) diag(s) Wᵀ``, ``x K`` orthonormal; x is only read.

    By the Gram matrix of the columns scaled to unit length, each made orthogonal to those
    before it: singular values far below ``sqrt(eps) s_1`` survive where the columns are
    near the singular vectors already and fall in size. What rounding hides gets the value
    zero and a short column.
    """
    squares = gram(x)
    sizes = jnp.sqrt(jnp.maximum(jnp.diagonal(squares), 0))
    # Squares of columns that are shorter yet would underflow.
    sizes = jnp.maximum(sizes, jnp.finfo(x.dtype).eps ** 2 * jnp.max(sizes))
    sizes = nonzero(sizes)
    upper, inverse = _triangular(squares / sizes[:, None] / sizes[None, :])
    # x = (x / sizes · inverse) · (upper · sizes)
    left, values, right = svd(upper * sizes[None, :])
    # A column of zeros has the unit size above, and the value zero here.
    values = jnp.where(jnp.max(squares) > 0, values, 0)
    return times(inverse, left) / sizes[:, None], values, right.T


def _triangular(g: Array) -> tuple[Array, Array]:
    """Upper R with ``RᵀR = g``, a matrix of cosines, and its inverse.

    A column that the others explain up to rounding has a row of zeros in R, and in the
    inverse a pivot above the rounding error.
    """
    return lax.platform_dependent(g, cpu=eliminated, default=factorized)


def _floor(g: Array) -> float:
    return 8 * g.shape[-1] * float(jnp.finfo(g.dtype).eps)


def factorized(g: Array) -> tuple[Array, Array]:
    """:func:`_triangular` by two library calls, where a loop would be a kernel a row."""
    floor = _floor(g)
    identity = identity_like(g)
    # Both sides of g are scaled back: where it is the identity nothing is changed.
    lower = cholesky((g + floor * identity) / (1 + floor))
    inverse = lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
    # Row j of the inverse is what the other columns leave of column j, at length one: were
    # it nothing, the shift alone would give it the square 1 / floor.
    known = 2 * floor * jnp.sum(inverse**2, axis=1, keepdims=True) < 1
    return jnp.where(known, jnp.triu(lower.T), 0), inverse.T


def eliminated(g: Array) -> tuple[Array, Array]:
    """:func:`_triangular` row by row.

    LAPACK wakes its threads for matrices as small as these: on a busy machine they wait a
    hundred times longer for each other than the elimination takes.
    """
    d = g.shape[-1]
    floor = _floor(g)
    index = jnp.arange(d)

    def eliminate(i: Array, rows: Array) -> Array:
        pivot = rows[i, i]
        below = (index > i) & (pivot > floor)
        factors = jnp.where(below, rows[:, i] / jnp.maximum(pivot, floor), 0)
        return rows - factors[:, None] * rows[i][None, :]

    identity = jnp.eye(d, dtype=g.dtype)
    rows = lax.fori_loop(0, d, eliminate, jnp.concatenate([g, identity], axis=1))
    pivots = jnp.diagonal(rows)[:, None]
    roots = jnp.sqrt(jnp.maximum(pivots, floor))
    upper = jnp.where(pivots > floor, jnp.triu(rows[:, :d]) / roots, 0)
    return upper, (rows[:, d:] / roots).T


def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(x * x))

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ...linalg import cholesky, cross, gram, identity_like, nonzero, outer, svd, times


class Parts(NamedTuple):
    """A matrix taken apart: ``matrix ≈ vectors @ diag(values) @ basis.T + sparse``.

    Attributes:
        vectors: ``(m, d)``, orthonormal where the basis was adapted.
        values: ``(d,)`` falling: the singular values of the low-rank part, zeros behind
            its rank; ones where the basis was fixed.
        basis: ``(n, d)`` orthonormal, spans the rows of the low-rank part.
        sparse: ``(m, n)``, zero where the low-rank part explains the matrix or nothing
            is observed.
        residual: ``‖matrix − low rank − sparse‖ / ‖matrix‖`` at the end.
        steps: iterations made.
    """

    vectors: Float[Array, "m d"]
    values: Float[Array, " d"]
    basis: Float[Array, "n d"]
    sparse: Float[Array, "m n"]
    residual: Float[Array, ""]
    steps: Int[Array, ""]


class _State(NamedTuple):
    cleaned: Array
    clipped: Array  # the multiplier in the units of the matrix, Λ/μ
    vectors: Array
    values: Array
    basis: Array
    penalty: Array
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
    penalty_growth: ArrayLike,
    tol: ArrayLike,
    max_steps: int,
    adapt_basis: bool = True,
) -> Parts:
    """The inexact augmented Lagrangian of ``min ‖L‖_* + w ‖S‖_1, L + S = matrix``.

    With the multiplier Λ and the cleaned matrix ``C = matrix − S + Λ/μ``::

        L ← soft threshold of the singular values of C at 1/μ
        R ← matrix − L + Λ/μ
        Λ ← μ clip(R, ± w/μ),   S ← R − Λ/μ,   μ ← penalty_growth · μ

    Where nothing is observed the clip is to zero: S takes up everything there, and L
    fills in. No SVD of C: its leading singular vectors are tracked by :func:`leading`
    from those of the step before. The rows meet only matrix products and sums, so that
    they may be sharded. In a step the matrix is read once, L, C and Λ are written once
    and C is read twice more, by the two products.

    Args:
        matrix: what is observed, zeros elsewhere.
        mask: where it is observed.
        start: first guess of C.
        basis: first guess of the right singular vectors, orthonormal.
        sparse_weight: ``w``; may differ by row ``(m, 1)`` or column ``(1, n)``,
            infinite where there are no errors.
        penalty: first ``μ``, in the units of one over the matrix.
        penalty_growth: what a step multiplies μ by, above one.
        tol: stop at this relative residual.
        max_steps: at most as many iterations.
        adapt_basis: if false, the basis is fixed: robust regression of the rows on it.

    Returns:
        The parts.
    """
    dtype = matrix.dtype
    growth = jnp.asarray(penalty_growth, dtype)
    size = nonzero(_norm(matrix))

    def limit(penalty: Array) -> Array:
        return jnp.where(mask, sparse_weight / penalty, 0)

    def step(state: _State) -> _State:
        vectors, values, basis = state.vectors, state.values, state.basis
        if adapt_basis:
            vectors, values, basis = leading(state.cleaned, basis)
            values = jnp.maximum(values - 1 / state.penalty, 0)
        else:
            vectors = times(state.cleaned, basis)
        low_rank = outer(vectors * values[None, :], basis)
        # Λ/μ of the last step in the units of the new μ.
        before = state.clipped / growth
        bound = limit(state.penalty)
        clipped = jnp.clip(matrix - low_rank + before, -bound, bound)
        return _State(
            # matrix − S + Λ/μ at the next μ, where matrix − S = L − before + clipped.
            cleaned=low_rank - before + (1 + 1 / growth) * clipped,
            clipped=clipped,
            vectors=vectors,
            values=values,
            basis=basis,
            penalty=growth * state.penalty,
            residual=_norm(clipped - before) / size,
            steps=state.steps + 1,
        )

    def unfinished(state: _State) -> Bool[Array, ""]:
        return (state.steps < max_steps) & (state.residual > tol)  # false for NaN

    width = basis.shape[-1]
    first = _State(
        cleaned=start,
        clipped=jnp.zeros_like(matrix),
        vectors=times(jnp.zeros_like(matrix), basis),
        values=jnp.zeros(width, dtype) if adapt_basis else jnp.ones(width, dtype),
        basis=basis,
        penalty=jnp.asarray(penalty, dtype),
        residual=jnp.asarray(jnp.inf, dtype),
        steps=jnp.zeros((), jnp.int32),
    )
    end = lax.while_loop(unfinished, step, first)
    # What was not clipped is explained by L: zero, and not zero up to rounding only.
    hit = mask & (jnp.abs(end.clipped) > 0.999 * limit(end.penalty / growth))
    sparse = jnp.where(hit, matrix - end.cleaned + end.clipped / growth, 0)
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

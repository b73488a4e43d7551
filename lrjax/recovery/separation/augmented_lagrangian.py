from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ..._sharding import einsum
from ...linalg import gram, orthonormalize


class Separation(NamedTuple):
    """A matrix taken apart: ``matrix ≈ image @ shrink @ basis.T + sparse``.

    Attributes:
        image: ``(m, d)``, the cleaned matrix times the basis.
        basis: ``(n, d)`` orthonormal, spans the rows of the low-rank part.
        sparse: ``(m, n)``, what the low-rank part leaves; anything where not observed.
        penalty: ``μ`` at the end; singular values were shrunk by ``1/μ``.
        residual: ``‖matrix − low rank − sparse‖ / ‖matrix‖`` at the end.
        steps: iterations made.
    """

    image: Float[Array, "m d"]
    basis: Float[Array, "n d"]
    sparse: Float[Array, "m n"]
    penalty: Float[Array, ""]
    residual: Float[Array, ""]
    steps: Int[Array, ""]


class _State(NamedTuple):
    cleaned: Array
    multiplier: Array
    sparse: Array
    image: Array
    basis: Array
    penalty: Array
    residual: Array
    steps: Array


def separate(
    matrix: Float[Array, "m n"],
    mask: Bool[Array, "m n"] | None,
    start: Float[Array, "m n"],
    basis: Float[Array, "n d"],
    *,
    weight: ArrayLike,
    penalty: ArrayLike,
    growth: ArrayLike,
    tol: ArrayLike,
    max_steps: int,
    shrink: bool = True,
    adapt_basis: bool = True,
) -> Separation:
    """The inexact augmented Lagrangian of ``min ‖L‖_* + weight · ‖S‖_1, L + S = matrix``.

    With the multiplier Λ and the cleaned matrix ``C = matrix − S + Λ/μ``::

        L ← soft threshold of the singular values of C at 1/μ
        R ← matrix − L + Λ/μ
        Λ ← μ clip(R, ± weight/μ),   S ← R − Λ/μ,   μ ← growth · μ

    Where nothing is observed the clip is to zero: S takes up everything there, and L
    fills in. No SVD of C: its right singular space is tracked by one warm step of
    subspace iteration, ``basis ← orth(Cᵀ C basis)``, and the threshold is a ``d × d``
    matrix. The rows meet only matrix products, so that they may be sharded.

    Args:
        matrix: what is observed, zeros elsewhere.
        mask: where it is observed; ``None`` for everywhere.
        start: first guess of C.
        basis: first guess of the right singular vectors, orthonormal.
        weight: of the sparse part.
        penalty: first ``μ``, in the units of one over the matrix.
        growth: of μ, above one.
        tol: stop at this relative residual.
        max_steps: at most as many iterations.
        shrink: if false, L is the plain projection on the basis: the rank is given.
        adapt_basis: if false, the basis is fixed: robust regression of the rows on it.

    Returns:
        The parts.
    """
    dtype = matrix.dtype
    size = _norm(matrix)
    size = jnp.where(size > 0, size, 1)

    def step(state: _State) -> _State:
        mu = state.penalty
        image = einsum("mn,nd->md", state.cleaned, state.basis)
        rows = (
            einsum("nd,de->ne", state.basis, threshold(image, mu))
            if shrink
            else (state.basis)
        )
        low_rank = einsum("md,nd->mn", image, rows)
        rest = matrix - low_rank + state.multiplier / mu
        limit = weight / mu if mask is None else jnp.where(mask, weight / mu, 0)
        clipped = jnp.clip(rest, -limit, limit)
        multiplier = mu * clipped
        sparse = rest - clipped
        residual = _norm(multiplier - state.multiplier) / (mu * size)
        basis = state.basis
        if adapt_basis:
            image_rows = einsum("mn,md->nd", state.cleaned, image)
            basis = orthonormalize(image_rows, method="cholesky")
        mu = growth * mu
        cleaned = matrix - sparse + multiplier / mu
        return _State(
            cleaned, multiplier, sparse, image, basis, mu, residual, state.steps + 1
        )

    def unfinished(state: _State) -> Bool[Array, ""]:
        return (state.steps < max_steps) & ~(state.residual <= tol)

    first = _State(
        cleaned=start,
        multiplier=jnp.zeros_like(matrix),
        sparse=jnp.zeros_like(matrix),
        image=einsum("mn,nd->md", start, basis),
        basis=basis,
        penalty=jnp.asarray(penalty, dtype),
        residual=jnp.asarray(jnp.inf, dtype),
        steps=jnp.zeros((), jnp.int32),
    )
    end = lax.while_loop(unfinished, step, first)
    image = einsum("mn,nd->md", end.cleaned, end.basis)
    return Separation(image, end.basis, end.sparse, end.penalty, end.residual, end.steps)


def threshold(image: Float[Array, "m d"], penalty: ArrayLike) -> Float[Array, "d d"]:
    """The matrix K with ``image @ K`` = image, its singular values lowered by ``1/μ``."""
    squares, vectors = jnp.linalg.eigh(gram(image))
    values = jnp.sqrt(jnp.maximum(squares, 0))
    kept = values * penalty > 1
    factors = jnp.where(kept, 1 - 1 / jnp.where(kept, values * penalty, 1), 0)
    return einsum("dk,k,ek->de", vectors, factors, vectors)


def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(x * x))

"""Matrix factorization with Gaussian priors that are learned from the data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..._sharding import einsum
from .grouped import Block, Grouped, Reduce, identity, scan_rows


FREEDOM = 2.0  # degrees of freedom of the robust noise: it stands a third of gross errors


class Side(NamedTuple):
    """What is known of one factor.

    Attributes:
        factor: ``(m, d)``, the posterior mean of each row.
        change: ``(m, d)``, how the last regression changed it.
        spread: ``(d, d)``, the posterior covariance of a row, averaged over entries.
        mean: ``(d,)``, the prior mean of the rows.
        prior: ``(d, d)``, their prior covariance.
    """

    factor: Float[Array, "m d"]
    change: Float[Array, "m d"]
    spread: Float[Array, "d d"]
    mean: Float[Array, " d"]
    prior: Float[Array, "d d"]


class Regression(NamedTuple):
    """The sums of a regression of all rows of a matrix.

    Attributes:
        covariance: ``(d, d)``, the sum of the posterior covariances of rows with entries.
        spread: ``(d, d)``, the same, every row as often as it has entries.
        rows: the number of rows with entries.
        squares: the sum of the expected (weighted) squared residuals.
        weight: the sum of the weights of the entries.
    """

    covariance: Float[Array, "d d"]
    spread: Float[Array, "d d"]
    rows: Float[Array, ""]
    squares: Float[Array, ""]
    weight: Float[Array, ""]


def contract(subscripts: str, *operands: Array) -> Array:
    """An einsum of blocks, which are local to their device."""
    return jnp.einsum(subscripts, *operands, precision=lax.Precision.HIGHEST)


def weights(residual: Array, noise: Array, robust: bool) -> Array:
    """How much residuals count: Student's t discounts those far beyond the noise."""
    if not robust:
        return jnp.ones_like(residual)
    return (FREEDOM + 1) / (FREEDOM + residual * residual / noise)


def regress(
    entries: Grouped,
    old: Float[Array, "m d"],
    mean: Float[Array, " d"],
    vectors: Float[Array, "n d"],
    spread: Float[Array, "d d"],
    noise: Float[Array, ""],
    *,
    robust: bool,
    combine: Reduce = identity,
) -> tuple[Float[Array, "m d"], Regression]:
    """The posterior of every row of a factor, its prior covariance being the identity.

    Row i solves ``A_i (u_i − old_i) = b_i`` with, over its observed columns j,
    ``A_i = Σ w_ij (v_j v_jᵀ + C) + σ² I`` and ``b_i`` the gradient at ``old_i``; its
    posterior covariance is ``σ² A_i⁻¹``. Solving for the change, not for the row, makes
    the result exact in float32 although A_i is shifted by its rounding error.
    """
    m, d = old.shape
    dtype = old.dtype
    jitter = 4 * d * jnp.finfo(dtype).eps
    one = jnp.eye(d, dtype=dtype)
    padded = jnp.pad(old, ((0, 1), (0, 0)))

    def work(sums: Regression, block: Block):
        start = padded[block.rows]
        sums_of_rows = _normal_equations(block, start, noise, robust)
        g, b, weight, squares = jax.tree.map(combine, sums_of_rows)
        a = g + weight[:, None, None] * spread[None] + noise * one[None]
        shrink = weight[:, None] * (start @ spread) + noise * (start - mean[None, :])
        scale = lax.rsqrt(jnp.diagonal(a, axis1=1, axis2=2))
        a = a * scale[:, :, None] * scale[:, None, :] + jitter * one[None]
        eye = jnp.broadcast_to(one[None], a.shape)
        lower = lax.linalg.cholesky(a)
        root = lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
        root = root * scale[:, None, :]
        change = contract("bkr,bk->br", root, contract("bkr,br->bk", root, b - shrink))
        real = ((block.rows < m) & (weight > 0)).astype(dtype)
        new = start + change
        # The squares after the change, and what the uncertainty of both factors adds.
        squares += contract("br,brs,bs->b", change, g, change)
        squares -= 2 * jnp.sum(change * b, axis=1)
        unsure = weight * contract("br,rs,bs->b", new, spread, new)
        unsure += noise * (d - noise * jnp.sum(root * root, axis=(1, 2)))
        sums = Regression(
            sums.covariance + noise * contract("bkr,bks,b->rs", root, root, real),
            sums.spread + noise * contract("bkr,bks,b->rs", root, root, weight),
            sums.rows + jnp.sum(real),
            sums.squares + jnp.sum(real * (jnp.maximum(squares, 0) + unsure)),
            sums.weight + jnp.sum(real * weight),
        )
        return sums, new

    zero, square = jnp.zeros((), dtype), jnp.zeros((d, d), dtype)
    start = Regression(square, square, zero, zero, zero)
    sums, new = scan_rows(work, start, entries, vectors)
    return new, sums


def _normal_equations(block: Block, start: Array, noise: Array, robust: bool):
    """``Σ w v vᵀ``, ``Σ w e v``, ``Σ w`` and ``Σ w e²`` of each row of a block."""
    size, d = start.shape
    dtype = start.dtype

    def add(sums, slab):
        e = slab.values - contract("bwr,br->bw", slab.vectors, start)
        w = jnp.where(slab.seen, weights(e, noise, robust), 0)
        weighted = slab.vectors * w[..., None] if robust else slab.vectors
        new = (
            contract("bwr,bws->brs", weighted, slab.vectors),
            contract("bwr,bw->br", weighted, e),
            jnp.sum(w, axis=1),
            jnp.sum(w * e * e, axis=1),
        )
        return tuple(a + b for a, b in zip(sums, new, strict=True))

    shapes = ((size, d, d), (size, d), (size,), (size,))
    return block.fold(add, tuple(jnp.zeros(shape, dtype) for shape in shapes))


def whiten(this: Side, other: Side, moment: Float[Array, "d d"]) -> tuple[Side, Side]:
    """The same product in factors of which ``this`` has the identity as prior covariance.

    Among those, the ones that make ``moment`` of ``other`` diagonal, its Gram matrix: then
    the normal equations of a row are nearly so. No matrix is inverted that vanishes
    with a direction; a direction that the data do not support fades in ``other``.
    """
    d = this.prior.shape[-1]
    dtype = this.prior.dtype
    one = jnp.eye(d, dtype=dtype)
    sizes = jnp.diagonal(this.prior)
    shift = 4 * d * jnp.finfo(dtype).eps * sizes + 1e-20 * jnp.max(sizes) + 1e-24
    lower = lax.linalg.cholesky(this.prior + jnp.diag(shift))
    _, turn = jnp.linalg.eigh(lower.T @ moment @ lower)
    turn = turn[:, ::-1]
    change = lower @ turn

    def unchange(x):
        solved = lax.linalg.triangular_solve(lower, x, left_side=True, lower=True)
        return turn.T @ solved

    turned = unchange(one).T
    white = Side(
        einsum("md,de->me", this.factor, turned),
        this.change,
        turned.T @ this.spread @ turned,
        this.mean @ turned,
        one,
    )
    rest = Side(
        einsum("md,de->me", other.factor, change),
        einsum("md,de->me", other.change, change),
        change.T @ other.spread @ change,
        other.mean @ change,
        change.T @ other.prior @ change,
    )
    return white, rest

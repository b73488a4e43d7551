"""Matrix factorization with Gaussian priors that are learned from the data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ...linalg import eigh, times
from .grouped import Block, Grouped, Reduce, identity, scan_rows
from .normal_equations import Weigh, contract, inverse_root, normal_equations


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
        count: the number of rows with entries.
        squares: the sum of the expected (weighted) squared residuals.
        weight: the sum of the weights of the entries.
    """

    covariance: Float[Array, "d d"]
    spread: Float[Array, "d d"]
    count: Float[Array, ""]
    squares: Float[Array, ""]
    weight: Float[Array, ""]


def student_weights(noise: Float[Array, ""]) -> Weigh:
    """How much residuals count if some are far beyond the noise: as Student's t has it."""
    return lambda residual: (FREEDOM + 1) / (FREEDOM + residual * residual / noise)


def regress(
    entries: Grouped,
    old: Float[Array, "m d"],
    mean: Float[Array, " d"],
    vectors: Float[Array, "n d"],
    spread: Float[Array, "d d"],
    noise: Float[Array, ""],
    *,
    weigh: Weigh | None,
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
    one = jnp.eye(d, dtype=dtype)
    padded = jnp.pad(old, ((0, 1), (0, 0)))

    def work(sums: Regression, block: Block):
        start = padded[block.rows]
        sums_of_rows = normal_equations(block, start, weigh)
        # Other devices may hold other entries of the same rows.
        g, b, weight, squares = jax.tree.map(combine, sums_of_rows)
        # The uncertainty C of the columns acts as a ridge along their uncertain directions.
        a = g + weight[:, None, None] * spread[None] + noise * one[None]
        # b is the gradient of the squares alone; this is that of the ridge and the prior.
        shrink = weight[:, None] * (start @ spread) + noise * (start - mean[None, :])
        root = inverse_root(a)
        change = contract("bkr,bk->br", root, contract("bkr,br->bk", root, b - shrink))
        # Places without a row, and rows without entries, say nothing of the prior.
        real = ((block.rows < m) & (weight > 0)).astype(dtype)
        new = start + change
        # The squares after the change, and what the uncertainty of both factors adds.
        squares += contract("br,brs,bs->b", change, g, change)
        squares -= 2 * jnp.sum(change * b, axis=1)
        unsure = weight * contract("br,rs,bs->b", new, spread, new)
        # tr(σ² A⁻¹ (A − σ² I)), by the uncertainty of the row itself.
        unsure += noise * (d - noise * jnp.sum(root * root, axis=(1, 2)))
        sums = Regression(
            sums.covariance + noise * contract("bkr,bks,b->rs", root, root, real),
            sums.spread + noise * contract("bkr,bks,b->rs", root, root, weight),
            sums.count + jnp.sum(real),
            sums.squares + jnp.sum(real * (jnp.maximum(squares, 0) + unsure)),
            sums.weight + jnp.sum(real * weight),
        )
        return sums, new

    zero, square = jnp.zeros((), dtype), jnp.zeros((d, d), dtype)
    start = Regression(square, square, zero, zero, zero)
    sums, new = scan_rows(work, start, entries, vectors)
    return new, sums


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
    _, turn = eigh(lower.T @ moment @ lower)
    turn = turn[:, ::-1]
    change = lower @ turn

    def unchange(x):
        solved = lax.linalg.triangular_solve(lower, x, left_side=True, lower=True)
        return turn.T @ solved

    turned = unchange(one).T
    white = Side(
        times(this.factor, turned),
        this.change,
        turned.T @ this.spread @ turned,
        this.mean @ turned,
        one,
    )
    rest = Side(
        times(other.factor, change),
        times(other.change, change),
        change.T @ other.spread @ change,
        other.mean @ change,
        change.T @ other.prior @ change,
    )
    return white, rest

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
    """What is known of one factor: of its d columns and, if there are any, of its effects.

    The effects of the rows, one number for each, are the column after those of the factor:
    ``f = d + 1``; without them ``f = d``.

    Attributes:
        factor: ``(m, f)``, the posterior mean of each row.
        change: ``(m, f)``, how the last regression changed it.
        spread: ``(f, f)``, the posterior covariance of a row, averaged over entries.
        mean: ``(p, f)``, the prior mean of a row is ``features @ mean``.
        prior: ``(f, f)``, its prior covariance; that of effect and factor is zero.
        precision: ``(p, f)``, of ``mean`` in units of ``prior``: large where a feature
            tells nothing.
    """

    factor: Float[Array, "m f"]
    change: Float[Array, "m f"]
    spread: Float[Array, "f f"]
    mean: Float[Array, "p f"]
    prior: Float[Array, "f f"]
    precision: Float[Array, "p f"]


class Regression(NamedTuple):
    """The sums of a regression of all rows of a matrix.

    Attributes:
        covariance: ``(f, f)``, the sum of the posterior covariances of rows with entries.
        spread: ``(f, f)``, the same, every row as often as it has entries.
        count: the number of rows with entries.
        squares: the sum of the expected (weighted) squared residuals.
        unsure: the part of it by the uncertainty of both factors.
        weight: the sum of the weights of the entries.
    """

    covariance: Float[Array, "f f"]
    spread: Float[Array, "f f"]
    count: Float[Array, ""]
    squares: Float[Array, ""]
    unsure: Float[Array, ""]
    weight: Float[Array, ""]


def student_weights(noise: Float[Array, ""]) -> Weigh:
    """How much residuals count if some are far beyond the noise: as Student's t has it."""
    return lambda residual: (FREEDOM + 1) / (FREEDOM + residual * residual / noise)


def regress(
    entries: Grouped,
    old: Float[Array, "m k"],
    mean: Float[Array, "m f"],
    vectors: Float[Array, "n k"],
    spread: Float[Array, "k k"],
    noise: Float[Array, ""],
    *,
    weigh: Weigh | None,
    combine: Reduce = identity,
) -> tuple[Float[Array, "m f"], Float[Array, " m"], Regression]:
    """The posterior of every row of a factor, its prior covariance being the identity.

    Row i solves ``A_i (u_i − old_i) = b_i`` with, over its observed columns j,
    ``A_i = Σ w_ij (v_j v_jᵀ + C) + σ² I`` and ``b_i`` the gradient at ``old_i``; its
    posterior covariance is ``σ² A_i⁻¹``. Solving for the change, not for the row, makes
    the result exact in float32 although A_i is shifted by its rounding error.

    Of the k coordinates of ``old`` the last ``k − f`` are known, and stay.

    Returns:
        The rows, which of them have entries (1 or 0), and the sums over those.
    """
    m, f = mean.shape
    known = old.shape[1] - f
    dtype = old.dtype
    one = jnp.eye(f, dtype=dtype)
    padded = jnp.pad(old, ((0, 1), (0, 0)))
    means = jnp.pad(mean, ((0, 1), (0, 0)))

    def work(sums: Regression, block: Block):
        start = padded[block.rows]
        sums_of_rows = normal_equations(block, start, weigh)
        # Other devices may hold other entries of the same rows.
        g, b, weight, squares = jax.tree.map(combine, sums_of_rows)
        # The uncertainty C of the columns acts as a ridge along their uncertain directions.
        a = g + weight[:, None, None] * spread[None]
        a = a[:, :f, :f] + noise * one[None]
        # b is the gradient of the squares alone; this is that of the ridge and the prior.
        shrink = weight[:, None] * (start @ spread)[:, :f]
        shrink += noise * (start[:, :f] - means[block.rows])
        root = inverse_root(a)
        rest = contract("bkr,br->bk", root, b[:, :f] - shrink)
        change = contract("bkr,bk->br", root, rest)
        # Places without a row, and rows without entries, say nothing of the prior.
        real = ((block.rows < m) & (weight > 0)).astype(dtype)
        change = jnp.pad(change, ((0, 0), (0, known)))
        new = start + change
        # The squares after the change, and what the uncertainty of both factors adds.
        squares += contract("br,brs,bs->b", change, g, change)
        squares -= 2 * jnp.sum(change * b, axis=1)
        unsure = weight * contract("br,rs,bs->b", new, spread, new)
        # tr(σ² A⁻¹ (A − σ² I)), by the uncertainty of the row itself.
        unsure += noise * (f - noise * jnp.sum(root * root, axis=(1, 2)))
        sums = Regression(
            sums.covariance + noise * contract("bkr,bks,b->rs", root, root, real),
            sums.spread + noise * contract("bkr,bks,b->rs", root, root, weight),
            sums.count + jnp.sum(real),
            sums.squares + jnp.sum(real * (jnp.maximum(squares, 0) + unsure)),
            sums.unsure + jnp.sum(real * unsure),
            sums.weight + jnp.sum(real * weight),
        )
        return sums, jnp.concatenate([new[:, :f], real[:, None]], axis=1)

    zero, square = jnp.zeros((), dtype), jnp.zeros((f, f), dtype)
    start = Regression(square, square, zero, zero, zero, zero)
    sums, made = scan_rows(work, start, entries, vectors)
    return made[:, :f], made[:, f], sums


def whiten(this: Side, other: Side, moment: Float[Array, "d d"]) -> tuple[Side, Side]:
    """The same product in factors of which ``this`` has the identity as prior covariance.

    Among those, the ones that make ``moment`` of ``other`` diagonal, its Gram matrix: then
    the normal equations of a row are nearly so. No matrix is inverted that vanishes
    with a direction; a direction that the data do not support fades in ``other``. Effects
    are left as they are.
    """
    d = len(moment)
    dtype = this.prior.dtype
    one = jnp.eye(d, dtype=dtype)
    prior = this.prior[:d, :d]
    sizes = jnp.diagonal(prior)
    shift = 4 * d * jnp.finfo(dtype).eps * sizes + 1e-20 * jnp.max(sizes) + 1e-24
    lower = lax.linalg.cholesky(prior + jnp.diag(shift))
    _, turn = eigh(lower.T @ moment @ lower)
    turn = turn[:, ::-1]
    solved = lax.linalg.triangular_solve(lower, one, left_side=True, lower=True)
    white = _turned(this, (turn.T @ solved).T)
    white = white._replace(prior=white.prior.at[:d, :d].set(one))
    return white, _turned(other, lower @ turn)


def _turned(side: Side, by: Float[Array, "d d"]) -> Side:
    """The factor times a matrix; the effects, if there are any, as they are."""
    rest = side.prior.shape[0] - len(by)
    by = jnp.pad(by, (0, rest)) + jnp.diag(jnp.arange(len(by) + rest) >= len(by))
    return Side(
        times(side.factor, by),
        times(side.change, by),
        by.T @ side.spread @ by,
        side.mean @ by,
        by.T @ side.prior @ by,
        side.precision,
    )

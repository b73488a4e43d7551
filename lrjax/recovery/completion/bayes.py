"""Matrix factorization with Gaussian priors that are learned from the data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ...linalg import eigh, times
from .grouped import Block, Grouped, Reduce, identity, scan_rows
from .normal_equations import contract, inverse_root, normal_equations, weights_by_column


FREEDOM = 2.0  # degrees of freedom of the robust noise: it stands a third of gross errors


class Side(NamedTuple):
    """What is known of one factor: of its d columns and, if there are any, of its effects.

    The effects of the rows, one number for each, are the column after those of the factor:
    ``f = d + 1``; without them ``f = d``.

    Attributes:
        factor: ``(m, f)``, the posterior mean of each row.
        change: ``(m, f)``, how the last regression changed it.
        spread: ``(c, f, f)``, the posterior covariance of a row over the variance of its
            noise, averaged over the entries of each column, or of all of them (c = 1).
        mean: ``(p, f)``, the prior mean of a row is ``features @ mean``.
        prior: ``(f, f)``, its prior covariance; that of effect and factor is zero.
        precision: ``(p, f)``, of ``mean`` in units of ``prior``: large where a feature
            tells nothing.
    """

    factor: Float[Array, "m f"]
    change: Float[Array, "m f"]
    spread: Float[Array, "c f f"]
    mean: Float[Array, "p f"]
    prior: Float[Array, "f f"]
    precision: Float[Array, "p f"]


class Regression(NamedTuple):
    """The sums of a regression of all rows of a matrix.

    Attributes:
        covariance: ``(f, f)``, the sum of the posterior covariances of rows with entries.
        spread: ``(c, f, f)``, for each column the same over the variance of the noise of
            each row, summed over its entries; or over all entries (c = 1).
        weight: ``(c,)``, the sum of the weights of these entries.
        count: the number of rows with entries.
        unsure: the sum of the squared residuals that the uncertainty of both factors adds.
    """

    covariance: Float[Array, "f f"]
    spread: Float[Array, "c f f"]
    weight: Float[Array, " c"]
    count: Float[Array, ""]
    unsure: Float[Array, ""]


class Rows(NamedTuple):
    """What a regression finds of each row.

    Attributes:
        factor: ``(m, f)``, its posterior mean.
        weight: the sum of the weights of its entries.
        squares: that of their expected (weighted) squared residuals.
    """

    factor: Float[Array, "m f"]
    weight: Float[Array, " m"]
    squares: Float[Array, " m"]


def student_weights(residual: Array) -> Array:
    """How much residuals in units of the noise count if some are far beyond it.

    As Student's t has it.
    """
    return (FREEDOM + 1) / (FREEDOM + residual * residual)


def regress(
    entries: Grouped,
    old: Float[Array, "m k"],
    mean: Float[Array, "m f"],
    vectors: Float[Array, "n k"],
    spread: Float[Array, "#m k k"],
    noise: Float[Array, " m"],
    *,
    groups: int = 1,
    scale: Float[Array, " n"] | None = None,
    robust: bool,
    combine: Reduce = identity,
) -> tuple[Rows, Regression]:
    """The posterior of every row of a factor, its prior covariance being the identity.

    Row i solves ``A_i (u_i − old_i) = b_i`` with, over its observed columns j,
    ``A_i = Σ w_ij (v_j v_jᵀ + C_i) + σ_i² I`` and ``b_i`` the gradient at ``old_i``; its
    posterior covariance is ``σ_i² A_i⁻¹``. Solving for the change, not for the row, makes
    the result exact in float32 although A_i is shifted by its rounding error.

    Of the k coordinates of ``old`` the last ``k − f`` are known, and stay. The values of
    each column are multiplied by its ``scale``. ``groups`` is one, or the number of columns
    if each is to have the average covariance of its own entries.
    """
    m, f = mean.shape
    known = old.shape[1] - f
    dtype = old.dtype
    one = jnp.eye(f, dtype=dtype)
    padded = jnp.pad(old, ((0, 1), (0, 0)))
    means = jnp.pad(mean, ((0, 1), (0, 0)))
    noise = jnp.pad(noise, (0, 1), constant_values=1)

    def work(sums: Regression, block: Block):
        start = padded[block.rows]
        own = noise[block.rows]
        unit = lax.rsqrt(own)[:, None]
        weigh = (lambda e: student_weights(unit * e)) if robust else None
        sums_of_rows = normal_equations(block, start, weigh)
        # Other devices may hold other entries of the same rows.
        g, b, weight, squares = jax.tree.map(combine, sums_of_rows)
        # The uncertainty C of the columns acts as a ridge along their uncertain directions.
        c = weight[:, None, None] * jnp.take(spread, block.rows, axis=0, mode="clip")
        a = g + c
        a = a[:, :f, :f] + own[:, None, None] * one[None]
        # b is the gradient of the squares alone; this is that of the ridge and the prior.
        shrink = contract("br,brs->bs", start, c)[:, :f]
        shrink += own[:, None] * (start[:, :f] - means[block.rows])
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
        unsure = contract("br,brs,bs->b", new, c, new)
        # tr(σ² A⁻¹ (A − σ² I)), by the uncertainty of the row itself.
        unsure += own * (f - own * jnp.sum(root * root, axis=(1, 2)))
        squares = jnp.maximum(squares, 0) + unsure
        share = weight[:, None]
        if groups > 1:
            share = weights_by_column(block, start, weigh, groups)
        share = real[:, None] * share
        inverse = contract("bkr,bks->brs", root, root)
        sums = Regression(
            sums.covariance + contract("b,brs->rs", real * own, inverse),
            sums.spread + contract("bc,brs->crs", share, inverse),
            sums.weight + jnp.sum(share, axis=0),
            sums.count + jnp.sum(real),
            sums.unsure + jnp.sum(real * unsure),
        )
        found = real[:, None] * jnp.stack([weight, squares], axis=1)
        return sums, jnp.concatenate([new[:, :f], found], axis=1)

    shapes = (f, f), (groups, f, f), (groups,), (), ()
    start = Regression(*(jnp.zeros(shape, dtype) for shape in shapes))
    sums, made = scan_rows(work, start, entries, vectors, scale=scale)
    return Rows(made[:, :f], made[:, f], made[:, f + 1]), sums


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

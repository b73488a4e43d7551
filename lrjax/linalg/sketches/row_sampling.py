"""How much single rows matter, and samples of rows that keep what they measure."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from ..._arguments import check_key
from .._numerics import identity_like, nonzero, rounding, times, working_dtype
from ..decompositions import eigh
from ..gram import gram


def leverage_scores(
    x: Float[Array, "*b m n"], *, ridge: ArrayLike = 0.0
) -> Float[Array, "*b m"]:
    """The leverage of every row, the most that it can be of any combination of columns.

    ``τ_i = x_iᵀ (XᵀX + ridge I)⁺ x_i = max_v (x_i · v)² / (‖X v‖² + ridge ‖v‖²)``, between
    0 and 1. They sum to the rank; with a ridge to the effective dimension.

    Args:
        x: matrices ``(*b, m, n)``; fast where m is much larger than n.
        ridge: not negative, in the units of ``x²``.

    Returns:
        ``(*b, m)`` in float32 or wider.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
        >>> print(lrjax.linalg.leverage_scores(x))
        [0.5 0.5 1. ]

    Reference:
        P. Drineas, M. Magdon-Ismail, M. W. Mahoney, D. P. Woodruff, "Fast approximation of
        matrix coherence and statistical leverage" (2011), arXiv 1109.3843; with a ridge:
        A. Alaoui, M. W. Mahoney, "Fast randomized kernel ridge regression with statistical
        guarantees" (2014), arXiv 1411.0306.
    """
    x = x.astype(working_dtype(x.dtype))
    return _squares(x, jnp.ones(x.shape[:-1], x.dtype), ridge)


def _squares(x: Array, weights: Array, ridge: ArrayLike = 0.0) -> Array:
    """``x_iᵀ (Xᵀ diag(weights) X + ridge I)⁺ x_i``."""
    return jnp.sum(times(x, _inverse_root(x, weights, ridge)) ** 2, axis=-1)


def _inverse_root(x: Array, weights: Array, ridge: ArrayLike = 0.0) -> Array:
    """R with ``R Rᵀ = (Xᵀ diag(weights) X + ridge I)⁺``, columns in units of their own."""
    size = jnp.sqrt(jnp.sum(weights[..., None] * x**2, axis=-2))
    unit = 1 / nonzero(size)
    own = jnp.asarray(ridge, x.dtype)[..., None] * unit**2
    g = gram(jnp.sqrt(weights)[..., None] * x * unit[..., None, :])
    values, vectors = eigh(g + own[..., None] * identity_like(g))
    largest = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    there = values > rounding(x.dtype, x.shape[-1]) * largest
    roots = jnp.where(there, 1 / jnp.sqrt(nonzero(jnp.maximum(values, 0))), 0)
    return unit[..., :, None] * vectors * roots[..., None, :]


def lewis_weights(
    x: Float[Array, "*b m n"], p: ArrayLike, *, steps: int = 30
) -> Float[Array, "*b m"]:
    """The ``ℓ_p`` Lewis weights of the rows, for p in (0, 4).

    They solve ``w_i^(2/p) = x_iᵀ (Xᵀ diag(w^(1−2/p)) X)⁺ x_i`` by that fixed-point
    iteration, which contracts by ``|p/2 − 1|`` a step; with p = 2 they are leverage scores.
    They sum to the rank, and rows drawn in proportion to them keep ``‖X v‖_p`` for all v
    at once.

    Args:
        x: matrices ``(*b, m, n)``.
        p: in (0, 4); may be a tracer.
        steps: of the iteration.

    Returns:
        ``(*b, m)`` in float32 or wider.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
        >>> print(lrjax.linalg.lewis_weights(x, 1.0).round(4))
        [0.5 0.5 1. ]

    Reference:
        M. B. Cohen, R. Peng, "ℓ_p row sampling by Lewis weights" (2014), arXiv 1412.0588.
    """
    x = x.astype(working_dtype(x.dtype))
    p = jnp.asarray(p, x.dtype)

    def step(_, w):
        power = jnp.where(w > 0, nonzero(w) ** (1 - 2 / p), 0)
        return _squares(x, power) ** (p / 2)

    return lax.fori_loop(0, steps, step, leverage_scores(x))


class Sensitivities(NamedTuple):
    """Between which numbers the ``ℓ_p`` sensitivities lie.

    Attributes:
        lower: ``(m,)``, reached by a vector that was found.
        upper: ``(m,)``, from Lewis weights.
    """

    lower: Float[Array, " m"]
    upper: Float[Array, " m"]


def lp_sensitivities(
    x: Float[Array, "m n"], p: ArrayLike, *, steps: int = 30
) -> Sensitivities:
    """The most that every row can be of ``‖X v‖_p^p``, ``s_i = max_v |x_i·v|^p/‖X v‖_p^p``.

    For p in [1, 4), in between two bounds. ``‖X v‖_p`` is minimized subject to ``x_i·v =
    1`` by reweighted least squares, for all rows at once; any v gives a lower bound, and
    the best one counts. From above ``s_i ≤ w_i max(1, n^(p/2−1))`` with the
    :func:`lewis_weights` w, and ``s_i ≤ 1``. With p = 2 both are leverage scores.
    ``O(steps · m² n²)`` operations, and ``m²`` numbers of memory.

    Args:
        x: a matrix ``(m, n)``.
        p: in [1, 4); may be a tracer.
        steps: of the reweighting.

    Returns:
        :class:`Sensitivities`, in float32 or wider.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
        >>> bounds = lrjax.linalg.lp_sensitivities(x, 1.0)
        >>> print(bounds.lower.round(4), bounds.upper.round(4))
        [0.5 0.5 1. ] [0.5 0.5 1. ]

    Reference:
        S. Padmanabhan, D. P. Woodruff, Q. Zhang, "Computing approximate ℓ_p sensitivities"
        (2023), arXiv 2311.04158.
    """
    x = x.astype(working_dtype(x.dtype))
    p, (m, n) = jnp.asarray(p, x.dtype), x.shape
    tiny = rounding(x.dtype, n)

    def of_row(row: Array) -> Array:
        def step(_, state):
            weights, best = state
            root = _inverse_root(x, weights)
            v = root @ (row @ root)
            reached = jnp.abs(x @ v)
            share = jnp.abs(row @ v) ** p / nonzero(jnp.sum(reached**p))
            floor = jnp.maximum(reached, nonzero(tiny * jnp.max(reached)))
            return (floor / nonzero(jnp.max(floor))) ** (p - 2), jnp.maximum(best, share)

        start = jnp.ones(m, x.dtype), jnp.zeros((), x.dtype)
        return lax.fori_loop(0, steps, step, start)[1]

    lower = jax.vmap(of_row)(x)
    upper = lewis_weights(x, p) * jnp.maximum(1, n ** (p / 2 - 1))
    return Sensitivities(lower, jnp.clip(upper, lower, 1))


class RowSample(NamedTuple):
    """Rows that were drawn.

    Attributes:
        rows: ``(count,)`` indices, with repetitions.
        weights: ``(count,)``: ``Σ_k weights_k f(x_rows_k)`` is ``Σ_i f(x_i)`` on average.
            A norm ``Σ|x_i·v|^p`` is kept by rows times ``weights^(1/p)``.
    """

    rows: Int[Array, " count"]
    weights: Float[Array, " count"]


def sample_rows(scores: Float[Array, " m"], count: int, *, key: PRNGKeyArray) -> RowSample:
    """Draw rows in proportion to their scores, with weights that keep sums unbiased.

    ``weights = Σscores / (count · scores)`` at the rows drawn, independently and with
    repetitions.

    Args:
        scores: ``(m,)``, not negative: leverage scores, Lewis weights, or ones.
        count: how many.
        key: for the draw.

    Returns:
        A :class:`RowSample`.

    Raises:
        TypeError: for what is no key.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> scores = jnp.array([0.5, 0.5, 0.0])
        >>> rows, weights = lrjax.linalg.sample_rows(scores, 4, key=jax.random.key(0))
        >>> print(weights)
        [0.5 0.5 0.5 0.5]
    """
    check_key("sample_rows", key)
    scores = scores.astype(working_dtype(scores.dtype))
    rows = jr.choice(key, scores.shape[0], (count,), p=scores / nonzero(jnp.sum(scores)))
    return RowSample(rows, jnp.sum(scores) / nonzero(count * scores[rows]))

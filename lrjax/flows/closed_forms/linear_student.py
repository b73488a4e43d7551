"""The test error of a linear student in time, and when to stop."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from ..._sharding import einsum
from ...linalg import nonzero, svd
from ._rows import rows


def linear_student(
    t: Float[Array, "*t"],
    inputs: Float[Array, "p n"],
    outputs: Float[Array, " p"],
    start: Float[Array, " n"],
) -> Float[Array, "*t n"]:
    """The exact gradient flow of :func:`regression_loss`.

    With the eigenvectors v and eigenvalues λ of the empirical covariance ``ZᵀZ/p`` every
    coordinate relaxes by itself, and what no example shows stays as it was::

        w(t) = w₀ + Σ_i v_i (1 − e^{−λ_i t})/λ_i · v_iᵀ Zᵀ(y − Z w₀)/p

    Args:
        t: times.
        inputs: ``Z``, an example in each row.
        outputs: ``y``.
        start: ``w₀``.

    Returns:
        The weights at the times t.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> inputs, outputs = jnp.eye(2), jnp.array([1.0, 3.0])
        >>> t, start = jnp.array(50.0), jnp.zeros(2)
        >>> print(lrjax.flows.linear_student(t, inputs, outputs, start).round(3))
        [1. 3.]

    Reference:
        M. Advani, A. Saxe, "High-dimensional dynamics of generalization error in neural
        networks" (2017), arXiv 1710.03667.
    """
    t = jnp.asarray(t)[..., None]
    u, sizes, vt = svd(inputs)
    residual = outputs - einsum("pn,n->p", inputs, start)
    push = sizes * einsum("p,pk->k", residual, u) / len(inputs)
    rates = sizes**2 / len(inputs)
    moved = _relaxed(rows(rates, t), t) * rows(push, t)
    return rows(start, t) + einsum("...k,kn->...n", moved, vt)


def _relaxed(rate: Array, t: Array) -> Array:
    """``(1 − e^{−λt})/λ``, which is t for a rate of zero."""
    moves = rate > 0
    return jnp.where(moves, -jnp.expm1(-rate * t) / jnp.where(moves, rate, 1), t)


def student_error(
    t: Float[Array, "*t"],
    values: Float[Array, " k"],
    signal: ArrayLike,
    noise: ArrayLike,
) -> Float[Array, "*t"]:
    """The expected test error of a linear student in time: bias falls, variance rises.

    ``E‖w(t) − w̄‖² = Σ_i s_i e^{−2 λ_i t} + ν_i (1 − e^{−λ_i t})²/λ_i``, the expectation
    over the noise of the outputs, with white test inputs; the noise of a test output itself
    comes on top.

    - For given examples: ``λ_i`` the eigenvalues of ``ZᵀZ/p``, zeros among them, ``s_i``
      the squares of the coordinates of ``w̄ − w₀``, ``ν = σ²/p``.
    - In the limit of large n and p at ``γ = n/p``, for white inputs: ``values`` and
      ``weights`` of :func:`marchenko_pastur`, ``s = weights · E‖w̄ − w₀‖²`` and ``ν =
      weights · γ σ²``.

    Args:
        t: times.
        values: ``λ``.
        signal: ``s``, ``(k,)`` or one number for all.
        noise: ``ν``, likewise.

    Returns:
        The errors at the times t.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> t = jnp.array([0.0, 50.0])
        >>> print(lrjax.flows.student_error(t, jnp.ones(1), 1.0, 0.25))
        [1.   0.25]

    Reference:
        M. Advani, A. Saxe, "High-dimensional dynamics of generalization error in neural
        networks" (2017), arXiv 1710.03667.
    """
    t = jnp.asarray(t)[..., None]
    values, signal, noise = (rows(x, t) for x in _modes(values, signal, noise))
    bias = signal * jnp.exp(-2 * values * t)
    variance = noise * -jnp.expm1(-values * t) * _relaxed(values, t)
    return jnp.sum(bias + variance, axis=-1)


def _modes(values: Array, signal: ArrayLike, noise: ArrayLike) -> tuple[Array, ...]:
    spread = lambda x: jnp.broadcast_to(jnp.asarray(x, values.dtype), values.shape)
    return values, spread(signal), spread(noise)


class MarchenkoPastur(NamedTuple):
    """A quadrature for the eigenvalues of a covariance of white examples.

    Attributes:
        values: eigenvalues; the first is zero.
        weights: their shares, which add up to one.
    """

    values: Float[Array, " k"]
    weights: Float[Array, " k"]


def marchenko_pastur(ratio: ArrayLike, nodes: int = 256) -> MarchenkoPastur:
    """The eigenvalues of ``ZᵀZ/p`` for white Z ``(p, n)``, large at the ratio ``γ = n/p``.

    The share of those at zero is ``(1 − 1/γ)₊``, and the density of the others
    ``((λ₊ − λ)(λ − λ₋))^½ / (2πγλ)`` between ``λ± = (1 ± √γ)²``. With ``λ = 1 + γ + 2√γ
    cos θ`` the mean of ``(f(λ) − f(0))/λ`` is a trapezoidal sum over θ, and the weight
    that is left is at zero: for smooth f the error falls faster than any power of the
    number of nodes, at ``γ = 1`` and above, too.

    Args:
        ratio: ``γ``.
        nodes: their number, besides zero; about ``4√γ t`` for functions such as ``e^{−λt}``
            are enough.

    Returns:
        :class:`MarchenkoPastur`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> values, weights = lrjax.flows.marchenko_pastur(2.0)
        >>> print(jnp.sum(weights * values**2).round(3), weights[0].round(3))
        3.0 0.5

    Reference:
        V. Marchenko, L. Pastur, "Distribution of eigenvalues for some sets of random
        matrices" (1967), Mathematics of the USSR-Sbornik 1.
    """
    root = jnp.sqrt(jnp.asarray(ratio, float))
    angles = jnp.pi * jnp.arange(1, nodes + 1) / (nodes + 1)
    values = (1 - root) ** 2 + 4 * root * jnp.cos(angles / 2) ** 2
    weights = 2 * jnp.sin(angles) ** 2 / ((nodes + 1) * values)
    rest = jnp.maximum(1 - jnp.sum(weights), 0)
    return MarchenkoPastur(
        jnp.concatenate([jnp.zeros(1), values]), jnp.concatenate([rest[None], weights])
    )


def best_stopping_time(
    values: Float[Array, " k"], signal: ArrayLike, noise: ArrayLike
) -> Float[Array, ""]:
    """When :func:`student_error` is least.

    Alone, a mode is best at ``ln(1 + λ_i s_i/ν_i)/λ_i``; all together between the first and
    the last of these times, where the best of a grid is refined by bisection of the slope.

    Args:
        values: ``λ``, as in :func:`student_error`.
        signal: ``s``.
        noise: ``ν``.

    Returns:
        The time; infinite without noise.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.flows.best_stopping_time(jnp.ones(1), 1.0, 1.0).round(4))
        0.6931

    Reference:
        M. Advani, A. Saxe, "High-dimensional dynamics of generalization error in neural
        networks" (2017), arXiv 1710.03667.
    """
    values, signal, noise = _modes(values, signal, noise)
    moves = (values > 0) & (signal + noise > 0)
    rate = nonzero(values)
    alone = jnp.log1p(rate * signal / nonzero(noise)) / rate
    first = jnp.min(jnp.where(moves, alone, jnp.inf))
    last = jnp.max(jnp.where(moves, alone, 0))
    grid = first * (last / nonzero(first)) ** jnp.linspace(0, 1, 64)
    best = jnp.argmin(student_error(grid, values, signal, noise))
    low, high = grid[jnp.maximum(best - 1, 0)], grid[jnp.minimum(best + 1, 63)]

    def slope(t):
        decay = jnp.exp(-values * t)
        return jnp.sum(decay * (noise * (1 - decay) - values * signal * decay))

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        falls = slope(middle) < 0
        return jnp.where(falls, middle, low), jnp.where(falls, high, middle)

    low, high = lax.fori_loop(0, 60, halve, (low, high))
    learns_all = jnp.any(moves & (noise == 0) & (signal > 0))
    return jnp.where(learns_all, jnp.inf, (low + high) / 2)

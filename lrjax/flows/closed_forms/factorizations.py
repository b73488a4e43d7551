"""Factors that share nothing with the target, and products of many of them."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..._sharding import einsum
from ...linalg import cross, nonzero, outer, rounding, times
from ...lowrank import LowRank
from .._boost import boost


class RiccatiBlocks(NamedTuple):
    """The blocks of ``[left; right] [left; right]ᵀ``."""

    product: Float[Array, "m n"]
    left_gram: Float[Array, "m m"]
    right_gram: Float[Array, "n n"]


def riccati(
    t: Float[Array, ""], start: LowRank, target: Float[Array, "m n"]
) -> RiccatiBlocks:
    """The exact gradient flow of a balanced factorization, aligned or not, of any rank.

    ``L = ½‖M − left rightᵀ‖²`` with ``leftᵀleft = rightᵀright`` at the start (and hence
    for ever): ``Z = [left; right]`` obeys ``dZ/dt = S Z − ½ Z ZᵀZ``, ``S = [[0, M],
    [Mᵀ, 0]]``, and with ``S = V diag(l) Vᵀ``::

        Z Zᵀ(t) = e^{St} Z₀ [I + Z₀ᵀ Φ Z₀]⁻¹ Z₀ᵀ e^{St},    Φ = V diag((e^{2lt} − 1)/2l) Vᵀ

    Nothing is squared that grows, and modes are eliminated from the largest on, so that
    the digits are there at any time. It does not know about imbalance: use
    :func:`lrjax.balance`.

    Args:
        t: the time.
        start: balanced factors.
        target: ``M``.

    Returns:
        ``left rightᵀ``, ``left leftᵀ`` and ``right rightᵀ`` at the time t.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> start = lrjax.LowRank(jnp.full((1, 1), 0.1), jnp.full((1, 1), 0.1))
        >>> blocks = lrjax.flows.riccati(jnp.array(5.0), start, jnp.ones((1, 1)))
        >>> print(blocks.product.round(3))
        [[0.996]]

    Reference:
        A matrix Riccati equation, K. Fukumizu, "Effect of batch learning in multilayer
        neural networks" (1998), ICONIP; for deep linear networks L. Braun, C. Dominé,
        J. Fitzgerald, A. Saxe, "Exact learning dynamics of deep linear networks with
        prior knowledge" (2022), NeurIPS.
    """
    m, n = target.shape
    r = start.rank
    corner = lambda k: jnp.zeros((k, k), target.dtype)
    values, vectors = jnp.linalg.eigh(
        jnp.block([[corner(m), target], [target.T, corner(n)]])
    )
    values, vectors = values[::-1], vectors[:, ::-1]
    z = cross(vectors, jnp.concatenate([start.left, start.right]))
    # Rotated so that column j begins at mode j, and each measured by the growth of that
    # mode: then no number exceeds those of the start.
    rotation, triangle = jnp.linalg.qr(z[:r].T)
    z = jnp.concatenate([triangle.T, times(z[r:], rotation)])
    up = jnp.maximum(values, 0)
    relative = lambda rates: jnp.exp(jnp.minimum((rates[:, None] - up[None, :r]) * t, 0))
    shrunk = jnp.diag(jnp.exp(-up[:r] * t))
    squares = jnp.concatenate([shrunk, _root_span(t, values)[:, None] * relative(up) * z])
    _, root = jnp.linalg.qr(squares)
    grown = times(vectors, relative(values) * z)
    root = lax.linalg.triangular_solve(root, grown, left_side=False, lower=False)
    product = outer(root, root)
    return RiccatiBlocks(product[:m, m:], product[:m, :m], product[m:, m:])


def _root_span(t: Array, values: Array) -> Array:
    """``sqrt((e^{2lt} − 1)/2l)``, over ``e^{lt}`` where l is positive."""
    still = jnp.abs(values) * t < 1e-30
    l = jnp.where(still, 1, values)
    span = jnp.where(l > 0, -jnp.expm1(-2 * l * t), jnp.expm1(2 * l * t)) / (2 * l)
    moves = t > 0
    return jnp.sqrt(jnp.where(moves, jnp.where(still, t, span), 1)) * moves


def trace_squared(
    t: Float[Array, ""], start: LowRank, base: Float[Array, "n n"]
) -> LowRank:
    """The exact gradient flow of ``L = ½ tr(W + left rightᵀ)²``.

    In the intrinsic time ``dz/dt = 2 z tr(W + left rightᵀ)``, ``z = e^{2s}``, the flow is
    linear, ``left = cosh(s) left₀ − sinh(s) right₀`` and so on the right, and z obeys the
    scalar Riccati equation ``z' = 2 tr(W) z + p/2 − (q/2) z²`` with
    ``p = ‖left₀ + right₀‖²``, ``q = ‖left₀ − right₀‖²``.

    Args:
        t: the time.
        start: square factors ``(n, r)``.
        base: the frozen weight ``W``.

    Returns:
        The factors at the time t.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> start = lrjax.LowRank(jnp.zeros((4, 1)), jnp.ones((4, 1)) / 2)
        >>> end = lrjax.flows.trace_squared(jnp.array(30.0), start, jnp.eye(4))
        >>> print(jnp.trace(end.materialize()).round(4))
        -4.0

    Reference:
        The loss of M. Rushka, D. Klabjan, "Rank-accuracy trade-off for LoRA: a
        gradient-flow analysis" (2026), arXiv 2602.10212.
    """
    trace = jnp.trace(base)
    speed = 2 * (trace + jnp.sum(start.left * start.right))
    drive, damp = _norm(start.left + start.right), _norm(start.left - start.right)
    rotated = boost(t, 2 * trace, damp, drive, speed)
    left, right = rotated(start.left, -start.right)
    return LowRank(left, -right)


def _norm(x: Array) -> Array:
    """The Frobenius norm, with a zero derivative at zero."""
    square = jnp.sum(x**2)
    return jnp.sqrt(nonzero(square)) * (square > 0)


def end_to_end_velocity(
    weight: Float[Array, "m n"], gradient: Float[Array, "m n"], depth: int
) -> Float[Array, "m n"]:
    """The velocity of the product of a balanced deep linear network under gradient flow.

    For ``W = W_N ⋯ W_1`` with ``W_{j+1}ᵀ W_{j+1} = W_j W_jᵀ`` and ``G = ∂L/∂W``::

        dW/dt = −Σ_j (W Wᵀ)^{(N−j)/N} G (WᵀW)^{(j−1)/N},    j = 1 … N

    so a singular value with gradient g moves at ``−N σ^{2−2/N} g``. Singular values below
    the rounding error of the largest are zero: a root would make them large.

    Args:
        weight: the product ``W``.
        gradient: of the loss with respect to the product.
        depth: the number N of factors.

    Returns:
        ``dW/dt``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> one = jnp.ones((1, 1))
        >>> print(lrjax.flows.end_to_end_velocity(4 * one, -one, depth=2))
        [[8.]]

    Reference:
        S. Arora, N. Cohen, E. Hazan, "On the optimization of deep networks: implicit
        acceleration by overparameterization" (2018), arXiv 1802.06509.
    """
    u, values, vt = jnp.linalg.svd(weight, full_matrices=True)
    floor = rounding(values.dtype, max(weight.shape)) * values[:1]
    values = jnp.where(values > floor, values, 0)
    left = jnp.zeros(weight.shape[0], values.dtype).at[: len(values)].set(values)
    right = jnp.zeros(weight.shape[1], values.dtype).at[: len(values)].set(values)
    powers = jnp.arange(depth) * (2 / depth)
    weights = outer(_powers(left, powers[::-1]), _powers(right, powers))
    rotated = einsum("ai,ab,jb->ij", u, gradient, vt)
    return -einsum("ai,ij,jb->ab", u, weights * rotated, vt)


def _powers(x: Array, exponents: Array) -> Array:
    """``x_i ** e_j`` with ``0 ** 0 = 1``."""
    exponents = exponents.astype(x.dtype)
    return x[:, None] ** exponents[None, :]

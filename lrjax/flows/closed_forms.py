from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from .._sharding import einsum
from ..lowrank import LowRank


class _Propagator(NamedTuple):
    """The numbers that solve ``x' = a x + b − c x²``, with ``k = sqrt(a² + 4bc)``.

    ::

        x(t) = (x₀ (up + down·decay) + 2b·span) / (down + up·decay + 2c·x₀·span)

    All of them are non-negative, so nothing cancels, and none grows with t.
    """

    up: Array  # (k + a)/k
    down: Array  # (k − a)/k
    decay: Array  # exp(−kt)
    span: Array  # (1 − exp(−kt))/k, which is t at k = 0


def _propagator(t: Array, a: Array, four_bc: Array) -> _Propagator:
    square = a * a + four_bc
    moves = square > 0
    k = jnp.sqrt(jnp.where(moves, square, 1))
    # The larger of k ± a as it stands, the smaller from their product k² − a² = 4bc.
    larger = (k + jnp.abs(a)) / k
    smaller = four_bc / (k * k * larger)
    still = jnp.ones_like(k)
    up = jnp.where(moves, jnp.where(a >= 0, larger, smaller), still)
    down = jnp.where(moves, jnp.where(a >= 0, smaller, larger), still)
    tiny = jnp.finfo(k.dtype).tiny ** 0.5  # keeps 0/0 and its derivative away at large t
    decay = jnp.where(moves, jnp.maximum(jnp.exp(-k * t), tiny), 1)
    return _Propagator(up, down, decay, jnp.where(moves, -jnp.expm1(-k * t) / k, t))


def aligned_modes(
    t: Float[Array, "*t"],
    left: Float[Array, " k"],
    right: Float[Array, " k"],
    target: Float[Array, " k"],
    scale: ArrayLike = 1.0,
) -> tuple[Float[Array, "*t k"], Float[Array, "*t k"]]:
    """The exact gradient flow of a factorization that is aligned with its target.

    With ``L = ½‖M − s·X‖²``, ``M = U diag(σ) Vᵀ`` and a start ``X(0) = LowRank(U
    diag(b), V diag(a))`` the modes do not interact::

        db/dt = s (σ − s·ab) a        da/dt = s (σ − s·ab) b

    ``b² − a²`` is conserved, at any value: balanced factors give Saxe's sigmoid, and the
    standard LoRA start ``b = 0`` is solved too. Zeros and signs are free.
    ``(b ± a)²`` obeys a scalar Riccati equation, hence the formula. The product converges
    to ``σ/s`` with the exponential rate ``s·sqrt(4σ² + s²(b² − a²)²)``.

    Args:
        t: times.
        left: ``b(0)``.
        right: ``a(0)``.
        target: the singular values ``σ`` of the target; 0 for a mode that it lacks.
        scale: ``s``, for LoRA ``alpha/r``.

    Returns:
        ``b(t)`` and ``a(t)``; the singular values of X (with sign) are their product.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> b, a = lrjax.flows.aligned_modes(
        ...     jnp.array([0.0, 9.0]), jnp.zeros(1), jnp.full(1, 0.1), jnp.ones(1)
        ... )
        >>> print((b * a).ravel().round(4))
        [0. 1.]

    Reference:
        Balanced: A. Saxe, J. McClelland, S. Ganguli (2014), arXiv 1312.6120; imbalanced:
        S. Tarmoun, G. França, B. Haeffele, R. Vidal, "Understanding the dynamics of
        gradient flow in overparameterized linear models" (2021).
    """
    t = jnp.asarray(t)[..., None]
    left, right, target = (_rows(x, t) for x in (left, right, target))
    linear, quadratic = 2 * scale * target, scale**2
    plus, minus = left + right, left - right
    four_bc = jnp.asarray(quadratic**2 * (plus * minus) ** 2)

    def evolve(x, other, a):
        p = _propagator(t, a, four_bc)
        above = p.up + p.down * p.decay + quadratic * other**2 * p.span
        below = p.down + p.up * p.decay + quadratic * x**2 * p.span
        return x * jnp.sqrt(above / below)

    plus, minus = evolve(plus, minus, linear), evolve(minus, plus, -linear)
    return (plus + minus) / 2, (plus - minus) / 2


def _rows(x: ArrayLike, t: Array) -> Array:
    """A vector with one leading axis of length one for each axis of ``t[..., None]``."""
    x = jnp.asarray(x)
    return x.reshape((1,) * (t.ndim - x.ndim) + x.shape)


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

    The formula loses digits as ``e^{2 σ₁ t}`` grows: in float64 keep ``2 σ₁ t`` below 18
    for twelve digits. It does not know about imbalance: use :func:`lrjax.balance`.

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
        neural networks" (1998); for deep linear networks L. Braun, C. Dominé,
        J. Fitzgerald, A. Saxe, "Exact learning dynamics of deep linear networks with
        prior knowledge" (2022).
    """
    m, n = target.shape
    corner = lambda k: jnp.zeros((k, k), target.dtype)
    values, vectors = jnp.linalg.eigh(
        jnp.block([[corner(m), target], [target.T, corner(n)]])
    )
    # Everything is divided by e^{lt} of the largest l, so that nothing overflows.
    top = values[-1]
    still = jnp.abs(values) * t < 1e-30
    l = jnp.where(still, 1, values)
    up = -jnp.expm1(-2 * l * t) * jnp.exp(2 * (l - top) * t)
    down = jnp.expm1(2 * l * t) * jnp.exp(-2 * top * t)
    phi = jnp.where(l > 0, up, down) / (2 * l)
    phi = jnp.where(still, t * jnp.exp(-2 * top * t), phi)
    z = einsum("ij,ir->jr", vectors, jnp.concatenate([start.left, start.right]))
    identity = jnp.eye(start.rank, dtype=z.dtype)
    small = identity * jnp.exp(-2 * top * t) + einsum("j,jr,js->rs", phi, z, z)
    grown = einsum("ij,j,jr->ir", vectors, jnp.exp((values - top) * t), z)
    root = lax.linalg.triangular_solve(
        jnp.linalg.cholesky(small), grown, left_side=False, lower=True, transpose_a=True
    )
    gram = einsum("ir,jr->ij", root, root)
    return RiccatiBlocks(gram[:m, m:], gram[:m, :m], gram[m:, m:])


def scaled_modes(
    t: Float[Array, "*t"], start: Float[Array, " k"], target: Float[Array, " k"]
) -> Float[Array, "*t k"]:
    """The exact flow of aligned modes under ``precondition=scale_by_gram()``.

    ``u(t) = σ + (u₀ − σ) e^{−2t}``: the rate is 2 for every mode, whatever its size and
    the balance of the factors.

    Args:
        t: times.
        start: singular values of the factorization at the start.
        target: singular values of the target.

    Returns:
        The singular values at the times t.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.flows.scaled_modes(jnp.array(1.0), jnp.zeros(1), jnp.ones(1)))
        [0.86466473]

    Reference:
        The continuous limit of T. Tong, C. Ma, Y. Chi (2021), arXiv 2005.08898.
    """
    return _exponential(t, start, target, 2)


def tangent_modes(
    t: Float[Array, "*t"], start: Float[Array, " k"], target: Float[Array, " k"]
) -> Float[Array, "*t k"]:
    """The exact flow of aligned modes under ``precondition=scale_by_tangent()``.

    ``u(t) = σ + (u₀ − σ) e^{−t}``: half the rate of :func:`scaled_modes`, which counts
    the part of the gradient in both the column and the row space twice.

    Args:
        t: times.
        start: singular values of the factorization at the start.
        target: singular values of the target.

    Returns:
        The singular values at the times t.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.flows.tangent_modes(jnp.array(1.0), jnp.zeros(1), jnp.ones(1)))
        [0.63212055]

    Reference:
        The gradient flow on the manifold of matrices of fixed rank; for LoRA factors
        Z. Wang et al., "LoRA-Pro" (2024), arXiv 2407.18242.
    """
    return _exponential(t, start, target, 1)


def _exponential(t, start, target, rate):
    t = jnp.asarray(t)[..., None]
    start, target = _rows(start, t), _rows(target, t)
    return target + (start - target) * jnp.exp(-rate * t)


def spectral_modes(
    t: Float[Array, "*t"], start: Float[Array, " k"], target: Float[Array, " k"]
) -> Float[Array, "*t k"]:
    """The exact flow of aligned, balanced modes whose gradients are orthogonalized.

    ``d left/dt = msign(−∂L/∂left)``, and so on the right (Muon without momentum, in
    small steps): ``sqrt(u(t)) = min(sqrt(u₀) + t, sqrt(σ))``. All modes grow at unit
    rate; mode i arrives at ``t = sqrt(σ) − sqrt(u₀)``, small ones first, and stays.

    Args:
        t: times.
        start: singular values of the factorization at the start, at most ``target``.
        target: singular values of the target.

    Returns:
        The singular values at the times t.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> sigma = jnp.array([4.0, 1.0])
        >>> print(lrjax.flows.spectral_modes(jnp.array(1.5), jnp.zeros(2), sigma))
        [2.25 1.  ]

    Reference:
        The limit of vanishing smoothing in Kang, Yun, Shin, Cho, Yun (2026), arXiv
        2602.06385.
    """
    t = jnp.asarray(t)[..., None]
    start, target = _rows(start, t), _rows(target, t)
    return jnp.minimum(jnp.sqrt(start) + t, jnp.sqrt(target)) ** 2


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
        The loss of Rushka and Klabjan, "Rank-accuracy trade-off for LoRA: a gradient-flow
        analysis" (2026), arXiv 2602.10212.
    """
    p = jnp.sum((start.left + start.right) ** 2)
    q = jnp.sum((start.left - start.right) ** 2)
    e = _propagator(t, 2 * jnp.trace(base), p * q)
    z = (e.up + e.down * e.decay + p * e.span) / (e.down + e.up * e.decay + q * e.span)
    grow, shrink = jnp.sqrt(z), 1 / jnp.sqrt(z)
    cosh, sinh = (grow + shrink) / 2, (grow - shrink) / 2
    return LowRank(
        cosh * start.left - sinh * start.right, cosh * start.right - sinh * start.left
    )


def half_learning_times(target: Float[Array, " k"], alpha: ArrayLike) -> Float[Array, " k"]:
    """When each mode is half learnt from a small balanced start: incremental learning.

    From factors of size α, ``u₀ = α²``, the sigmoid of :func:`aligned_modes` crosses
    ``σ/2`` at ``t = ln(σ/α² − 1)/(2σ)``. In units of ``ln(1/α)`` that tends to ``1/σ`` as
    α → 0: the modes are learnt one after the other.

    Args:
        target: singular values of the target, larger than ``α²``.
        alpha: the size of both factors at the start.

    Returns:
        The times.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.flows.half_learning_times(jnp.array([2.0, 1.0]), 1e-3).astype(int))
        [3 6]

    Reference:
        A. Saxe, J. McClelland, S. Ganguli (2014), arXiv 1312.6120.
    """
    return jnp.log(target / alpha**2 - 1) / (2 * target)


def end_to_end_velocity(
    weight: Float[Array, "m n"], gradient: Float[Array, "m n"], depth: int
) -> Float[Array, "m n"]:
    """The velocity of the product of a balanced deep linear network under gradient flow.

    For ``W = W_N ⋯ W_1`` with ``W_{j+1}ᵀ W_{j+1} = W_j W_jᵀ`` and ``G = ∂L/∂W``::

        dW/dt = −Σ_j (W Wᵀ)^{(N−j)/N} G (WᵀW)^{(j−1)/N},    j = 1 … N

    so a singular value with gradient g moves at ``−N σ^{2−2/N} g``.

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
        S. Arora, N. Cohen, E. Hazan, "On the optimization of deep networks" (2018),
        arXiv 1802.06509.
    """
    u, values, vt = jnp.linalg.svd(weight, full_matrices=True)
    left = jnp.zeros(weight.shape[0], values.dtype).at[: len(values)].set(values)
    right = jnp.zeros(weight.shape[1], values.dtype).at[: len(values)].set(values)
    powers = jnp.arange(depth) * (2 / depth)
    weights = einsum("ij,kj->ik", _powers(left, powers[::-1]), _powers(right, powers))
    rotated = einsum("ai,ab,jb->ij", u, gradient, vt)
    return -einsum("ai,ij,jb->ab", u, weights * rotated, vt)


def _powers(x: Array, exponents: Array) -> Array:
    """``x_i ** e_j`` with ``0 ** 0 = 1``."""
    exponents = exponents.astype(x.dtype)
    return x[:, None] ** exponents[None, :]

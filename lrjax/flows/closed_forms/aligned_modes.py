"""Factors that share their singular vectors with the target: every mode by itself."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from .._boost import boost
from ._rows import rows


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
        Balanced: A. Saxe, J. McClelland, S. Ganguli, "Exact solutions to the nonlinear
        dynamics of learning in deep linear neural networks" (2014), arXiv 1312.6120;
        imbalanced: S. Tarmoun, G. França, B. Haeffele, R. Vidal, "Understanding the
        dynamics of gradient flow in overparameterized linear models" (2021), ICML.
    """
    t = jnp.asarray(t)[..., None]
    left, right, target = (rows(x, t) for x in (left, right, target))
    rate, damp, drive = (
        jnp.multiply(scale, x) for x in (2 * target, left + right, left - right)
    )
    speed = jnp.multiply(scale, 2 * (target - scale * left * right))
    return boost(t, rate, damp, drive, speed)(left, right)


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
        The continuous limit of T. Tong, C. Ma, Y. Chi, "Accelerating ill-conditioned
        low-rank matrix estimation via scaled gradient descent" (2021), arXiv 2005.08898.
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
        Z. Wang et al., "LoRA-Pro: are low-rank adapters properly optimized?" (2024),
        arXiv 2407.18242.
    """
    return _exponential(t, start, target, 1)


def _exponential(t, start, target, rate):
    t = jnp.asarray(t)[..., None]
    start, target = rows(start, t), rows(target, t)
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
        The limit of vanishing smoothing in C. Kang, J. Yun, B. Shin, Y. Cho, C. Yun,
        "Uniform spectral growth and convergence of Muon in LoRA-style matrix
        factorization" (2026), arXiv 2602.06385.
    """
    t = jnp.asarray(t)[..., None]
    start, target = rows(start, t), rows(target, t)
    return jnp.minimum(jnp.sqrt(start) + t, jnp.sqrt(target)) ** 2


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
        A. Saxe, J. McClelland, S. Ganguli, "Exact solutions to the nonlinear dynamics of
        learning in deep linear neural networks" (2014), arXiv 1312.6120.
    """
    return jnp.log(target / alpha**2 - 1) / (2 * target)

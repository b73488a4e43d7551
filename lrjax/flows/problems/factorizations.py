"""A matrix in two factors and what it should be."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Scalar

from ...linalg import cross, sqrtm, times
from ...lowrank import LowRank


def approximation_loss(
    x: LowRank, target: Float[Array, "m n"], scale: ArrayLike = 1.0
) -> Scalar:
    """Low-rank approximation, ``½‖M − s·left rightᵀ‖²``: LoRA on a single weight.

    Args:
        x: the factors.
        target: ``M``, for LoRA what the frozen weight lacks.
        scale: ``s``, for LoRA ``alpha/r``.

    Returns:
        The loss.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.ones((1, 1)), jnp.ones((1, 1)))
        >>> float(lrjax.flows.approximation_loss(x, jnp.array([[3.0]])))
        2.0
    """
    return 0.5 * jnp.sum((target - scale * x.materialize()) ** 2)


def trace_squared_loss(x: LowRank, base: Float[Array, "n n"]) -> Scalar:
    """``½ tr(W + left rightᵀ)²``, which every rank can bring to zero.

    Args:
        x: square factors.
        base: the frozen ``W``.

    Returns:
        The loss; its flow is :func:`lrjax.flows.trace_squared`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.ones((2, 1)), jnp.ones((2, 1)))
        >>> float(lrjax.flows.trace_squared_loss(x, jnp.eye(2)))
        8.0
    """
    return 0.5 * (jnp.trace(base) + jnp.sum(x.left * x.right)) ** 2


def bures_wasserstein_loss(x: Float[Array, "n r"], target: Float[Array, "n n"]) -> Scalar:
    """Half the squared Bures-Wasserstein distance of ``X Xᵀ`` from a covariance.

    It is that of optimal transport between the Gaussians ``N(0, X Xᵀ)``, which a linear
    generator X makes of white noise, and ``N(0, Σ)``::

        ½ tr(X Xᵀ) + ½ tr(Σ) − tr (Xᵀ Σ X)^½         gradient  X − Σ X (Xᵀ Σ X)^(−½)

    The root is of an r x r matrix, by products (:func:`lrjax.linalg.sqrtm`). Where ``Xᵀ
    Σ X`` is singular the distance has a kink and the gradient is one of many.

    Args:
        x: ``X``.
        target: ``Σ``, positive semidefinite.

    Returns:
        The loss; its flow is :func:`bures_wasserstein_flow` and ends at
        :func:`bures_wasserstein_limit`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x, target = jnp.diag(jnp.array([1.0, 2.0])), jnp.diag(jnp.array([4.0, 9.0]))
        >>> print(lrjax.flows.bures_wasserstein_loss(x, target).round(4))
        1.0

    Reference:
        P. Bréchet, K. Papagiannouli, J. An, G. Montúfar, "Critical points and convergence
        analysis of generative deep linear networks trained with Bures-Wasserstein loss"
        (2023), arXiv 2303.03027.
    """
    overlap = cross(x, times(target, x))
    sizes = jnp.sum(x**2) + jnp.trace(target)
    return 0.5 * sizes - jnp.trace(sqrtm(overlap))

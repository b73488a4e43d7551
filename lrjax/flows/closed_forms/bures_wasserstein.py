"""The flow of a factor towards a covariance in the Bures-Wasserstein distance."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ...linalg import eigh, svd, times


def bures_wasserstein_flow(
    t: Float[Array, ""], start: Float[Array, "n r"], target: Float[Array, "n n"]
) -> Float[Array, "n r"]:
    """The exact gradient flow of :func:`bures_wasserstein_loss` of a full-rank factor.

    The polar factor of ``Σ^½ X`` stays what it is at the start, so that X goes straight
    and ``X Xᵀ`` along the geodesic, at rate one::

        X(t) = e^{−t} X₀ + (1 − e^{−t}) Σ X₀ (X₀ᵀ Σ X₀)^(−½)

    It is so for a square X of full rank, and for a thinner one whose columns span
    eigenvectors of ``Σ``. Any other thin factor turns on its way.

    Args:
        t: the time.
        start: ``X₀``.
        target: ``Σ``.

    Returns:
        ``X(t)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> target = jnp.diag(jnp.array([4.0, 9.0]))
        >>> x = lrjax.flows.bures_wasserstein_flow(jnp.array(30.0), jnp.eye(2), target)
        >>> print(x.round(4))
        [[2. 0.]
         [0. 3.]]

    Reference:
        P. Bréchet, K. Papagiannouli, J. An, G. Montúfar, "Critical points and convergence
        analysis of generative deep linear networks trained with Bures-Wasserstein loss"
        (2023), arXiv 2303.03027, has the loss; the solution is derived here.
    """
    values, vectors = eigh(target)
    scaled = vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :]
    u, _, vt = svd(times(scaled.T, start))
    end = times(scaled, times(u, vt))
    return end + (start - end) * jnp.exp(-t)


def bures_wasserstein_limit(target: Float[Array, "n n"], rank: int) -> Float[Array, "n r"]:
    """Where :func:`bures_wasserstein_loss` of a thin factor is least: ``U_r Λ_r^½``.

    ``X Xᵀ`` is then the projection of the covariance on its r leading eigenvectors, and
    the loss half the sum of its other eigenvalues. The flow ends there from random starts.
    X is unique up to a rotation.

    Args:
        target: ``Σ``.
        rank: ``r``, static.

    Returns:
        The factor.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> target = jnp.diag(jnp.array([4.0, 9.0]))
        >>> x = lrjax.flows.bures_wasserstein_limit(target, 1)
        >>> float(lrjax.flows.bures_wasserstein_loss(x, target))
        2.0

    Reference:
        P. Bréchet, K. Papagiannouli, J. An, G. Montúfar, "Critical points and convergence
        analysis of generative deep linear networks trained with Bures-Wasserstein loss"
        (2023), arXiv 2303.03027.
    """
    values, vectors = eigh(target)
    return vectors[:, -rank:] * jnp.sqrt(jnp.maximum(values[-rank:], 0))[None, :]

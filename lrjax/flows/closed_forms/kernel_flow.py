"""Training in the lazy regime, where the tangent kernel stays what it is."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._sharding import einsum
from ...linalg import eigh
from ._rows import rows


def kernel_flow(
    t: Float[Array, "*t"], kernel: Float[Array, "k k"], targets: Float[Array, " k"]
) -> Float[Array, "*t k"]:
    """The outputs of a model that trains by its tangent kernel, ``(I − e^{−Kt}) y``.

    The limit of large scales of :func:`lazy_loss`. For ``f = left rightᵀ`` the kernel is
    ``left leftᵀ ⊗ I + I ⊗ right rightᵀ``: a standard LoRA start has the second term alone,
    and trains one factor as if the other were frozen.

    Args:
        t: times.
        kernel: ``K`` at the start, of :func:`lrjax.metrics.tangent_kernel`.
        targets: ``y``, what the outputs lack.

    Returns:
        The change of the outputs at the times t.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> kernel, targets = jnp.diag(jnp.array([1.0, 0.0])), jnp.ones(2)
        >>> print(lrjax.flows.kernel_flow(jnp.array(1.0), kernel, targets).round(3))
        [0.632 0.   ]

    Reference:
        A. Jacot, F. Gabriel, C. Hongler, "Neural tangent kernel: convergence and
        generalization in neural networks" (2018), arXiv 1806.07572.
    """
    t = jnp.asarray(t)[..., None]
    rates, vectors = eigh(kernel)
    learnt = -jnp.expm1(-rows(jnp.maximum(rates, 0), t) * t)
    parts = rows(einsum("k,ki->i", targets, vectors), t)
    return einsum("...i,ki->...k", learnt * parts, vectors)

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._numerics import cross, times, working_dtype
from .decompositions import eigh, svd


def nystrom(
    image: Float[Array, "n k"], probe: Float[Array, "n k"]
) -> tuple[Float[Array, " k"], Float[Array, "n k"]]:
    """Eigenvalues and vectors of a positive semidefinite C from ``C Ω`` alone.

    ``C ≈ (C Ω)(Ωᵀ C Ω)⁺(C Ω)ᵀ``, the best guess below C that agrees with it on Ω; exact
    where the rank of C is at most k. The image is linear in C, so it can be summed over
    a stream of which nothing is kept.

    Args:
        image: ``C Ω``.
        probe: ``Ω`` with orthonormal columns.

    Returns:
        The eigenvalues ``(k,)``, falling, and orthonormal columns ``(n, k)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> c = jnp.diag(jnp.array([4.0, 1.0, 0.0]))
        >>> probe = jnp.linalg.qr(jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]))[0]
        >>> print(lrjax.linalg.nystrom(c @ probe, probe)[0].round(4))
        [4. 1.]

    Reference:
        J. A. Tropp, A. Yurtsever, M. Udell, V. Cevher, "Fixed-rank approximation of a
        positive-semidefinite matrix from streaming data" (2017), arXiv:1706.05736.
    """
    image, probe = (
        lax.stop_gradient(x).astype(working_dtype(x.dtype)) for x in (image, probe)
    )
    eps = jnp.finfo(image.dtype).eps
    # A shift of rounding size, taken off again, holds the core away from singular.
    shift = eps * jnp.sqrt(jnp.sum(image**2))
    shifted = image + shift * probe
    core = cross(probe, shifted)
    values, vectors = eigh((core + core.T) / 2)
    floor = jnp.maximum(eps * values[-1], jnp.finfo(image.dtype).tiny)
    root = jnp.where(values > floor, lax.rsqrt(jnp.maximum(values, floor)), 0)
    basis, lengths, _ = svd(times(shifted, vectors * root[None, :]))
    return jnp.maximum(lengths**2 - shift, 0), basis

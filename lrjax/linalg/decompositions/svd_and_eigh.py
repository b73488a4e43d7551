"""The SVD and the eigendecomposition that every other room uses.

On TPU those of JAX take minutes to compile once a side is longer than 256: a recursion by
polar factors, each of them written out. Here an SVD is one polar factor in a loop and one
eigendecomposition, and that is Jacobi's, which the compiler knows as a whole. Elsewhere
they are LAPACK's and cuSOLVER's. A sharded matrix comes whole to one device first.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..._sharding import gathered
from .._numerics import cross, nonzero, times, working_dtype
from ..newton_schulz import NEWTON_SCHULZ, Polynomials, iterate_polynomials


def eigh(x: Float[Array, "*b n n"]) -> tuple[Float[Array, "*b n"], Float[Array, "*b n n"]]:
    """The eigenvalues of symmetric matrices, ascending, and their eigenvectors.

    Args:
        x: symmetric matrices ``(*b, n, n)``.

    Returns:
        Values ``(*b, n)`` and orthonormal columns ``(*b, n, n)``, in float32 or wider.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> lrjax.linalg.eigh(jnp.diag(jnp.array([3.0, 1.0])))[0].tolist()
        [1.0, 3.0]
    """
    return lax.platform_dependent(_whole(x), tpu=_jacobi, default=_library_eigh)


def _whole(x: Array) -> Array:
    """On one device, and in a dtype that has decompositions."""
    return gathered(x.astype(working_dtype(x.dtype)))


def _library_eigh(x: Array) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(x)
    return values, vectors


def _jacobi(x: Array) -> tuple[Array, Array]:
    vectors, values = lax.linalg.eigh(
        x, implementation=lax.linalg.EighImplementation.JACOBI
    )
    return values, vectors


def svd(
    x: Float[Array, "*b m n"],
) -> tuple[Float[Array, "*b m k"], Float[Array, "*b k"], Float[Array, "*b k n"]]:
    """The thin singular value decomposition ``x = U diag(σ) Vᵀ``, ``k = min(m, n)``.

    Args:
        x: matrices ``(*b, m, n)``.

    Returns:
        ``U (*b, m, k)`` and ``Vᵀ (*b, k, n)`` with orthonormal columns and rows, and the
        singular values ``(*b, k)`` in falling order; in float32 or wider.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> u, values, vt = lrjax.linalg.svd(jnp.array([[3.0], [4.0]]))
        >>> print(values)
        [5.]

    Reference:
        Y. Nakatsukasa, N. J. Higham, "Stable and efficient spectral divide and conquer
        algorithms for the symmetric eigenvalue decomposition and the SVD" (2013), SIAM
        Journal on Scientific Computing, for the SVD by a polar factor.
    """
    return lax.platform_dependent(_whole(x), tpu=svd_by_polar, default=_library_svd)


def _library_svd(x: Array) -> tuple[Array, Array, Array]:
    u, values, vt = jnp.linalg.svd(x, full_matrices=False)
    return u, values, vt


def singular_values(x: Float[Array, "*b m n"]) -> Float[Array, "*b k"]:
    """The singular values alone, in falling order, ``k = min(m, n)``.

    Args:
        x: matrices ``(*b, m, n)``.

    Returns:
        ``(*b, k)``, in float32 or wider.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.linalg.singular_values(jnp.array([[3.0], [4.0]])))
        [5.]
    """
    alone = lambda x: jnp.linalg.svd(x, compute_uv=False)
    by_polar = lambda x: svd_by_polar(x)[1]
    return lax.platform_dependent(_whole(x), tpu=by_polar, default=alone)


def svd_by_polar(x: Array) -> tuple[Array, Array, Array]:
    """``x = Q H`` with the polar factor ``Q``, and ``H = V Σ Vᵀ``: so ``U = Q V``."""
    if x.shape[-2] < x.shape[-1]:
        u, values, vt = svd_by_polar(x.mT)
        return vt.mT, values, u.mT
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    unit = x / nonzero(largest)
    norm = nonzero(jnp.sqrt(jnp.sum(unit**2, axis=(-2, -1), keepdims=True)))
    unit = unit / norm
    # The shift, of rounding size, leaves no singular value at zero: q is orthonormal.
    eps = float(jnp.finfo(x.dtype).eps)
    shift = 8 * eps * jnp.eye(*x.shape[-2:], dtype=x.dtype)
    shifted = unit + shift[(None,) * (x.ndim - 2)]
    q = iterate_polynomials(shifted, _steep(eps / 100))
    h = cross(q, unit)
    values, vectors = eigh((h + h.mT) / 2)
    values, vectors = jnp.maximum(values[..., ::-1], 0), vectors[..., ::-1]
    return times(q, vectors), values * (norm * largest)[..., 0], vectors.mT


def _steep(smallest: float) -> Polynomials:
    """Polynomials that take all of ``[smallest, 1]`` to one."""
    first, last = NEWTON_SCHULZ["muon"][0], NEWTON_SCHULZ["polar_express"]
    # The first has slope 3.44 at zero and never leaves [0, 1.25]; the others begin at 1e-3.
    steps = math.ceil(math.log(1.25e-3 / smallest, first[0]))
    a, b, c = first
    return (first,) * (steps - 1) + ((a / 1.25, b / 1.25, c / 1.25), *last)

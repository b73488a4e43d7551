from typing import Literal, NamedTuple

import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from ..._arguments import check_key
from .._numerics import check_rank, cross, times, working_dtype
from ..orthonormalize import orthonormalize
from .subspace_iteration import subspace_iteration
from .svd_and_eigh import svd


class TruncatedSVD(NamedTuple):
    """The leading singular triplets: ``x ≈ left @ diag(values) @ right.T``."""

    left: Float[Array, "*b m r"]
    values: Float[Array, "*b r"]
    right: Float[Array, "*b n r"]


def truncated_svd(
    x: Float[Array, "*b m n"],
    rank: int,
    *,
    method: Literal["exact", "randomized", "power"] = "exact",
    key: PRNGKeyArray | None = None,
    start: Float[Array, "*b n r"] | None = None,
    power_iters: int = 2,
    oversample: int = 8,
    precision: lax.PrecisionLike = lax.Precision.HIGHEST,
) -> TruncatedSVD:
    """The ``rank`` leading singular values and vectors of a matrix.

    - ``"exact"``: LAPACK's full SVD, then cut.
    - ``"randomized"``: Gaussian sketch of ``rank + oversample`` columns, ``power_iters``
      subspace iterations with re-orthonormalization, one small SVD.
    - ``"power"``: subspace iterations from a warm ``start`` (the right vectors of an
      earlier call, or any ``(n, rank)`` matrix) or from Gaussian columns; each costs
      two products with ``x``. The error in the subspace falls by
      ``(σ_{r+1}/σ_r)²`` an iteration.

    Args:
        x: matrices ``(*b, m, n)``.
        rank: number of triplets, at most ``min(m, n)``.
        method: algorithm, one of the above.
        key: for the random columns of ``"randomized"``, and of ``"power"`` without
            ``start``. The same columns serve every matrix of the batch.
        start: warm start of ``"power"``.
        power_iters: subspace iterations.
        oversample: extra sketch columns of ``"randomized"``.
        precision: of the products with ``x``; None for the one in force.

    Returns:
        ``left (*b, m, r)`` and ``right (*b, n, r)`` with orthonormal columns, ``values
        (*b, r)`` in descending order; float32 or wider. Not differentiated through.

    Raises:
        ValueError: rank out of range, unknown method, or neither key nor start given.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
        >>> lrjax.linalg.truncated_svd(x, 2).values.tolist()
        [3.0, 2.0]

    Reference:
        N. Halko, P.-G. Martinsson, J. A. Tropp, "Finding structure with randomness:
        probabilistic algorithms for constructing approximate matrix decompositions"
        (2011), arXiv 0909.4061.
    """
    check_key("truncated_svd", key)
    m, n = x.shape[-2:]
    check_rank(rank, x.shape)
    a = lax.stop_gradient(x).astype(working_dtype(x.dtype))
    if method == "exact":
        u, s, vt = svd(a)
        return TruncatedSVD(u[..., :rank], s[..., :rank], vt[..., :rank, :].mT)
    if method == "randomized":
        width = min(rank + oversample, m, n)
        basis = _gaussian(key, a, width)
    elif method == "power":
        width = rank
        basis = _gaussian(key, a, width) if start is None else start.astype(a.dtype)
    else:
        raise ValueError(
            f"method must be 'exact', 'randomized' or 'power', got {method!r}."
        )
    matmul, rmatmul = lambda v: times(a, v, precision), lambda u: cross(a, u, precision)
    basis = subspace_iteration(matmul, rmatmul, basis, steps=power_iters)
    image = orthonormalize(matmul(basis))
    u, s, vt = svd(rmatmul(image).mT)
    left = times(image, u)
    return TruncatedSVD(left[..., :rank], s[..., :rank], vt[..., :rank, :].mT)


def _gaussian(key: PRNGKeyArray | None, a: Array, width: int) -> Array:
    if key is None:
        raise ValueError("this method starts from random columns: pass key=, or start=.")
    columns = jr.normal(key, (a.shape[-1], width), a.dtype)
    return jnp.broadcast_to(columns, (*a.shape[:-2], *columns.shape))

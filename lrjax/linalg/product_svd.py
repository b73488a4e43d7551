from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._sharding import einsum
from .gram import working_dtype
from .orthonormalize import orthonormalize
from .truncated_svd import TruncatedSVD


def product_svd(
    left: Float[Array, "*b m k"],
    core: Float[Array, "*b k l"],
    right: Float[Array, "*b n l"],
    rank: int,
    *,
    method: Literal["cholesky", "qr"] = "cholesky",
) -> TruncatedSVD:
    """The leading singular triplets of ``left @ core @ right.T``, which is never formed.

    With orthonormal bases ``Q_l``, ``Q_r`` of the two tall factors only the small matrix
    ``(Q_lᵀ left) core (Q_rᵀ right)ᵀ`` is decomposed, in ``O((m + n) k²)`` for ``k ≈ l``.
    This is the truncation of every method that moves a matrix of fixed rank: with factors
    augmented by new directions, ``left = [U, A]`` and ``right = [V, B]``, a step along the
    tangent ``U Bᵀ + A Vᵀ`` has the core ``[[S, I], [I, 0]]``.

    Args:
        left: any tall factor, also with dependent or zero columns, of any scale.
        core: any matrix.
        right: like ``left``.
        rank: number of triplets.
        method: how the bases are found; ``"cholesky"`` keeps sharded rows in place, see
            :func:`lrjax.linalg.orthonormalize`.

    Returns:
        ``left (*b, m, r)``, ``values (*b, r)`` in descending order, ``right (*b, n, r)``;
        float32 or wider. Vectors of a zero singular value have a norm of at most one.
        Not differentiated through.

    Raises:
        ValueError: if the rank is larger than the product can have.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> left, right = jnp.array([[3.0], [4.0]]), jnp.array([[0.0], [0.5]])
        >>> print(lrjax.linalg.product_svd(left, jnp.eye(1), right, 1).values.round(4))
        [2.5]

    Reference:
        M. Brand, "Fast low-rank modifications of the thin singular value decomposition"
        (2006).
    """
    largest = min(left.shape[-2], *core.shape[-2:], right.shape[-2])
    if not 1 <= rank <= largest:
        raise ValueError(
            f"product_svd needs a rank between 1 and {largest} for factors of shapes "
            f"{left.shape}, {core.shape} and {right.shape}, got {rank}."
        )
    dtype = working_dtype(jnp.result_type(left, core, right))
    left, core, right = (lax.stop_gradient(x).astype(dtype) for x in (left, core, right))
    basis_l, small_l = _reduce(left, method)
    basis_r, small_r = _reduce(right, method)
    small = einsum("...pk,...kl->...pl", small_l, core)
    small = einsum("...pl,...ql->...pq", small, small_r)
    u, s, vt = jnp.linalg.svd(small, full_matrices=False)
    u, v = u[..., :rank], vt[..., :rank, :].mT
    if basis_l is not None:
        u = einsum("...mp,...pr->...mr", basis_l, u)
    if basis_r is not None:
        v = einsum("...nq,...qr->...nr", basis_r, v)
    return TruncatedSVD(u, s[..., :rank], v)


def _reduce(x: Array, method) -> tuple[Array | None, Array]:
    """``x = basis @ small``; no basis where the factor is not tall."""
    if x.shape[-1] >= x.shape[-2]:
        return None, x
    # New directions may be far smaller than old ones: a common scale would lose them.
    largest = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    unit = x / jnp.where(largest > 0, largest, 1)
    sizes = jnp.sqrt(jnp.sum(unit**2, axis=-2, keepdims=True))
    basis = orthonormalize(unit / jnp.where(sizes > 0, sizes, 1), method=method)
    return basis, einsum("...mp,...mk->...pk", basis, x)

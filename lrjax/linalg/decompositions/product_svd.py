from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._numerics import cross, outer, times, together, unit_columns, working_dtype
from ..gram import gram
from ..orthonormalize import cholesky_qr, cholesky_qr_of_both, orthonormalize
from .svd_and_eigh import svd
from .truncated_svd import TruncatedSVD


def product_svd(
    left: Float[Array, "*b m k"],
    core: Float[Array, "*b k l"] | None,
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
        core: any matrix; ``None`` for the identity.
        right: like ``left``.
        rank: number of triplets.
        method: how the bases are found; ``"cholesky"`` keeps sharded rows in place, see
            :func:`lrjax.linalg.orthonormalize`.

    Returns:
        ``left (*b, m, r)``, ``values (*b, r)`` in descending order, ``right (*b, n, r)``;
        float32 or wider. Vectors of a zero singular value have a norm of at most one.
        The values can be differentiated, the vectors count as constants.

    Raises:
        ValueError: if the rank is larger than the product can have.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> left, right = jnp.array([[3.0], [4.0]]), jnp.array([[0.0], [0.5]])
        >>> print(lrjax.linalg.product_svd(left, jnp.eye(1), right, 1).values.round(4))
        [2.5]

    Reference:
        M. Brand, "Fast low-rank modifications of the thin singular value decomposition"
        (2006), Linear Algebra and its Applications.
    """
    factors = [left, right] if core is None else [left, right, core]
    largest = min(min(x.shape[-2:]) for x in factors)
    if not 1 <= rank <= largest:
        shapes = ", ".join(str(x.shape) for x in factors)
        raise ValueError(
            f"product_svd needs a rank between 1 and {largest} for left, right and core of "
            f"shapes {shapes}; got {rank}."
        )
    if method not in ("qr", "cholesky"):
        raise ValueError(f"method must be 'qr' or 'cholesky', got {method!r}.")
    dtype = working_dtype(jnp.result_type(*factors))
    left, right, *between = (x.astype(dtype) for x in factors)
    (basis_l, small_l), (basis_r, small_r) = _reduce(left, right, method)
    small = outer(times(small_l, between[0]) if between else small_l, small_r)
    fixed = lax.stop_gradient(small)
    u, s, vt = svd(fixed)
    u, s, v = u[..., :rank], s[..., :rank], vt[..., :rank, :].mT
    # dσ = uᵀ dA v, also where values coincide and the derivative of an SVD is not finite.
    s = s + jnp.sum(u * times(small - fixed, v), axis=-2)
    u = u if basis_l is None else times(basis_l, u)
    v = v if basis_r is None else times(basis_r, v)
    return TruncatedSVD(u, s, v)


def _reduce(left: Array, right: Array, method) -> list[tuple[Array | None, Array]]:
    """``x = basis @ small`` of both factors; no basis where one is not tall."""
    tall = [x for x in (left, right) if x.shape[-1] < x.shape[-2]]
    # New directions may be far smaller than old ones: a common scale would lose them.
    bases = _bases([unit_columns(x) for x in tall], method)
    small = list(map(cross, bases, tall))
    if method == "cholesky" and tall:
        # Its columns are shorter than one by about r rounding errors: the coefficients are
        # corrected for that, or the product would shrink by as much at every truncation.
        corrected = lambda small, g: small + small - times(g, small)
        small = together(corrected, small, list(map(gram, bases)))
    found = iter(zip(bases, small, strict=True))
    return [next(found) if x.shape[-1] < x.shape[-2] else (None, x) for x in (left, right)]


def _bases(xs: list[Array], method) -> list[Array]:
    if method == "qr":
        return list(map(orthonormalize, xs))
    return list(cholesky_qr_of_both(*xs) if len(xs) == 2 else map(cholesky_qr, xs))

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from .._sharding import einsum, gathered, placed_like
from .gram import cholesky, gram, identity_like, working_dtype


# The shifts of the three passes, in units of the rounding error of the Gram matrix.
CHOLESKY_SHIFTS = (8.0, 8.0, 0.5)


def orthonormalize(
    x: Float[Array, "*b n r"], *, method: Literal["qr", "cholesky"] = "qr"
) -> Float[Array, "*b n r"]:
    """An orthonormal basis of the columns of a tall matrix, without sign ambiguity.

    ``"qr"``: Householder QR with the signs fixed so that ``diag(R) >= 0``. The basis is
    then a continuous function of a full-rank ``x``, the same on every backend. Always
    orthonormal, also for rank-deficient or zero ``x``.

    ``"cholesky"``: shifted Cholesky-QR. ``x ← x C⁻ᵀ`` with ``C Cᵀ = xᵀx + sI`` three
    times, the first with a shift ``s`` that keeps the factorization alive up to
    condition 1/eps. Matmuls on the tall side only, so that sharded rows stay sharded
    and nothing is gathered. Equal to ``"qr"`` for full-rank ``x`` (``diag(R) > 0``
    too); a null direction of ``x`` gives a column of norm at most one, not a
    unit column.

    Args:
        x: matrices ``(*b, n, r)`` with ``n >= r``.
        method: ``"qr"`` or ``"cholesky"``.

    Returns:
        ``(*b, n, r)`` in the dtype of ``x``, computed in float32 or wider. Not
        differentiated through: the input is a ``stop_gradient``.

    Raises:
        ValueError: if ``x`` is wider than tall, or the method is unknown.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> q = lrjax.linalg.orthonormalize(jnp.array([[2.0, 1.0], [0.0, -3.0]]))
        >>> (q + 0.0).tolist()
        [[1.0, 0.0], [0.0, -1.0]]

    Reference:
        T. Fukaya, R. Kannan, Y. Nakatsukasa, Y. Yamamoto, Y. Yanagisawa, "Shifted
        Cholesky QR for computing the QR factorization of ill-conditioned matrices"
        (2020), arXiv 1809.11085.
    """
    n, r = x.shape[-2:]
    if n < r:
        raise ValueError(
            f"orthonormalize needs a tall matrix (rows >= columns), got shape {x.shape}."
        )
    a = lax.stop_gradient(x).astype(working_dtype(x.dtype))
    # Sums of squares must neither vanish nor overflow, where LAPACK's QR never returns.
    largest = jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True)
    a = a / jnp.where(largest > 0, largest, 1)
    if method == "qr":
        q, upper = jnp.linalg.qr(gathered(a))
        diagonal = jnp.diagonal(upper, axis1=-2, axis2=-1)
        q = q * jnp.where(diagonal < 0, -1, 1).astype(q.dtype)[..., None, :]
        q = placed_like(q, a)
    elif method == "cholesky":
        q = a
        for shift in CHOLESKY_SHIFTS:
            q = cholesky_pass(q, shift)
    else:
        raise ValueError(f"method must be 'qr' or 'cholesky', got {method!r}.")
    return q.astype(x.dtype)


def cholesky_pass(x: Array, shift: ArrayLike) -> Array:
    """One pass ``x C⁻ᵀ``, ``C Cᵀ = xᵀx + shift·eps·tr(xᵀx) I``, of Cholesky QR."""
    g = gram(x)
    trace = jnp.trace(g, axis1=-2, axis2=-1)
    s = shift * jnp.finfo(g.dtype).eps * jnp.where(trace > 0, trace, 1)
    identity = identity_like(g)
    lower = cholesky(g + s[..., None, None] * identity)
    # Inverting the small factor and multiplying keeps the rows of x where they are; a
    # triangular solve against x would gather them.
    inverse = lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
    return einsum("...nr,...sr->...ns", x, inverse)

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from .._sharding import by_compiler, gathered, placed_like, sharding_along
from ._numerics import SMALL, cross, identity_like, nonzero, outer, together, working_dtype
from .gram import cholesky, gram


# The shifts of the three passes, in units of the rounding error of the Gram matrix.
CHOLESKY_SHIFTS = (8.0, 8.0, 0.5)


def orthonormalize(
    x: Float[Array, "*b n r"],
    *,
    method: Literal["qr", "cholesky"] = "qr",
    against: Float[Array, "*b n s"] | None = None,
    precision: lax.PrecisionLike = lax.Precision.HIGHEST,
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
        method: algorithm, one of the above.
        against: if given, orthonormal columns ``(*b, n, s)``, some of which may be zero:
            the basis is that of the part of ``x`` in their orthogonal complement.
        precision: of the products with ``against``; None for the one in force. The basis
            is orthogonal to them to that precision, and to itself at full precision.

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
    if method not in ("qr", "cholesky"):
        raise ValueError(f"method must be 'qr' or 'cholesky', got {method!r}.")
    a = lax.stop_gradient(x).astype(working_dtype(x.dtype))
    # Sums of squares must neither vanish nor overflow, where LAPACK's QR never returns.
    a = a / nonzero(jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True))
    if against is not None:
        against = lax.stop_gradient(against).astype(a.dtype)
    if method == "cholesky":
        q = cholesky_qr(a, against, precision)
    elif against is None:
        q = _householder(a)
    else:
        # Twice is enough for the projection: the first one leaves rounding errors of the
        # size of what it removed, the second those of what remains.
        q = lax.fori_loop(0, 2, lambda _, x: _householder(_off(x, against, precision)), a)
    return q.astype(x.dtype)


@functools.partial(jax.jit, static_argnums=2)  # traced once for leaves of one shape
def cholesky_qr(
    x: Array,
    against: Array | None = None,
    precision: lax.PrecisionLike = lax.Precision.HIGHEST,
) -> Array:
    """The passes of Cholesky QR, which take turns with the projection off ``against``.

    The squares of ``x`` have to be representable, as those of columns of unit length are.

    In a loop: unrolled they take three times as long to compile.
    """
    off = (lambda x: x) if against is None else lambda x: _off(x, against, precision)
    shifts = jnp.array(CHOLESKY_SHIFTS, x.dtype)
    one_pass = lambda k, x: cholesky_pass(off(x), shifts[k])
    return lax.fori_loop(0, len(CHOLESKY_SHIFTS), one_pass, x)


@jax.jit
def cholesky_qr_of_both(x: Array, y: Array) -> tuple[Array, Array]:
    """:func:`cholesky_qr` of two matrices, in one loop."""
    shifts = jnp.array(CHOLESKY_SHIFTS, x.dtype)
    one_pass = lambda k, both: _passes(both, shifts[k])
    return lax.fori_loop(0, len(CHOLESKY_SHIFTS), one_pass, (x, y))


def _off(x: Array, against: Array, precision: lax.PrecisionLike) -> Array:
    """What is left of ``x`` outside the span of orthonormal columns."""
    # The thin factor first: XLA on CPU is several times slower the other way round.
    return x - outer(against, cross(x, against, precision), precision)


def _householder(x: Array) -> Array:
    whole = gathered(x)
    layers = sharding_along(whole, tuple(range(x.ndim - 2)))
    q, upper = by_compiler(_qr, whole, out=layers)
    diagonal = jnp.diagonal(upper, axis1=-2, axis2=-1)
    q = q * jnp.where(diagonal < 0, -1, 1).astype(q.dtype)[..., None, :]
    return placed_like(q, x)


def _qr(x: Array) -> tuple[Array, Array]:
    """The QR factorization; of many large matrices on a GPU one after the other.

    JAX may hand a batch to a kernel of cuBLAS that is for small matrices: with 16 of
    2048 × 2048 a step of SOAP took 20 s on an H100.
    """
    if x.shape[-2] <= 2 * SMALL:
        q, upper = jnp.linalg.qr(x)
    else:
        q, upper = lax.platform_dependent(x, cuda=_one_by_one, default=jnp.linalg.qr)
    return q, upper


def _one_by_one(x: Array) -> tuple[Array, Array]:
    factorize = jax.custom_batching.sequential_vmap(lambda x: jnp.linalg.qr(x))
    for _ in range(x.ndim - 2):
        factorize = jax.vmap(factorize)
    return factorize(x)


def cholesky_pass(x: Array, shift: ArrayLike) -> Array:
    """One pass ``x C⁻ᵀ``, ``C Cᵀ = xᵀx + shift·eps·tr(xᵀx) I``, of Cholesky QR."""
    return _passes((x,), shift)[0]


def _passes(xs: tuple[Array, ...], shift: ArrayLike) -> tuple[Array, ...]:
    def inverse(g):
        identity = identity_like(g)
        trace = jnp.sum(g * identity, axis=(-2, -1))
        s = shift * jnp.finfo(g.dtype).eps * nonzero(trace)
        lower = cholesky(g + s[..., None, None] * identity)
        # Inverting the small factor and multiplying keeps the rows of x where they are; a
        # triangular solve against x would gather them.
        return lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)

    inverses = together(inverse, list(map(gram, xs)))
    return tuple(map(outer, xs, inverses))

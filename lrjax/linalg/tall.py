"""Tall matrices whose rows are all numbers of a tree of arrays.

A vector is the list of the leaves of a tree, and a matrix of ``r`` such vectors a list of
leaves with one more axis of length ``r``: no leaf is reshaped, so that all keep their
sharding.
"""

import functools
import operator
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._sharding import einsum
from ._numerics import identity_like, nonzero, working_dtype
from .decompositions import svd
from .gram import cholesky
from .orthonormalize import CHOLESKY_SHIFTS


def tall_inner(
    tall: Sequence[Float[Array, "..."]], x: Sequence[Float[Array, "..."]]
) -> Float[Array, " r"]:
    """``Tᵀ x (r,)``."""
    pairs = zip(tall, x, strict=True)
    return _total([einsum(f"{_axes(y)}r,{_axes(y)}->r", t, y) for t, y in pairs])


def tall_gram(
    x: Sequence[Float[Array, "..."]], y: Sequence[Float[Array, "..."]]
) -> Float[Array, "r s"]:
    """``Xᵀ Y (r, s)``."""
    axes = [_axes(a)[1:] for a in x]
    triples = zip(axes, x, y, strict=True)
    return _total([einsum(f"{axis}r,{axis}s->rs", a, b) for axis, a, b in triples])


def tall_apply(
    tall: Sequence[Float[Array, "..."]], small: Float[Array, " r"]
) -> list[Float[Array, "..."]]:
    """``T c`` for ``c (r,)``."""
    return [einsum("...r,r->...", t, small) for t in tall]


def tall_mix(
    tall: Sequence[Float[Array, "..."]], small: Float[Array, "r s"]
) -> list[Float[Array, "..."]]:
    """``T K`` for ``K (r, s)``."""
    return [einsum("...r,rs->...s", t, small) for t in tall]


def tall_svd(
    tall: Sequence[Float[Array, "..."]],
) -> tuple[list[Float[Array, "..."]], Float[Array, " k"], Float[Array, "k r"]]:
    """The singular value decomposition ``T = U diag(σ) Vᵀ`` of a tall matrix in leaves.

    A single matrix has that of :func:`svd`. Of several leaves the Gram matrices alone meet:
    three passes of shifted Cholesky QR, and the decomposition of the small factor. There a
    null direction may have a column of U that is shorter than one.

    Args:
        tall: leaves with a last axis of length ``r``.

    Returns:
        The leaves of ``U`` with a last axis of length ``k``, ``σ (k,)``, falling, and
        ``Vᵀ (k, r)``, with ``k`` at most ``r``; in float32 or wider.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> leaves = [jnp.array([[3.0, 0.0]]), jnp.array([[[4.0, 0.0]], [[0.0, 2.0]]])]
        >>> u, values, vt = lrjax.linalg.tall_svd(leaves)
        >>> print(values.round(4), [x.shape for x in u])
        [5. 2.] [(1, 2), (2, 1, 2)]
    """
    tall = [x.astype(working_dtype(x.dtype)) for x in tall]
    if len(tall) == 1 and tall[0].ndim == 2:
        u, values, vt = svd(tall[0])
        return [u], values, vt
    q = _orthonormalize(tall)
    left, values, vt = svd(tall_gram(q, tall))
    return tall_mix(q, left), values, vt


def _orthonormalize(tall: Sequence[Array]) -> list[Array]:
    # Sums of squares must neither vanish nor overflow, nor a short column hide behind a
    # long one.
    columns = lambda f, x: f(x, axis=tuple(range(x.ndim - 1)))
    largest = functools.reduce(jnp.maximum, [columns(jnp.max, jnp.abs(x)) for x in tall])
    tall = [_columns_times(x, 1 / nonzero(largest)) for x in tall]
    squares = _total([columns(jnp.sum, x**2) for x in tall])
    tall = [_columns_times(x, lax.rsqrt(nonzero(squares))) for x in tall]
    shifts = jnp.array(CHOLESKY_SHIFTS, jnp.result_type(*tall))

    def one_pass(k, x):
        g = tall_gram(x, x)
        identity = identity_like(g)
        shift = shifts[k] * jnp.finfo(g.dtype).eps * nonzero(jnp.sum(g * identity))
        lower = cholesky(g + shift * identity)
        inverse = lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
        return tall_mix(x, inverse.T)

    return lax.fori_loop(0, len(CHOLESKY_SHIFTS), one_pass, tall)


def _columns_times(x: Array, scale: Array) -> Array:
    return einsum("...r,r->...r", x, scale)


def _total(parts: list[Array]) -> Array:
    return functools.reduce(operator.add, parts)


def _axes(x: Array) -> str:
    return "abcdefghijkl"[: x.ndim]

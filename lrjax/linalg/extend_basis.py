from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ._numerics import cross, times, unit_columns, working_dtype
from .orthonormalize import orthonormalize


def extend_basis(
    basis: Float[Array, "*b n w"],
    directions: Float[Array, "*b n s"],
    *,
    active: Int[Array, "*b"] | None = None,
    used: Int[Array, "*b"] | None = None,
    width: int | None = None,
    method: Literal["qr", "cholesky"] = "qr",
) -> Float[Array, "*b n k"]:
    """Orthonormal columns that go on where a basis ends, until they span directions too.

    The first columns are the basis itself, the next ones ``orth((I − U Uᵀ) D)``. Where not
    all columns are in use, those that are get packed to the front, ``U[:, :active]`` and
    then the new ones; behind them are any orthonormal columns. A column that is not in use
    amid the others would get an arbitrary direction, into which the later ones leak.

    Args:
        basis: orthonormal columns ``U (*b, n, w)``.
        directions: ``D (*b, n, s)`` of any scale, also dependent or zero.
        active: ``(*b,)`` integers, how many columns of ``U`` are in use; all by default.
        used: likewise of ``D``.
        width: of the result, ``w + s`` by default, and at most ``n``. Directions that have
            no room are left out, the last ones first.
        method: how the basis is found, see :func:`lrjax.linalg.orthonormalize`.

    Returns:
        ``(*b, n, min(width, n))`` in the dtype of ``basis``. Not differentiated through.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> basis, directions = jnp.eye(3)[:, :1], jnp.array([[4.0], [0.0], [0.1]])
        >>> print(lrjax.linalg.extend_basis(basis, directions).T + 0.0)
        [[1. 0. 0.]
         [0. 0. 1.]]

    Reference:
        G. Ceruti, J. Kusch, C. Lubich, "A rank-adaptive robust integrator for dynamical
        low-rank approximation" (2022), arXiv 2104.05247.
    """
    dtype = working_dtype(basis.dtype)
    (n, w), s = basis.shape[-2:], directions.shape[-1]
    width = min(w + s if width is None else width, n)
    old, new = basis.astype(dtype), unit_columns(directions.astype(dtype))
    if active is None and used is None:
        put = lambda old, new: lax.concatenate([old, new], old.ndim - 1)[..., :width]
    else:
        full = lambda count: jnp.full(basis.shape[:-2], count, jnp.int32)
        active = full(w) if active is None else active
        used = full(s) if used is None else used
        put = lambda old, new: _packed(old, new, active, used)[..., :width]
    if method == "cholesky" and w + s <= n:
        # Half the width to decompose; what is not in use must not be projected off.
        old = old if active is None else jnp.where(_before(active, old), old, 0)
        old = _nearly_orthonormal(old)
        both = put(old, orthonormalize(new, method=method, against=old))
    else:
        both = orthonormalize(put(old, new), method=method)
    return both.astype(basis.dtype)


def _packed(
    old: Array, new: Array, active: Int[Array, "*b"], used: Int[Array, "*b"]
) -> Array:
    """``[old[:, :active] | new[:, :used] | zeros]``, as wide as both together."""
    place = lambda x, y, k: lax.dynamic_update_slice_in_dim(x, y, k, axis=1)
    for _ in range(old.ndim - 2):
        place = jax.vmap(place)
    both = place(lax.concatenate([old, jnp.zeros_like(new)], old.ndim - 1), new, active)
    return jnp.where(_before(active + used, both), both, 0)


def _before(count: Int[Array, "*b"], x: Array) -> Array:
    """Which columns come before the one of this number."""
    column = lax.broadcasted_iota(jnp.int32, (*x.shape[:-2], 1, x.shape[-1]), x.ndim - 1)
    return column < count[..., None, None]


def _nearly_orthonormal(x: Array) -> Array:
    """``x (3 − xᵀx) / 2``: the error of orthonormal columns is squared."""
    return 1.5 * x - 0.5 * times(x, cross(x, x))

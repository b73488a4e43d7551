from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ._numerics import times, unit_columns, working_dtype
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
    columns = [basis.astype(dtype), unit_columns(directions.astype(dtype))]
    both = lax.concatenate(columns, basis.ndim - 1)
    if active is None and used is None:
        both = both[..., :width]
    else:
        full = lambda count: jnp.full(basis.shape[:-2], count, jnp.int32)
        active = full(w) if active is None else active
        used = full(s) if used is None else used
        both = times(both, _packing(active, used, w, s, width).astype(dtype))
    return orthonormalize(both, method=method).astype(basis.dtype)


def _packing(active: Array, used: Array, w: int, s: int, width: int) -> Array:
    """Zeros and ones ``(*b, w + s, width)`` that bring the columns in use to the front.

    A product keeps the rows of a sharded factor where they are.
    """
    active, used = active[..., None, None], used[..., None, None]
    shape = (*active.shape[:-2], w + s, width)
    old, new = (lax.broadcasted_iota(jnp.int32, shape, len(shape) - k) for k in (2, 1))
    of_basis = (old == new) & (new < active)
    of_directions = (old == new - active + w) & (new >= active) & (new < active + used)
    return of_basis | of_directions

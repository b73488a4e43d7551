"""How one node gets wider bases, and comes back to its width: a matrix, or a tensor."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from ....linalg import cross, outer, rounding
from ....lowrank import (
    LowRank,
    SVDForm,
    TuckerForm,
    augment,
    multiply_axes,
    project_to_tangent,
    truncate,
    tucker_augment,
    tucker_tangent,
    tucker_truncate,
)


def widened_node(x: Any, gradient: Any, times: int) -> tuple[Any, Array]:
    """A node in bases that hold its tangent, and the tangent in their coordinates.

    Args:
        x: the node, masked.
        gradient: of its core and its bases.
        times: how many times the width of the node there is room for.
    """
    if isinstance(x, TuckerForm):
        return _widened_tensor(x, gradient, times)
    tangent = project_to_tangent(x, gradient)
    wide = augment(
        x,
        tangent.left,
        tangent.right,
        used=x.active,
        width=times * x.left.shape[-1],
        method="cholesky",
    )
    return wide, _seen(tangent, x, wide)


def narrowed_node(x: Any, start: Any, tol: ArrayLike) -> Any:
    """Truncated by the tolerance, and to the width of the node at the start."""
    if isinstance(x, TuckerForm):
        return tucker_truncate(x, tol=tol, widths=start.widths)
    return truncate(x, start.left.shape[-1], tol=tol)


def _seen(tangent: LowRank, x: SVDForm, wide: SVDForm) -> Array:
    """A tangent at ``x`` in the wider bases; what is zero but for rounding is zero.

    Adam would make whole steps of it.
    """
    left = outer(cross(wide.left, tangent.left), cross(wide.right, x.right))
    right = outer(cross(wide.left, x.left), cross(wide.right, tangent.right))
    slope = left + right
    sums = lambda axis: jnp.sum(slope**2, axis=axis, keepdims=True)
    floor = rounding(slope.dtype, max(x.shape[-2:])) ** 2 * sums((-2, -1))
    place = lax.broadcasted_iota(jnp.int32, slope.shape, slope.ndim - 1)
    column = place >= jnp.asarray(x.active)[..., None, None]
    row = column.mT
    nothing = (row & column) | (row & (sums(-1) <= floor)) | (column & (sums(-2) <= floor))
    return jnp.where(nothing, 0, slope)


def _widened_tensor(
    x: TuckerForm, gradient: TuckerForm, times: int
) -> tuple[TuckerForm, Array]:
    tangent = tucker_tangent(x, gradient)
    new = [u[..., w:] for u, w in zip(tangent.factors, x.widths, strict=True)]
    widths = tuple(times * w for w in x.widths)
    wide = tucker_augment(x, new, widths=widths, method="cholesky")
    overlaps = tuple(map(cross, wide.factors, tangent.factors))
    return wide, _without_rounding(multiply_axes(tangent.core, overlaps), x)


def _without_rounding(slope: Array, x: TuckerForm) -> Array:
    """As of a matrix: what is new along two axes is zero, and what is rounding alone."""
    first = slope.ndim - len(x.factors)
    axes = tuple(range(first, slope.ndim))
    sums = lambda axes: jnp.sum(slope**2, axis=axes, keepdims=True)
    floor = rounding(slope.dtype, max(x.shape[first:])) ** 2 * sums(axes)
    new, nothing = jnp.zeros(slope.shape, jnp.int32), jnp.zeros(slope.shape, bool)
    for k, axis in enumerate(axes):
        rank = jnp.asarray(x.active)[(..., k, *[None] * len(axes))]
        fresh = lax.broadcasted_iota(jnp.int32, slope.shape, axis) >= rank
        new = new + fresh
        nothing = nothing | (fresh & (sums(axes[:k] + axes[k + 1 :]) <= floor))
    return jnp.where(nothing | (new > 1), 0, slope)

"""The tangent space of the matrices of a rank: projection, retraction, transport."""

from collections.abc import Callable
from typing import overload

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from ..linalg import (
    TruncatedSVD,
    cross,
    gram,
    identity_like,
    inverse_grams,
    nonzero,
    product_svd,
    svd,
    times,
    working_dtype,
)
from .algebra import turned_to
from .nodes import LowRank, SVDForm
from .truncation import check_not_wider, diagonal_form


def project_to_tangent(
    x: LowRank | SVDForm,
    gradient: LowRank | SVDForm,
    damping: ArrayLike = 0.0,
    *,
    relative: bool = True,
) -> LowRank:
    """The step of two factors that moves their product along the projected gradient.

    Given ``G_l = G right`` and ``G_r = Gᵀ left`` for a gradient G of the product, which is
    never formed::

        P_l = (I − ½ Π_l) G_l (rightᵀright)⁻¹        P_r = (I − ½ Π_r) G_r (leftᵀleft)⁻¹

    with the projections ``Π_l`` and ``Π_r`` on the columns of the two factors. So
    ``P_l rightᵀ + left P_rᵀ = Π_l G + G Π_r − Π_l G Π_r``, the projection of G onto the
    tangent space of the matrices of this rank. The factors of an :class:`SVDForm` are
    orthonormal, so that there is nothing to invert and nothing to damp; and as gradient it
    also takes that of its three factors, ``G V Sᵀ``, ``Uᵀ G V`` and ``Gᵀ U S``, which
    autodiff gives. ``S`` is divided out column by column, exactly where it is diagonal: no
    singular value is too small but zero, whose columns only move inside.

    Args:
        x: the factors, ``(*batch, m, n)``; columns that are not in use count for nothing.
        gradient: ``G_l`` and ``G_r``; or the gradient of the factors of an SVDForm.
        damping: added to the Gram matrices, see :func:`lrjax.linalg.inverse_gram`.
        relative: if True, ``damping`` multiplies their mean diagonal; if False it is
            absolute.

    Returns:
        ``P_l`` and ``P_r``, in float32 or wider.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.array([[3.0], [4.0]]), jnp.array([[2.0]]))
        >>> gradient = lrjax.LowRank(jnp.array([[4.0], [8.0]]), jnp.array([[50.0]]))
        >>> step = lrjax.lowrank.project_to_tangent(x, gradient)
        >>> print(step.left.ravel().round(4), step.right.round(4))
        [0.34 1.12] [[1.]]

    Reference:
        B. Vandereycken, "Low-rank matrix completion by Riemannian optimization" (2013),
        arXiv 1209.3834.
    """
    if isinstance(x, SVDForm):
        return _projected(x, gradient)
    left, right = inverse_grams(x.left, x.right, damping=damping, relative=relative)
    return LowRank(
        _half_projected(gradient.left, x.left, left, right),
        _half_projected(gradient.right, x.right, right, left),
    )


def _half_projected(gradient: Array, factor: Array, own: Array, other: Array) -> Array:
    """``(I − ½ factor own factorᵀ) gradient other``."""
    gradient, factor = gradient.astype(own.dtype), factor.astype(own.dtype)
    inside = times(own, cross(factor, gradient))
    return times(gradient - 0.5 * times(factor, inside), other)


def _projected(x: SVDForm, gradient: LowRank | SVDForm) -> LowRank:
    """``(I − U Uᵀ) G V + ½ U (Uᵀ G V)``, and the same of the transpose."""
    dtype = working_dtype(x.dtype)
    u, v = (x.mask_columns(side).astype(dtype) for side in (x.left, x.right))
    left = x.mask_columns(gradient.left).astype(dtype)
    right = x.mask_columns(gradient.right).astype(dtype)
    if isinstance(gradient, SVDForm):
        core = lax.stop_gradient(x.masked_core().astype(dtype))
        p, _, qt = svd(core)
        # LAPACK lifts values below the rounding of the largest, also of a diagonal matrix.
        values = jnp.sum(p * times(core, qt.mT), axis=-2)
        left, right = (
            times(divided(left, p, values), qt),
            times(divided(right, qt.mT, values), p.mT),
        )
        inner = SVDForm(u, gradient.core.astype(dtype), v, x.active).masked_core()
        inner_left, inner_right = inner, inner.mT
    else:
        inner_left, inner_right = cross(u, left), cross(v, right)
    half = lambda basis, side, inner: side + times(basis, 0.5 * inner - cross(basis, side))
    return LowRank(half(u, left, inner_left), half(v, right, inner_right))


def divided(
    x: Float[Array, "*b n r"], p: Float[Array, "*b r k"], values: Float[Array, "*b k"]
) -> Float[Array, "*b n k"]:
    """``x p diag(values)⁻¹``; what is rounding alone becomes zero."""
    turned = times(x, p)
    size = lambda columns: jnp.max(jnp.abs(columns), axis=-2, keepdims=True)
    noise = 4 * jnp.finfo(x.dtype).eps * times(size(x), jnp.abs(p))
    values = values[..., None, :]
    known = (size(turned) > noise) & (values != 0)
    return turned * jnp.where(known, 1 / jnp.where(known, values, 1), 0)


def relative_step(
    x: LowRank, step: LowRank, *, reduce: Callable[[Array], Array] | None = None
) -> Float[Array, "*batch"]:
    """How far a step of the factors moves their product, to first order, over its norm.

    ``‖dL Rᵀ + L dRᵀ‖_F / ‖L Rᵀ‖_F`` from ``r × r`` Gram matrices. A zero matrix counts
    as one of norm one.

    Args:
        x: the factors ``L`` and ``R``.
        step: ``dL`` and ``dR``.
        reduce: if the rows of ``left`` are spread over the devices of a ``shard_map``,
            what sums over them: ``lambda x: jax.lax.psum(x, "rows")``.

    Returns:
        ``(*batch,)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.full((3, 1), 2.0), jnp.ones((2, 1)))
        >>> step = lrjax.LowRank(jnp.ones((3, 1)), jnp.zeros((2, 1)))
        >>> print(lrjax.lowrank.relative_step(x, step))
        0.5
    """
    over_rows = (lambda product: product) if reduce is None else reduce
    gram_left, gram_right = over_rows(gram(x.left)), gram(x.right)
    inner = lambda a, b: jnp.sum(a * b, axis=(-2, -1))
    square = inner(over_rows(gram(step.left)), gram_right)
    square += inner(gram_left, gram(step.right))
    # The two halves of a step may undo part of each other.
    square += 2 * inner(over_rows(cross(x.left, step.left)), cross(step.right, x.right))
    size = inner(gram_left, gram_right)
    return jnp.sqrt(jnp.maximum(square, 0) / nonzero(size))


@overload
def retraction(x: LowRank, step: LowRank) -> LowRank: ...
@overload
def retraction(x: SVDForm, step: LowRank) -> SVDForm: ...
def retraction(x, step):
    """Move a product along its tangent, and back to the nearest matrix of its rank.

    ``SVD_r(X + A rightᵀ + left Bᵀ)`` for the step ``(A, B)`` of the factors of ``X = left
    @ right.T`` of width ``r``: the metric-projection retraction. The new factors are
    balanced, and of all balanced ones those nearest to the old. Of an :class:`SVDForm`
    the outer factors move, and the new core is diagonal. ``O((m + n) r²)`` and an SVD of a
    ``2r × 2r`` matrix.

    Args:
        x: the factors, ``(*batch, m, n)``; columns that are not in use count for nothing.
        step: ``A`` and ``B``.

    Returns:
        The new factors, in float32 or wider.

    Raises:
        ValueError: for factors that are wider than the matrix.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.array([[2.0], [0.0]]), jnp.array([[2.0], [0.0]]))
        >>> step = lrjax.LowRank(jnp.array([[1.0], [0.0]]), jnp.array([[1.0], [0.0]]))
        >>> print(lrjax.lowrank.retraction(x, step).materialize().round(4) + 0.0)
        [[8. 0.]
         [0. 0.]]

    Reference:
        P.-A. Absil, I. V. Oseledets, "Low-rank retractions: a survey and new results"
        (2015), Computational Optimization and Applications. Special case: 4 + 2 + 2
        above, where the factors by themselves give 9.
    """
    check_not_wider("retraction", x)
    if isinstance(x, SVDForm):
        new = _first_order_svd(x, step)
        return diagonal_form(new, x.active, new.values.dtype)
    return _nearest_factors(_first_order_svd(x, step), x)


def _first_order_svd(x: LowRank | SVDForm, step: LowRank) -> TruncatedSVD:
    shape = (*x.shape[:-2], x.left.shape[-1], x.left.shape[-1])
    none = jnp.zeros(shape, jnp.result_type(x.dtype, step.dtype))
    identity = core = identity_like(none)
    if isinstance(x, SVDForm):
        identity, core = x.mask_columns(identity), x.masked_core().astype(none.dtype)
    beside = lambda a, b: lax.concatenate([a, b], a.ndim - 1)
    core = lax.concatenate([beside(core, identity), beside(identity, none)], core.ndim - 2)
    left = beside(x.left, step.left.astype(x.dtype))
    right = beside(x.right, step.right.astype(x.dtype))
    return product_svd(left, core, right, shape[-1])


def transport(x: SVDForm, step: LowRank, new: SVDForm) -> LowRank:
    """A tangent at one matrix, projected on the tangent space at another.

    A step ``(A, B)`` stands for ``Z = A rightᵀ + left Bᵀ``; at ``new`` it becomes the
    :func:`project_to_tangent` of ``Z``, which is never formed. So momentum follows a point
    that moves among the matrices of a rank.

    Args:
        x: where the step is tangent, ``(*batch, m, n)``.
        step: ``A`` and ``B``.
        new: a matrix of the same shape and width.

    Returns:
        The step of the factors of ``new``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> eye = jnp.eye(3)
        >>> x = lrjax.SVDForm(eye[:, :1], jnp.ones((1, 1)), eye[:, :1])
        >>> new = lrjax.SVDForm(eye[:, 1:2], jnp.ones((1, 1)), eye[:, :1])
        >>> step = lrjax.LowRank(jnp.array([[1.0], [2.0], [3.0]]), jnp.zeros((3, 1)))
        >>> print(lrjax.lowrank.transport(x, step, new).left.T)  # half of the inside
        [[1. 1. 3.]]

    Reference:
        B. Vandereycken, "Low-rank matrix completion by Riemannian optimization" (2013),
        arXiv 1209.3834.
    """
    # Of both columns, those in use alone.
    a, b = x.mask_columns(step.left), x.mask_columns(step.right)
    left = times(a, cross(x.right, new.right)) + times(x.left, cross(b, new.right))
    right = times(x.right, cross(a, new.left)) + times(b, cross(x.left, new.left))
    return project_to_tangent(new, LowRank(left, right))


def _nearest_factors(new: TruncatedSVD, old: LowRank) -> LowRank:
    """Balanced factors of an SVD, turned within their freedom towards old ones."""
    root = jnp.sqrt(new.values)[..., None, :]
    return turned_to(LowRank(new.left * root, new.right * root), old)

"""Back to a smaller rank, and the tangent space of the matrices of a rank."""

from collections.abc import Callable

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
    procrustes,
    product_svd,
    times,
)
from .nodes import LowRank, Matrix, factors_of


def truncate(x: Matrix, rank: int) -> LowRank:
    """The best approximation of a factorized matrix of a smaller rank.

    Args:
        x: ``(*batch, m, n)`` of width at least ``rank``; or a dense matrix.
        rank: the width of the result.

    Returns:
        A balanced :class:`LowRank`: ``leftᵀleft = rightᵀright`` is diagonal.

    Raises:
        ValueError: if ``rank`` is not between 1 and the width of ``x``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(2))
        >>> lrjax.truncate(x, 1).materialize().round(4).tolist()
        [[4.0, 0.0], [0.0, 0.0]]

    Reference:
        C. Eckart, G. Young, "The approximation of one matrix by another of lower rank"
        (1936), Psychometrika.
    """
    x = factors_of("truncate", x)
    if not 1 <= rank <= x.rank:
        raise ValueError(f"rank must be between 1 and the width {x.rank}, got {rank}.")
    check_not_wider("truncate", x)
    left, values, right = product_svd(x.left, None, x.right, rank)
    root = jnp.sqrt(values)[..., None, :]
    # Singular vectors have a common sign to choose; the sum of both is symmetric in them.
    total = jnp.sum(left, axis=-2, keepdims=True) + jnp.sum(right, axis=-2, keepdims=True)
    root = jnp.where(total < 0, -root, root)
    return LowRank((left * root).astype(x.dtype), (right * root).astype(x.dtype))


def project_to_tangent(
    x: LowRank, gradient: LowRank, damping: ArrayLike = 0.0, *, relative: bool = True
) -> LowRank:
    """The step of two factors that moves their product along the projected gradient.

    Given ``G_l = G right`` and ``G_r = Gᵀ left`` for a gradient G of the product, which is
    never formed::

        P_l = (I − ½ Π_l) G_l (rightᵀright)⁻¹        P_r = (I − ½ Π_r) G_r (leftᵀleft)⁻¹

    with the projections ``Π_l`` and ``Π_r`` on the columns of the two factors. So
    ``P_l rightᵀ + left P_rᵀ = Π_l G + G Π_r − Π_l G Π_r``, the projection of G onto the
    tangent space of the matrices of this rank.

    Args:
        x: the factors, ``(*batch, m, n)``.
        gradient: ``G_l`` and ``G_r``.
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


def retraction(x: LowRank, step: LowRank) -> LowRank:
    """Move a product along its tangent, and back to the nearest matrix of its rank.

    ``SVD_r(X + A rightᵀ + left Bᵀ)`` for the step ``(A, B)`` of the factors of ``X = left
    @ right.T`` of width ``r``: the metric-projection retraction. The new factors are
    balanced, and of all balanced ones those nearest to the old.
    ``O((m + n) r²)`` and an SVD of a ``2r × 2r`` matrix.

    Args:
        x: the factors, ``(*batch, m, n)``.
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
    return _nearest_factors(_first_order_svd(x, step), x)


def _first_order_svd(x: LowRank, step: LowRank) -> TruncatedSVD:
    shape = (*x.shape[:-2], x.rank, x.rank)
    none = jnp.zeros(shape, jnp.result_type(x.dtype, step.dtype))
    identity = identity_like(none)
    beside = lambda a, b: lax.concatenate([a, b], a.ndim - 1)
    core = lax.concatenate(
        [beside(identity, identity), beside(identity, none)], identity.ndim - 2
    )
    left = beside(x.left, step.left.astype(x.dtype))
    return product_svd(left, core, beside(x.right, step.right.astype(x.dtype)), x.rank)


def _nearest_factors(new: TruncatedSVD, old: LowRank) -> LowRank:
    """Balanced factors of an SVD, turned within their freedom towards old ones."""
    root = jnp.sqrt(new.values)[..., None, :]
    left, right = new.left * root, new.right * root
    overlap = cross(left, old.left.astype(left.dtype))
    overlap = overlap + cross(right, old.right.astype(right.dtype))
    turn = procrustes(overlap)
    return LowRank(times(left, turn), times(right, turn))


def check_not_wider(what: str, x: LowRank) -> None:
    """Refuse factors that are wider than the matrix."""
    if x.rank > min(x.shape[-2:]):
        raise ValueError(
            f"{what} needs factors no wider than the matrix: shape {x.shape}, width "
            f"{x.rank}."
        )

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..._sharding import placed_like
from ..orthonormalize import orthonormalize as by_householder


def subspace_iteration(
    matmul: Callable[[Array], Array],
    rmatmul: Callable[[Array], Array] | None,
    start: Float[Array, "*b n r"],
    *,
    steps: int = 4,
    orthonormalize: Callable[[Array], Array] = by_householder,
) -> Float[Array, "*b n r"]:
    """A basis of the leading right singular vectors of a matrix known by its products.

    ``V ← orth(Aᵀ orth(A V))``, the block power method. A step brings the span of V nearer
    to that of the ``r`` leading right singular vectors by ``(σ_{r+1}/σ_r)²``, and takes
    one product with A and one with its transpose.

    Args:
        matmul: ``v ↦ A v`` for thin ``v (*b, n, r)``.
        rmatmul: ``u ↦ Aᵀ u``; ``None`` for a symmetric A, of which a step then takes one
            product, ``V ← orth(A V)``.
        start: thin columns, random or the result of an earlier call. They need not be
            orthonormal.
        steps: to take; with none, the start is returned as it is.
        orthonormalize: how; by default :func:`lrjax.linalg.orthonormalize`, whose
            Cholesky method leaves sharded rows in place.

    Returns:
        ``(*b, n, r)``, as orthonormal as ``orthonormalize`` makes it.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> a = jnp.array([[0.0, 9.0], [1.0, 0.0], [0.0, 0.0]])
        >>> v = lrjax.linalg.subspace_iteration(
        ...     lambda v: a @ v, lambda u: a.T @ u, jnp.ones((2, 1))
        ... )
        >>> print(abs(v.ravel().round(4)))
        [0. 1.]

    Reference:
        N. Halko, P.-G. Martinsson, J. A. Tropp, "Finding structure with randomness:
        probabilistic algorithms for constructing approximate matrix decompositions"
        (2011), arXiv 0909.4061.
    """

    def step(_: int | Array, basis: Array) -> Array:
        image = matmul(basis)
        return orthonormalize(image if rmatmul is None else rmatmul(orthonormalize(image)))

    if not steps:
        return start
    # A loop keeps the dtype and the sharding of what goes round.
    result = jax.eval_shape(step, jnp.int32(0), start)
    start = placed_like(start.astype(result.dtype), result)
    return lax.fori_loop(0, steps, step, start)

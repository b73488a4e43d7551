import optax
from jaxtyping import Array

from ...._arguments import checks_trees
from ...._tree import check_has_nodes, check_params, map_factors
from ....linalg import cross, polar, times, working_dtype


@checks_trees
def keep_orthonormal() -> optax.GradientTransformation:
    """After every step both factors have orthonormal columns, the nearest ones.

    The step ``D`` of each factor ``X (n, r)`` of a LowRank node is projected onto the
    tangent space of the orthonormal columns, and its end back onto them::

        D ← D − X sym(XᵀD)        X ← polar(X + D)

    with ``sym(M) = (M + Mᵀ)/2``. Place it last in the chain, after the learning rate and
    whatever scales the step; :func:`lrjax.landing_field` with ``pull=0`` first turns the
    gradient into the Riemannian one. Leaves that are no nodes pass by. ``O(n r²)`` and an
    eigendecomposition of an ``r × r`` matrix.

    Returns:
        A stateless optax transform; ``update`` needs ``params``.

    Raises:
        ValueError: in ``init``, if the tree holds no LowRank node; in ``update``, without
            ``params``.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> x = lrjax.LowRank(jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [1.0]]))
        >>> step = lrjax.LowRank(jnp.array([[7.0], [0.75]]), jnp.zeros((2, 1)))
        >>> tx = lrjax.keep_orthonormal()
        >>> step, _ = tx.update(step, tx.init(x), x)
        >>> print(optax.apply_updates(x, step).left.ravel().round(4))
        [0.8 0.6]

    Reference:
        P.-A. Absil, J. Malick, "Projection-like retractions on matrix manifolds" (2012),
        SIAM Journal on Optimization; for adapters: Z. Li et al., "StelLA: subspace
        learning in low-rank adaptation using Stiefel manifold" (2025), arXiv 2510.01938.
    """

    def move(step: Array, x: Array) -> Array:
        dtype = working_dtype(x.dtype)
        step, x = step.astype(dtype), x.astype(dtype)
        overlap = cross(x, step)
        step = step - times(x, overlap + overlap.mT) / 2
        return polar(x + step, method="gram") - x

    def init(params):
        check_has_nodes("keep_orthonormal", params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        check_params("keep_orthonormal", params)
        return map_factors(move, updates, params), state

    return optax.GradientTransformation(init, update)

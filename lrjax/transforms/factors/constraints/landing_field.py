import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike

from ...._arguments import checks_trees
from ...._tree import check_has_nodes, check_params, map_factors
from ....linalg import cross, identity_like, times, working_dtype


@checks_trees
def landing_field(pull: ArrayLike = 1.0) -> optax.GradientTransformation:
    """Gradients of factors with orthonormal columns, along their manifold and towards it.

    For each factor ``X (n, r)`` of a LowRank node, with gradient ``G``::

        G ← (G Xᵀ − X Gᵀ) X + pull · X (XᵀX − I)

    The first term leaves ``XᵀX`` as it is, to first order, and the second one, orthogonal
    to it, goes down on ``¼ ‖XᵀX − I‖²``: with small steps the factors land on the
    manifold, and no decomposition is needed. There the field is ``G − X GᵀX``, the
    Riemannian gradient of the canonical metric. Place it first in the chain, and what
    scales the step (Adam) after; ``keep_orthonormal`` at the end makes every step exact.
    Leaves that are no nodes pass by. Products with ``r × r`` matrices alone.

    Args:
        pull: the weight of the second term; 0 where :func:`lrjax.keep_orthonormal` keeps
            the factors on the manifold.

    Returns:
        A stateless optax transform; ``update`` needs ``params``.

    Raises:
        ValueError: in ``init``, if the tree holds no LowRank node; in ``update``, without
            ``params``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.array([[1.0], [0.0]]), jnp.array([[2.0], [0.0]]))
        >>> gradient = lrjax.LowRank(jnp.array([[5.0], [3.0]]), jnp.zeros((2, 1)))
        >>> tx = lrjax.landing_field()
        >>> field, _ = tx.update(gradient, tx.init(x), x)
        >>> field.left.ravel().tolist(), field.right.ravel().tolist()
        ([0.0, 3.0], [6.0, 0.0])

    Reference:
        P. Ablin, G. Peyré, "Fast and accurate optimization on the orthogonal manifold
        without retraction" (2021), arXiv 2102.07432; for adapters: K. Lion et al.,
        "PoLAR: polar-decomposed low-rank adapter representation" (2025), arXiv
        2506.03133.
    """

    def field(gradient: Array, x: Array) -> Array:
        dtype = working_dtype(x.dtype)
        gradient, x = gradient.astype(dtype), x.astype(dtype)
        gram = cross(x, x)
        along = times(gradient, gram) - times(x, cross(gradient, x))
        return along + jnp.asarray(pull, dtype) * times(x, gram - identity_like(gram))

    def init(params):
        check_has_nodes("landing_field", params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        check_params("landing_field", params)
        return map_factors(field, updates, params), state

    return optax.GradientTransformation(init, update)

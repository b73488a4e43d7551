import optax
from jaxtyping import Array

from ..._arguments import checks_trees
from ..._matrices import MatrixLeaf, Where, map_matrices
from ..._sharding import gathered
from ..._tree import check_params
from ...linalg import geodesic, polar, working_dtype


@checks_trees
def follow_geodesics(*, where: Where) -> optax.GradientTransformation:
    """Steps turn subspaces: along geodesics of the Grassmann manifold.

    For orthonormal columns ``S (n, k)``, the shorter side of a matrix, and the step ``D``
    that arrives here::

        S ← (S V cos Σ + U sin Σ) Vᵀ,  U Σ Vᵀ = (I − S Sᵀ) D

    as :func:`lrjax.linalg.geodesic`. Only the span of ``S`` has a meaning, and the columns
    turn no more than the span does, so that the moments of ``S``, of all its entries, keep
    theirs: a QR factorization may flip signs. Columns that are not orthonormal are first
    replaced by the nearest ones that are. Place it last in the chain, after the momentum
    and the learning rate.

    Args:
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            leaves to treat; leading axes are a stack of matrices. The others pass.

    Returns:
        A stateless optax transform; ``update`` needs ``params``.

    Raises:
        ValueError: in ``init``, if ``where`` chooses no leaf, or one that is no matrix; in
            ``update``, without ``params``.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.follow_geodesics(where=lambda path, shape: True)
        >>> s = jnp.array([[1.0], [0.0]])
        >>> step, _ = tx.update(jnp.array([[9.0], [jnp.pi / 6]]), tx.init(s), s)
        >>> print(optax.apply_updates(s, step).T.round(4))
        [[0.866 0.5  ]]

    Reference:
        A. Edelman, T. A. Arias, S. T. Smith, "The geometry of algorithms with
        orthogonality constraints" (1998), arXiv physics/9806030.
    """

    def turn(leaf: MatrixLeaf, step: Array, x: Array) -> tuple[Array]:
        dtype = working_dtype(x.dtype)
        d, s = (gathered(leaf.matrices(a).astype(dtype)) for a in (step, x))
        wide = s.shape[-2] < s.shape[-1]
        moved = _moved(s.mT, d.mT).mT if wide else _moved(s, d)
        return (leaf.restore(moved, step).astype(step.dtype),)

    def init(params):
        map_matrices("follow_geodesics", where, lambda leaf, x: (x,), params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        check_params("follow_geodesics", params)
        rest = lambda step, x: (step,)
        (new,) = map_matrices(
            "follow_geodesics", where, turn, updates, params, rest=rest, results=1
        )
        return new, state

    return optax.GradientTransformation(init, update)


def _moved(s: Array, step: Array) -> Array:
    return geodesic(polar(s, method="gram"), step) - s

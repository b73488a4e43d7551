import jax.numpy as jnp
import optax
from jaxtyping import Array

from ..._sharding import einsum
from ..._tree import check_has_nodes, check_params, like, map_nodes
from ...linalg import TruncatedSVD, product_svd
from ...linalg.gram import identity_like
from ...lowrank import LowRank


def retract() -> optax.GradientTransformation:
    """Move a product of two factors along its tangent, and back to the nearest of its rank.

    A step ``(A, B)`` of the factors of ``X = left @ right.T``, width ``r``, moves the
    product by ``A rightᵀ + left Bᵀ`` to first order and by ``A Bᵀ`` beyond. Here the
    product becomes ``SVD_r(X + A rightᵀ + left Bᵀ)``, the best approximation of the
    first-order step, at any length of the step: the metric-projection retraction. It
    does not depend on how ``X`` is factorized.

    The new factors are balanced, ``leftᵀleft = rightᵀright``, and of all balanced ones
    those nearest to the old, so that moments of the factors keep their meaning and a zero
    step of balanced factors moves nothing. Place it last in the chain, after the learning
    rate. ``O((m + n) r²)`` and an SVD of a ``2r × 2r`` matrix.

    Returns:
        A stateless optax transform; ``update`` needs ``params``.

    Raises:
        ValueError: in ``init``, if the tree holds no LowRank node; in ``update``, without
            ``params`` or for factors that are wider than the matrix.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> x = lrjax.LowRank(jnp.array([[2.0], [0.0]]), jnp.array([[2.0], [0.0]]))
        >>> step = lrjax.LowRank(jnp.array([[1.0], [0.0]]), jnp.array([[1.0], [0.0]]))
        >>> tx = lrjax.retract()
        >>> step, _ = tx.update(step, tx.init(x), x)
        >>> print(optax.apply_updates(x, step).materialize().round(4) + 0.0)
        [[8. 0.]
         [0. 0.]]

    Reference:
        P.-A. Absil, I. V. Oseledets, "Low-rank retractions: a survey and new results"
        (2015). Special case: 4 + 2 + 2 above, where the factors by themselves give 9.
    """

    def init(params):
        check_has_nodes("retract", params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        check_params("retract", params)

        def move(u: LowRank, x: LowRank) -> LowRank:
            new = _nearest_factors(_step(x, u), x)
            return like(u, new.left - x.left, new.right - x.right)

        return map_nodes(move, updates, params), state

    return optax.GradientTransformation(init, update)


def _step(x: LowRank, u: LowRank) -> TruncatedSVD:
    """``SVD_r`` of the first-order step."""
    if x.rank > min(x.shape[-2:]):
        raise ValueError(
            f"retract needs factors no wider than the matrix: shape {x.shape}, width "
            f"{x.rank}."
        )
    small = jnp.zeros((*x.shape[:-2], x.rank, x.rank), jnp.result_type(x.dtype, u.dtype))
    identity = identity_like(small)
    top = jnp.concatenate([identity, identity], axis=-1)
    bottom = jnp.concatenate([identity, small], axis=-1)
    return product_svd(
        jnp.concatenate([x.left, u.left.astype(x.dtype)], axis=-1),
        jnp.concatenate([top, bottom], axis=-2),
        jnp.concatenate([x.right, u.right.astype(x.dtype)], axis=-1),
        x.rank,
    )


def _nearest_factors(new: TruncatedSVD, old: LowRank) -> LowRank:
    """Balanced factors of an SVD, turned within their freedom towards old ones."""
    root = jnp.sqrt(new.values)[..., None, :]
    left, right = new.left * root, new.right * root
    overlap = _overlap(left, old.left) + _overlap(right, old.right)
    u, _, vt = jnp.linalg.svd(overlap)
    turn = einsum("...rk,...ks->...rs", u, vt)
    spin = lambda x: einsum("...nr,...rs->...ns", x, turn)
    return LowRank(spin(left), spin(right))


def _overlap(x: Array, y: Array) -> Array:
    return einsum("...nr,...ns->...rs", x, y.astype(x.dtype))

import optax

from ..._tree import check_has_nodes, check_params, map_nodes
from ...lowrank import LowRank, balance


def rebalance() -> optax.GradientTransformation:
    """Make the factors balanced after the step, without moving their product.

    The update ``U`` is replaced by ``balance(X + U) − X``, where ``balance`` picks the
    factorization with ``leftᵀleft = rightᵀright`` diagonal. Place it last in the chain,
    after the learning rate. Costs two QR decompositions and an ``r × r`` SVD a node.

    Returns:
        A stateless optax transform; ``update`` needs ``params``.

    Raises:
        ValueError: in ``init``, if the tree holds no LowRank node; in ``update``, without
            ``params``.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> x = lrjax.LowRank(jnp.array([[8.0]]), jnp.array([[0.5]]))
        >>> still = lrjax.LowRank(jnp.zeros((1, 1)), jnp.zeros((1, 1)))
        >>> tx = lrjax.rebalance()
        >>> step, _ = tx.update(still, tx.init(x), x)
        >>> print(optax.apply_updates(x, step).left.round(4))
        [[2.]]
    """

    def init(params):
        check_has_nodes("rebalance", params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        check_params("rebalance", params)

        def move(u: LowRank, x: LowRank) -> LowRank:
            target = balance(LowRank(x.left + u.left, x.right + u.right))
            return LowRank(target.left - x.left, target.right - x.right)

        return map_nodes(move, updates, params), state

    return optax.GradientTransformation(init, update)

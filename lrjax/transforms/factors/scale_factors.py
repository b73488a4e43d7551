import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike

from ..._arguments import checks_trees
from ..._tree import check_has_nodes, like, map_nodes
from ...lowrank import LowRank


@checks_trees
def scale_factors(
    left: ArrayLike = 1.0, right: ArrayLike = 1.0
) -> optax.GradientTransformation:
    """Multiply the updates of the two factors by two numbers.

    ``U_l ← left · U_l`` and ``U_r ← right · U_r``: separate learning rates for the
    factors. A LoRA pair has ``left = B`` and ``right = Aᵀ``. Zero freezes a factor.
    Leaves that are no LowRank nodes pass unchanged. Place it after Adam, which undoes
    any scale before it.

    Args:
        left: multiplies the updates of ``left``.
        right: multiplies the updates of ``right``.

    Returns:
        A stateless optax transform.

    Raises:
        ValueError: in ``init``, if the tree holds no LowRank node.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> g = lrjax.LowRank(jnp.ones((1, 1)), jnp.ones((1, 1)))
        >>> tx = lrjax.scale_factors(left=16.0)
        >>> step, _ = tx.update(g, tx.init(g))
        >>> print(step.left, step.right)
        [[16.]] [[1.]]

    Reference:
        S. Hayou, N. Ghosh, B. Yu, "LoRA+: efficient low rank adaptation of large models"
        (2024), arXiv 2402.12354.
    """

    def init(params):
        check_has_nodes("scale_factors", params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        del params

        def scale(g: LowRank) -> LowRank:
            rates = (left, g.left), (right, g.right)
            return like(g, *(jnp.multiply(rate, x) for rate, x in rates if x is not None))

        return map_nodes(scale, updates), state

    return optax.GradientTransformation(init, update)

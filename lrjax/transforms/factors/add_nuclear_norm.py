import optax
from jaxtyping import ArrayLike

from ..._arguments import checks_trees
from ..._tree import check_has_nodes, check_params, like, map_nodes
from ...lowrank import LowRank
from .._checks import check_non_negative


@checks_trees
def add_nuclear_norm(weight: ArrayLike) -> optax.GradientTransformation:
    """Add the gradient of a nuclear norm penalty in its variational form.

    ``‖X‖_* = min ½(‖left‖² + ‖right‖²)`` over all factorizations ``X = left @ right.T``,
    so ``weight · ‖X‖_*`` is penalized by::

        G_l ← G_l + weight · left        G_r ← G_r + weight · right

    This is what keeps a factorization that is wider than the rank of the truth from
    fitting the noise. Leaves that are no LowRank nodes are not penalized. Place it first
    in the chain, before the preconditioner.

    Args:
        weight: non-negative; a number or an array.

    Returns:
        A stateless optax transform; ``update`` needs ``params``.

    Raises:
        ValueError: at construction, for a negative weight; in ``init``, if the tree holds
            no LowRank node; in ``update``, without ``params``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.array([[2.0]]), jnp.array([[4.0]]))
        >>> grad = lrjax.LowRank(jnp.ones((1, 1)), jnp.ones((1, 1)))
        >>> tx = lrjax.add_nuclear_norm(0.5)
        >>> step, _ = tx.update(grad, tx.init(x), x)
        >>> print(step.left, step.right)
        [[2.]] [[3.]]

    Reference:
        N. Srebro, J. Rennie, T. Jaakkola, "Maximum-margin matrix factorization" (2004),
        NeurIPS; in the preconditioned step: P. Giampouras, H. Cai, R. Vidal, "Guarantees
        of a preconditioned subgradient algorithm for overparameterized asymmetric
        low-rank matrix recovery" (2025), arXiv 2410.16826.
    """
    check_non_negative("add_nuclear_norm", "weight", weight)

    def init(params):
        check_has_nodes("add_nuclear_norm", params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        check_params("add_nuclear_norm", params)

        def penalize(g: LowRank, x: LowRank) -> LowRank:
            return like(g, g.left + weight * x.left, g.right + weight * x.right)

        return map_nodes(penalize, updates, params), state

    return optax.GradientTransformation(init, update)

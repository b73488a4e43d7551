import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike

from ...._arguments import checks_trees
from ...._matrices import Where, check_real
from ...._tree import check_has_nodes, check_params, map_factors
from ....linalg import energy_mask, map_singular_values
from ..._checks import check_non_negative
from ...wrappers.on_matrices import check_chosen, on_matrices


@checks_trees
def add_nuclear_norm(
    weight: ArrayLike, *, where: Where | None = None, energy: ArrayLike = 1.0
) -> optax.GradientTransformation:
    """Add the gradient of a nuclear norm penalty, of factors in its variational form.

    ``‖X‖_* = min ½(‖left‖² + ‖right‖²)`` over all factorizations ``X = left @ right.T``,
    so ``weight · ‖X‖_*`` is penalized by::

        G_l ← G_l + weight · left        G_r ← G_r + weight · right

    This is what keeps a factorization that is wider than the rank of the truth from
    fitting the noise. Place it first in the chain, before the preconditioner.

    Dense matrices ``W = U diag(σ) Vᵀ`` that ``where`` names get the subgradient of least
    norm, ``G ← G + weight · U_k V_kᵀ`` of the k singular values that are not zero, or that
    hold a share of the energy: one SVD each. Steps along it never end at a lower rank;
    :func:`lrjax.shrink_singular_values` does.

    Args:
        weight: non-negative; a number or an array.
        where: which leaves that are no LowRank nodes are penalized, and which axes are
            rows; see :func:`lrjax.transforms.on_matrices`. None by default.
        energy: the share of ``Σσ²`` whose singular values count, in (0, 1].

    Returns:
        A stateless optax transform; ``update`` needs ``params``.

    Raises:
        ValueError: at construction, for a negative weight; in ``init``, if the tree holds
            no LowRank node and ``where`` is not given, or ``where`` chooses no leaf; in
            ``update``, without ``params``.

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
        low-rank matrix recovery" (2025), arXiv 2410.16826; of dense matrices: Y. Xu et al.,
        "TRP: trained rank pruning for efficient deep neural networks" (2020), arXiv
        2004.14566.
    """
    check_non_negative("add_nuclear_norm", "weight", weight)

    def init(params):
        if where is None:
            check_has_nodes("add_nuclear_norm", params)
        else:
            check_real("add_nuclear_norm", params)
            check_chosen("add_nuclear_norm", params, where)
        return optax.EmptyState()

    def penalize(g: Array, x: Array) -> Array:
        return g + weight * x

    def penalize_dense(g: Array, x: Array) -> Array:
        slope = map_singular_values(lambda values: energy_mask(values, energy), x)
        return (g + jnp.asarray(weight, slope.dtype) * slope).astype(g.dtype)

    def update(updates, state, params=None):
        check_params("add_nuclear_norm", params)
        if where is not None:
            updates = on_matrices(penalize_dense, where)(updates, params)
        return map_factors(penalize, updates, params), state

    return optax.GradientTransformation(init, update)

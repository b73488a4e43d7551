import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike

from ...._arguments import checks_trees
from ....linalg import identity_like, nonzero, outer, times
from ..._checks import check_non_negative
from ._nodes import check_forms, columns_used, in_use, tree_of


@checks_trees
def add_condition_penalty(strength: ArrayLike) -> optax.GradientTransformation:
    """Add the gradient of a penalty on cores that are far from multiples of a rotation.

    For a node ``U S Vᵀ`` of rank ``r``::

        penalty = strength · ‖A‖_F        A = S Sᵀ − (‖S‖²_F / r) I
        gradient of S += strength · 2 A S / ‖A‖_F

    zero exactly where all ``r`` singular values are equal: small perturbations of the
    input are then amplified in no direction more than in others. Columns out of use, which
    are zeros of the core, do not count.

    Args:
        strength: a number of at least zero.

    Returns:
        A stateless optax transform; ``update`` needs ``params``.

    Raises:
        ValueError: for a negative strength; at ``init``, for LowRank nodes
            without an SVDForm.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> eye = jnp.eye(2)
        >>> x = lrjax.SVDForm(eye, jnp.diag(jnp.array([2.0, 1.0])), eye)
        >>> tx = lrjax.add_condition_penalty(1.0)
        >>> zero = jax.tree.map(jnp.zeros_like, x)
        >>> slope, _ = tx.update(zero, tx.init(x), x)
        >>> print(jnp.diag(slope.core).round(4))  # the larger one falls, the other grows
        [ 2.8284 -1.4142]

    Reference:
        S. Schotthöfer, H. L. Yang, S. Schnake, "Dynamical low-rank compression of neural
        networks with robustness under adversarial attacks" (2025), arXiv 2505.08022.
    """
    check_non_negative("add_condition_penalty", "strength", strength)

    def init(params):
        check_forms("add_condition_penalty", params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        tree = tree_of("add_condition_penalty", params, updates)
        grads = tree.like(updates)
        for i in tree.places:
            x = in_use(tree.leaves[i], columns_used(tree.leaves[i]))
            core = grads[i].core + strength * _slope(x.core, x.mask_columns)
            parts = (grads[i].left, core.astype(grads[i].core.dtype), grads[i].right)
            grads[i] = type(x)(*parts)
        return tree.treedef.unflatten(grads), state

    return optax.GradientTransformation(init, update)


def _slope(core: Array, mask) -> Array:
    """``2 A S / ‖A‖_F``, and zero where there is no slope."""
    square = outer(core, core)
    identity = mask(identity_like(core))
    sums = lambda x: jnp.sum(x, axis=(-2, -1), keepdims=True)
    off = square - identity * sums(square * identity) / sums(identity)
    size = jnp.sqrt(sums(off**2))
    return 2 * times(off, core) / nonzero(size)

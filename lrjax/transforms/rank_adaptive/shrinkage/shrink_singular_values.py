import jax.numpy as jnp
import optax

from ...._arguments import checks_trees
from ...._matrices import Where, check_real
from ...._tree import check_params
from ....linalg import increment, soft_threshold
from ..._checks import check_non_negative
from ...wrappers.on_matrices import check_chosen, on_matrices
from .._factors import at, ending_at


@checks_trees
def shrink_singular_values(
    threshold: optax.ScalarOrSchedule, *, where: Where | None = None
) -> optax.GradientTransformation:
    """Soft thresholding of singular values: the proximal map of the nuclear norm.

    For the step ``U`` that reaches it and a matrix ``W = P diag(σ) Qᵀ``::

        W ← prox(W + U),  prox(P diag(σ) Qᵀ) = P diag(max(σ − threshold, 0)) Qᵀ

    so that ranks fall in training: singular values become exactly zero, which no step
    along a subgradient makes of them, and may leave zero again. It stands at the end of a
    chain. For a penalty ``λ ‖W‖_*`` and steps of length η the threshold is ``η λ``, a
    schedule where η is one; :func:`lrjax.proximal_gradient` puts both together. One SVD of
    each matrix a step.

    Args:
        threshold: in the units of singular values; a number or a schedule.
        where: which leaves, and which axes are rows; see
            :func:`lrjax.transforms.on_matrices`. The others are not shrunk.

    Returns:
        An optax transform.

    Raises:
        ValueError: for a negative threshold; at ``init``, if ``where`` chooses no
            leaf, or one that is no matrix; at ``update``, if no params are given.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> shrink = lrjax.shrink_singular_values(0.5, where=lambda path, shape: True)
        >>> tx = optax.chain(optax.sgd(1.0), shrink)
        >>> w = jnp.diag(jnp.array([2.0, 0.25]))
        >>> updates, _ = tx.update(jnp.zeros((2, 2)), tx.init(w), w)
        >>> print(optax.apply_updates(w, updates).round(4) + 0.0)
        [[1.5 0. ]
         [0.  0. ]]

    Reference:
        S. Ma, D. Goldfarb, L. Chen, "Fixed point and Bregman iterative methods for matrix
        rank minimization" (2009), arXiv 0905.1643. Special case: of a matrix with one row
        it is the proximal map of its length; of diagonal ones it is :func:`lrjax.shrink`.
    """
    check_non_negative("shrink_singular_values", "threshold", threshold)

    def init(params):
        check_real("shrink_singular_values", params)
        check_chosen("shrink_singular_values", params, where)
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        check_params("shrink_singular_values", params)
        level = at(threshold, state.count)
        shrunk = lambda values: soft_threshold(values, level)
        state = optax.ScaleByScheduleState(count=increment(state.count))
        return on_matrices(ending_at(shrunk), where)(updates, params), state

    return optax.GradientTransformation(init, update)

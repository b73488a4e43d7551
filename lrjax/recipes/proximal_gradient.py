import optax
from jaxtyping import ArrayLike

from .._arguments import checks_trees
from .._matrices import Where
from ..transforms import shrink_singular_values


@checks_trees
def proximal_gradient(
    learning_rate: optax.ScalarOrSchedule,
    *,
    nuclear_weight: ArrayLike = 1e-3,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Proximal gradient descent with a nuclear norm: ranks of dense weights fall exactly.

    ``W ← prox(W − η G)`` with the soft thresholding of singular values at
    ``η nuclear_weight``: it lowers ``loss + nuclear_weight ‖W‖_*``, from any start and at
    any ``η`` below one over the curvature where the loss is convex.

    Args:
        learning_rate: ``η``, a number or a schedule.
        nuclear_weight: of the penalty.
        where: which leaves are penalized; see :func:`lrjax.shrink_singular_values`. The
            others take plain gradient steps.

    Returns:
        An optax optimizer; ``update`` needs ``params``.

    Raises:
        ValueError: as :func:`lrjax.shrink_singular_values`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.diag(jnp.array([3.0, 1.0, 0.4]))
        >>> loss = lambda w: jnp.sum((w - target) ** 2) / 2
        >>> tx = lrjax.proximal_gradient(
        ...     0.5, nuclear_weight=0.5, where=lambda path, shape: True)
        >>> step = jax.jit(lambda w, s: tx.update(jax.grad(loss)(w), s, w))
        >>> w = jnp.eye(3)
        >>> state = tx.init(w)
        >>> for _ in range(30):
        ...     updates, state = step(w, state)
        ...     w = optax.apply_updates(w, updates)
        >>> print(jnp.diag(w).round(3))
        [2.5 0.5 0. ]

    Reference:
        S. Ma, D. Goldfarb, L. Chen, "Fixed point and Bregman iterative methods for matrix
        rank minimization" (2009), arXiv 0905.1643. Special case: the example, whose
        minimum is the soft threshold of the target.
    """

    def threshold(count):
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        return rate * nuclear_weight

    return optax.chain(
        optax.scale_by_learning_rate(learning_rate),
        shrink_singular_values(threshold, where=where),
    )

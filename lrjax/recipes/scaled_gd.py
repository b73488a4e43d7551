from typing import Literal

import optax
from jaxtyping import ArrayLike

from .._arguments import checks_trees
from ..transforms import scale_by_gram
from ._common import on_nodes


@checks_trees
def scaled_gd(
    learning_rate: optax.ScalarOrSchedule = 0.5,
    *,
    damping: ArrayLike | optax.Schedule = 0.0,
    relative: bool = True,
    order: Literal["jacobi", "alternating"] = "jacobi",
) -> optax.GradientTransformationExtraArgs:
    """Scaled gradient descent: linear convergence at a rate free of the condition number.

    ``left ← left − η G_l (rightᵀright + λI)⁻¹``, and ``right`` likewise. For a squared
    loss of an operator close to an isometry the error contracts by
    ``max(|1 − η|, |1 − 2η|)`` a step, best at ``η = 2/3``. A constant absolute damping,
    ``relative=False``, is the ScaledGD(λ) of over-parameterized problems.

    Args:
        learning_rate: ``η``, a number or a schedule.
        damping: see :func:`lrjax.scale_by_gram`.
        relative: see :func:`lrjax.scale_by_gram`.
        order: ``"alternating"`` with ``learning_rate=1`` is alternating least squares.

    Returns:
        An optax optimizer; leaves that are no LowRank nodes take plain gradient steps.

    Raises:
        ValueError: as :func:`lrjax.scale_by_gram`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.diag(jnp.array([100.0, 1.0]))
        >>> loss = lambda x: 0.5 * jnp.sum((x.materialize() - target) ** 2)
        >>> x = lrjax.LowRank(jnp.eye(2) + 0.1, jnp.eye(2))
        >>> tx = lrjax.scaled_gd(0.5)
        >>> state = tx.init(x)
        >>> for _ in range(40):
        ...     updates, state = tx.update(jax.grad(loss)(x), state, x)
        ...     x = optax.apply_updates(x, updates)
        >>> print(jnp.diag(x.materialize()).round(2))
        [100. 1.]

    Reference:
        T. Tong, C. Ma, Y. Chi, "Accelerating ill-conditioned low-rank matrix estimation
        via scaled gradient descent" (2021), arXiv 2005.08898; X. Xu, Y. Shen, Y. Chi,
        C. Ma, "The power of preconditioning in overparameterized low-rank matrix sensing"
        (2023), arXiv 2302.01186.
    """
    return optax.chain(
        on_nodes(scale_by_gram(damping, relative=relative, order=order)),
        optax.scale_by_learning_rate(learning_rate),
    )

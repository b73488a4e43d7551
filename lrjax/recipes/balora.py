import optax
from jaxtyping import Array

from .._arguments import checks_trees
from ..transforms import every, rebalance
from ._common import on_nodes, whole_nodes


@checks_trees
def balora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    period: int | Array = 1,
    inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """BaLoRA: after each step the factors are projected on the balanced ones.

    A step of ``inner``, and then :func:`lrjax.rebalance`: ``leftᵀleft = rightᵀright`` at
    the same product. Of all pairs of factors of a product the balanced ones make the loss
    best conditioned.

    The paper says which product and which manifold. Of the balanced factors, which may
    still be rotated, those nearest to where the step ended are taken here, the projection
    in the Frobenius norm, so that the moments of ``inner`` belong to the columns that they
    are of.

    Args:
        learning_rate: a number or a schedule.
        period: how many steps from one projection to the next; may be traced.
        inner: transform of the gradients of the factors, and of all other leaves; Adam by
            default.

    Returns:
        An optax optimizer; ``update`` needs ``params``. Without a LowRank node it is
        ``inner`` with a learning rate.

    Raises:
        ValueError: for a period below one.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.eye(6)[:, :4]
        >>> loss = lambda x: jnp.sum((x.materialize() - target) ** 2)
        >>> x = lrjax.LowRank(jnp.zeros((6, 2)), jnp.eye(4)[:, :2] + 0.5)
        >>> tx = lrjax.balora(0.1)
        >>> state = tx.init(x)
        >>> for _ in range(40):
        ...     updates, state = tx.update(jax.grad(loss)(x), state, x)
        ...     x = optax.apply_updates(x, updates)
        >>> print(loss(x) < 2.1, lrjax.metrics.relative_imbalance(x) < 1e-4)
        True True

    Reference:
        V. Castin, K. Nadjahi, P. Ablin, G. Peyré, "Balanced LoRA: removing parameter
        invariance to accelerate convergence" (2026), arXiv 2605.31484. Special case: with
        ``inner=optax.identity()`` the products do not depend on which balanced factors are
        taken.
    """
    return optax.chain(
        whole_nodes(),
        optax.scale_by_adam() if inner is None else inner,
        optax.scale_by_learning_rate(learning_rate),
        on_nodes(every(period, rebalance("nearest"))),
    )

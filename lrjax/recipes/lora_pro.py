import optax
from jaxtyping import ArrayLike

from .._arguments import checks_trees
from ..transforms import scale_by_tangent
from ._common import on_nodes


@checks_trees
def lora_pro(
    learning_rate: optax.ScalarOrSchedule,
    *,
    scale: ArrayLike = 1.0,
    momentum: ArrayLike = 0.9,
    damping: ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-Pro: the steps of the factors whose product is closest to full fine-tuning.

    For a weight ``W + s · left @ right.T`` with full gradient ``G (m, n)``, never formed,
    the factors move so that to first order the weight moves along::

        Π_l G + G Π_r − Π_l G Π_r        Π_l = left (leftᵀleft)⁻¹ leftᵀ, Π_r likewise

    the projection of ``G`` onto the tangent space of the matrices of rank r, whatever s:
    :func:`lrjax.scale_by_tangent` over ``s²``. The paper splits the step between the
    factors by a Sylvester equation, so that they move least, here both sides are treated
    alike, which needs none and does not depend on how the product is split. Momentum
    is that of the factors; the paper's Adam has moments of the size of ``G``, which
    defeats the memory of LoRA, and is left out.

    Args:
        learning_rate: a number or a schedule: that of gradient descent on ``W``.
        scale: ``s``, such as alpha/r of a LoRA adapter.
        momentum: of all leaves.
        damping: see :func:`lrjax.scale_by_tangent`.

    Returns:
        An optax optimizer; leaves that are no LowRank nodes take gradient steps with
        momentum.

    Raises:
        ValueError: as :func:`lrjax.scale_by_tangent`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.diag(jnp.array([9.0, 1.0]))
        >>> loss = lambda x: 0.5 * jnp.sum((2 * x.materialize() - target) ** 2)
        >>> x = lrjax.LowRank(jnp.zeros((2, 2)), jnp.eye(2) + 0.1)  # as LoRA starts
        >>> tx = lrjax.lora_pro(1.0, scale=2.0, momentum=0.0)
        >>> step, _ = tx.update(jax.grad(loss)(x), tx.init(x), x)
        >>> print(2 * optax.apply_updates(x, step).materialize().round(4))
        [[9. 0.]
         [0. 1.]]

    Reference:
        Z. Wang et al., "LoRA-Pro: are low-rank adapters properly optimized?" (2024), arXiv
        2407.18242. Special case: small steps without momentum are those of
        :func:`lrjax.riemannian_sgd`.
    """
    return optax.chain(
        on_nodes(optax.chain(scale_by_tangent(damping), optax.scale(1 / scale**2))),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )

import optax
from jaxtyping import ArrayLike

from .._arguments import checks_trees
from ..transforms import alternate_factors, scale_by_gram
from ._common import DecayMask, by_kind, decay_weights


@checks_trees
def alt_lora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    scale: ArrayLike = 1.0,
    b1: ArrayLike = 0.9,
    damping: ArrayLike | optax.Schedule = 0.0,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
) -> optax.GradientTransformationExtraArgs:
    """AltLoRA: one factor a step, along the closest to the full gradient that it can.

    For a weight ``W + s · left @ right.T`` with gradients ``G_l``, ``G_r`` of the factors,
    in the steps 0, 2, … of ``left``::

        P ← G_l (rightᵀright)⁻¹ / s²
        M ← b1 M rightᵀ_old right (rightᵀright)⁻¹ + (1 − b1) P
        left ← left − η (M + γ left)

    and likewise of ``right`` in the steps 1, 3, …, each with a gradient of its own. So
    ``s P rightᵀ`` is the full gradient projected on the rows that the partner spans, and
    the momentum is that of the product: it follows the partner from where it was at the
    last turn. Trajectories of the product do not depend on how it is split.

    The rule is the paper's. Its code takes ten steps of a factor in a row and leaves
    ``s`` out.

    Args:
        learning_rate: ``η``, a number or a schedule: that of gradient descent on ``W``.
        scale: ``s``, such as alpha/r of a LoRA adapter.
        b1: decay of the momentum, whose bias is not corrected.
        damping: see :func:`lrjax.scale_by_gram`.
        weight_decay: ``γ``, of matrices but biases and scales of norms; a factor that
            rests is not decayed.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.

    Returns:
        An optax optimizer; ``update`` needs ``params``. Leaves that are no LowRank nodes
        take steps with the same momentum.

    Raises:
        ValueError: as :func:`lrjax.scale_by_gram`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.diag(jnp.array([100.0, 1.0]))
        >>> loss = lambda x: 0.5 * jnp.sum((x.materialize() - target) ** 2)
        >>> x = lrjax.LowRank(jnp.zeros((2, 2)), jnp.eye(2) + 0.1)  # as LoRA starts
        >>> tx = lrjax.alt_lora(1.0, b1=0.0)
        >>> step, _ = tx.update(jax.grad(loss)(x), tx.init(x), x)
        >>> print(optax.apply_updates(x, step).materialize().round(2) + 0.0)
        [[100.   0.]
         [  0.   1.]]

    Reference:
        X. Yu, Y. Wang, J. Chen, L. Xue, "AltLoRA: towards better gradient approximation in
        low-rank adaptation with alternating projections" (2025), arXiv 2505.12455. Special
        case: with ``b1=0``, :func:`lrjax.scaled_gd` in the alternating order.
    """
    average = optax.chain(optax.ema(b1, debias=False), decay_weights(weight_decay, mask))
    of_pairs = optax.chain(scale_by_gram(damping), optax.scale(1 / scale**2), average)
    of_pairs = alternate_factors(of_pairs, carry_moments=True)
    return by_kind(of_pairs, average, learning_rate)

import optax
from jaxtyping import ArrayLike

from .._arguments import checks_trees
from ..transforms import alternate_factors, scale_by_gram
from ._common import DecayMask, adam, by_kind, decay_weights


@checks_trees
def alt_lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    damping: ArrayLike | optax.Schedule = 0.0,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
) -> optax.GradientTransformationExtraArgs:
    """AltLoRA+: :func:`lrjax.alt_lora` with the second moments of Adam.

    In the steps 0, 2, … of ``left``, and likewise of ``right`` in the others::

        P ← G_l (rightᵀright)⁻¹
        M ← b1 M rightᵀ_old right (rightᵀright)⁻¹ + (1 − b1) P
        V ← b2 V + (1 − b2) P²                                        (entry by entry)
        left ← left − η (M̂ / (√V̂ + eps) + γ left)

    with Adam's corrections of the bias, ``M̂`` and ``V̂``, for the turns of the factor. The
    momentum follows the partner as it moves; squares of entries cannot, and make the
    trajectory depend on how the product is split. The scale of an adapter divides out.

    Args:
        learning_rate: ``η``, a number or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment; zero is allowed.
        damping: see :func:`lrjax.scale_by_gram`.
        weight_decay: ``γ``, of matrices but biases and scales of norms; a factor that
            rests is not decayed.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.

    Returns:
        An optax optimizer; ``update`` needs ``params``. Leaves that are no LowRank nodes
        take steps of Adam.

    Raises:
        ValueError: as :func:`lrjax.scale_by_gram`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.zeros((1, 1)), jnp.full((1, 1), 2.0))
        >>> grad = lrjax.LowRank(jnp.full((1, 1), 8.0), jnp.zeros((1, 1)))
        >>> tx = lrjax.alt_lora_plus(0.1)
        >>> step, _ = tx.update(grad, tx.init(x), x)
        >>> print(step.left.round(4), step.right)
        [[-0.1]] [[-0.]]

    Reference:
        X. Yu, Y. Wang, J. Chen, L. Xue, "AltLoRA: towards better gradient approximation in
        low-rank adaptation with alternating projections" (2025), arXiv 2505.12455. Special
        case: with ``b1=0`` and an ``eps`` above all gradients, :func:`lrjax.alt_lora` at
        the rate ``η/eps``.
    """
    moments = optax.chain(adam(b1, b2, eps), decay_weights(weight_decay, mask))
    of_pairs = optax.chain(scale_by_gram(damping), moments)
    return by_kind(alternate_factors(of_pairs, carry_moments=True), moments, learning_rate)

from collections.abc import Sequence

import optax
from jaxtyping import ArrayLike

from .._arguments import checks_trees
from ..transforms import reduce_at_checkpoints
from ._common import DecayMask, decay_weights


@checks_trees
def autolora(
    learning_rate: optax.ScalarOrSchedule = 0.1,
    *,
    checkpoints: Sequence[int] = (0, 16, 24, 28, 36, 40, 42, 44, 46, 48, 50),
    factor: ArrayLike = 0.5,
    momentum: ArrayLike = 0.9,
    weight_decay: ArrayLike = 2e-4,
    mask: DecayMask = None,
) -> optax.GradientTransformationExtraArgs:
    """AutoLoRa: momentum whose rate follows the robust accuracy on validation data.

    ``M ← momentum · M + G + weight_decay · X`` and a step of ``−η M``, where η begins at
    the learning rate and is reduced by :func:`lrjax.reduce_at_checkpoints`: once an epoch
    ``update(…, score=robust_accuracy)`` tells how good the parameters are. The loss belongs
    to it: with adapters beside a model that is trained as well, natural examples go through
    the adapters and adversarial ones through the model, see
    :func:`lrjax.adapters.disentangled_loss`.

    Args:
        learning_rate: the first one, or a schedule on top.
        checkpoints: numbers of validations; the default is for 50 of them.
        factor: what a reduction multiplies the rate by.
        momentum: its decay.
        weight_decay: added to the gradients, as L2 regularization is.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.

    Returns:
        An optax optimizer; ``update`` needs ``params`` for decay and for a score.

    Raises:
        ValueError: for checkpoints that do not begin at zero and grow.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.autolora(0.5, checkpoints=(0, 2, 4), momentum=0.0)
        >>> w = jnp.array([1.0])
        >>> state = tx.init(w)
        >>> for epoch in range(5):
        ...     accuracy = 1 - jnp.abs(w[0] - 0.3)  # the loss has its minimum at zero
        ...     updates, state = tx.update(w, state, w, score=accuracy)
        ...     w = optax.apply_updates(w, updates)
        >>> print(w, state[-1].rate)  # from the best of all that were seen
        [0.25] 0.5

    Reference:
        X. Xu, J. Zhang, M. Kankanhalli, "AutoLoRa: a parameter-free automated robust
        fine-tuning framework" (2023), arXiv 2310.01818. Special case: without a score it is
        SGD with momentum and L2 regularization.
    """
    return optax.chain(
        decay_weights(weight_decay, mask),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
        reduce_at_checkpoints(checkpoints, factor=factor),
    )

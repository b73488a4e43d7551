import optax
from jaxtyping import ArrayLike

from .._arguments import checks_trees
from ..transforms import add_imbalance_penalty, scale_by_gram
from ._common import DecayMask, adam, finish, on_nodes, whole_nodes


@checks_trees
def ilora(
    learning_rate: optax.ScalarOrSchedule,
    strength: ArrayLike = 0.1,
    *,
    ratio: ArrayLike | None = None,
    damping: ArrayLike | None = None,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
) -> optax.GradientTransformationExtraArgs:
    """Imbalance-regularized LoRA, iLoRA and π-LoRA: Adam, and a pull to a ratio of sizes.

    The direction of Adam, and to it :func:`lrjax.add_imbalance_penalty`, decoupled from the
    moments as weight decay is: ``A Aᵀ ≈ ρ BᵀB`` for ``left = B (m, r)``, ``rightᵀ = A``.
    With a ``damping`` the gradients are preconditioned first, by
    :func:`lrjax.scale_by_gram`, which is π-LoRA. The strength of the penalty is our choice,
    not that of the paper.

    Args:
        learning_rate: a number or a schedule.
        strength: of the penalty, which the learning rate multiplies.
        ratio: ρ; None stands for ``r/m`` of each node.
        damping: relative to the mean diagonal of the Gram matrix; None leaves the
            gradients as they are.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.

    Returns:
        An optax optimizer; ``update`` needs ``params``. Without a LowRank node it is Adam.

    Raises:
        ValueError: for a negative strength, ratio or damping.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> x = lrjax.LowRank(jnp.full((4, 2), 3.0), jnp.ones((6, 2)))
        >>> tx = lrjax.ilora(0.01)
        >>> @jax.jit
        ... def step(x, state):  # of a loss that is constant
        ...     updates, state = tx.update(jax.tree.map(jnp.zeros_like, x), state, x)
        ...     return optax.apply_updates(x, updates), state
        >>> state = tx.init(x)
        >>> for _ in range(100):
        ...     x, state = step(x, state)
        >>> print(lrjax.metrics.relative_imbalance(x, ratio=2 / 4) < 1e-3)
        True

    Reference:
        Z. Zhu, Y. Wu, Q. Gu, V. Cevher, "Imbalance-regularized LoRA: a plug-and-play method
        for improving fine-tuning of foundation models" (2024), NeurIPS workshop. Special
        case: ``strength=0`` is Adam.
    """
    tx = optax.chain(
        whole_nodes() if damping is None else on_nodes(scale_by_gram(damping)),
        adam(b1, b2, eps),
        on_nodes(add_imbalance_penalty(strength, ratio=ratio)),
    )
    return finish(tx, learning_rate, weight_decay, mask)

import optax
from jaxtyping import ArrayLike

from .._arguments import checks_trees
from ..transforms import perturb_along_momentum
from ._common import DecayMask, adam, finish, on_nodes, others


@checks_trees
def lora_mgpo(
    learning_rate: optax.ScalarOrSchedule,
    radius: ArrayLike = 0.05,
    *,
    smoothing: ArrayLike = 0.9,
    scale: ArrayLike = 1.0,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-MGPO: Adam with gradients from ahead, along its momentum.

    The gradient of a loss at ``transforms.perturbed_params(params, state)``, see
    :func:`lrjax.perturb_along_momentum`, and one gradient a step: weights that are flat
    around, as sharpness-aware minimization finds them, at the cost of Adam.

    Args:
        learning_rate: a number or a schedule.
        radius: how far ahead, in the norm of the change of the weight, times κ; 0.05 for
            small models and 0.01 with ``b1 = smoothing = 0.8`` for large ones in the paper.
        smoothing: decay of the average of gradient norms, which sets κ.
        scale: of the adapter, ``alpha / rank``.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.

    Returns:
        An optax optimizer; ``update`` needs ``params``. Without a LowRank node it is Adam.

    Raises:
        ValueError: for a negative radius.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.eye(6)[:, :4]
        >>> loss = lambda x: jnp.sum((x.materialize() - target) ** 2)
        >>> x = lrjax.LowRank(jnp.zeros((6, 2)), jnp.eye(4)[:, :2] + 0.5)
        >>> tx = lrjax.lora_mgpo(0.1)
        >>> @jax.jit
        ... def step(x, state):
        ...     ahead = lambda x: lrjax.transforms.perturbed_params(x, state)
        ...     grad = jax.grad(lambda x: loss(ahead(x)))(x)
        ...     updates, state = tx.update(grad, state, x)
        ...     return optax.apply_updates(x, updates), state
        >>> state = tx.init(x)
        >>> for _ in range(60):
        ...     x, state = step(x, state)
        >>> print(loss(x) < 2.1)
        True

    Reference:
        Y. Chang, C. Guo, Y. Chang, Y. Wu, "LoRA-MGPO: mitigating double descent in low-rank
        adaptation via momentum-guided perturbation optimization" (2025), arXiv 2502.14538.
        Special case: ``radius=0`` is Adam.
    """
    inner = adam(b1, b2, eps)
    ahead = perturb_along_momentum(inner, radius, smoothing=smoothing, scale=scale)
    tx = optax.chain(on_nodes(ahead), optax.masked(inner, others))
    return finish(tx, learning_rate, weight_decay, mask)

from typing import Literal

import optax
from jaxtyping import ArrayLike

from .._arguments import checks_trees
from ..transforms import alternate_factors, scale_by_gram
from ._common import DecayMask, adam, by_kind, decay_weights, on_nodes


@checks_trees
def scaled_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.7,
    b2: ArrayLike = 0.8,
    eps: ArrayLike = 1e-8,
    damping: ArrayLike | optax.Schedule = 1e-2,
    relative: bool = False,
    order: Literal["jacobi", "alternating"] = "jacobi",
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
) -> optax.GradientTransformationExtraArgs:
    """Scaled AdamW: Adam of gradients that the Gram matrix of the partner preconditions.

    Adam's two moments are those of::

        P_l = G_l (rightᵀright + λI)⁻¹        P_r = G_r (leftᵀleft + λI)⁻¹

    No state besides Adam's. What ``P`` is worth changes by orders of magnitude as the
    partner grows, above all right after the zero start of a LoRA factor, and the second
    moment remembers the largest for ``1/(1 − b2)`` steps. So both decays are the fast ones
    of the authors, and λ is absolute, large enough to hold at the start.

    In the order ``"jacobi"`` both gradients are taken at the same pair; ``"alternating"``
    moves one factor a step, with a gradient taken after the last move of the other
    (Gauss-Seidel). The published code does neither: it updates one factor in place
    before it builds the Gram matrix of the other, so that a new factor preconditions a
    gradient at the old one.

    Args:
        learning_rate: a number or a schedule.
        b1: decay of Adam's first moment.
        b2: decay of Adam's second moment.
        eps: added to the root of the second moment; zero is allowed.
        damping: ``λ``, see :func:`lrjax.scale_by_gram`.
        relative: see :func:`lrjax.scale_by_gram`.
        order: ``"jacobi"``, or ``"alternating"``, :func:`lrjax.alternate_factors`.
        weight_decay: decoupled weight decay, of matrices but biases and scales of norms;
            a factor that rests is not decayed.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.

    Returns:
        An optax optimizer; ``update`` needs ``params``. Leaves that are no LowRank nodes
        take steps of Adam.

    Raises:
        ValueError: for an unknown order, and as :func:`lrjax.scale_by_gram`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.diag(jnp.array([10.0, 1.0]))
        >>> loss = lambda x: 0.5 * jnp.sum((x.materialize() - target) ** 2)
        >>> x = lrjax.LowRank(jnp.eye(2) + 0.1, jnp.eye(2))
        >>> tx = lrjax.scaled_adamw(optax.cosine_decay_schedule(0.1, 200))
        >>> step = jax.jit(lambda x, state: tx.update(jax.grad(loss)(x), state, x))
        >>> state = tx.init(x)
        >>> for _ in range(200):
        ...     updates, state = step(x, state)
        ...     x = optax.apply_updates(x, updates)
        >>> print(jnp.diag(x.materialize()).round(1))
        [10.  1.]

    Reference:
        F. Zhang, M. Pilanci, "Riemannian preconditioned LoRA for fine-tuning foundation
        models" (2024), arXiv 2402.02347. Special case: with a huge damping and
        ``eps=0`` it is AdamW.
    """
    if order not in ("jacobi", "alternating"):
        raise ValueError(f"order must be 'jacobi' or 'alternating', got {order!r}.")
    moments = optax.chain(adam(b1, b2, eps), decay_weights(weight_decay, mask))
    precondition = scale_by_gram(damping, relative=relative)
    if order == "alternating":
        in_turns = alternate_factors(optax.chain(precondition, moments))
        return by_kind(in_turns, moments, learning_rate)
    rate = optax.scale_by_learning_rate(learning_rate)
    return optax.chain(on_nodes(precondition), moments, rate)

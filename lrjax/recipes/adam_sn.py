import optax
from jaxtyping import ArrayLike

from .._arguments import checks_trees
from ..transforms import scale_by_subset_norm
from ._common import DecayMask, finish


@checks_trees
def adam_sn(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamSN: Adam with one second moment for each row of the longer side of a matrix.

    ``U = m̂ / (√v̂ + ε)`` with the full first moment and the subset norms of
    :func:`lrjax.scale_by_subset_norm`: half of Adam's state. They are sums, not means, so
    that rates are some ten times Adam's.

    Args:
        learning_rate: a number or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.

    Returns:
        An optax optimizer.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.adam_sn(0.3)
        >>> params = {"weight": jnp.zeros((8, 16))}
        >>> loss = lambda p: jnp.mean((p["weight"] - 1) ** 2)
        >>> step = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p))
        >>> state = tx.init(params)
        >>> for _ in range(20):
        ...     updates, state = step(params, state)
        ...     params = optax.apply_updates(params, updates)
        >>> print(loss(params) < 0.5)
        True

    Reference:
        T. Nguyen, H. L. Nguyen, "Subset-norm and subspace-momentum: faster
        memory-efficient adaptive optimization with convergence guarantees" (2024), arXiv
        2411.07120. For vectors it is Adam.
    """
    tx = scale_by_subset_norm(b2, eps, numerator=optax.ema(b1))
    return finish(tx, learning_rate, weight_decay, mask)

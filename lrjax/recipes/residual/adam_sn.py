import optax
from jaxtyping import ArrayLike

from ...transforms import scale_by_subset_norm
from .._finish import finish


def adam_sn(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
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

    Returns:
        An optax optimizer.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.adam_sn(1e-2)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

    Reference:
        T. Nguyen, H. L. Nguyen, "Subset-Norm and Subspace-Momentum" (2024), arXiv
        2411.07120. For vectors it is Adam.
    """
    tx = scale_by_subset_norm(b2, eps, numerator=optax.ema(b1))
    return finish(tx, learning_rate, weight_decay)

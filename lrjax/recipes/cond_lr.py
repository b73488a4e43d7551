import optax
from jaxtyping import Array, ArrayLike

from .._arguments import checks_trees
from ..lowrank import clamp_spectrum
from ..transforms import dynamical_low_rank


@checks_trees
def cond_lr(
    learning_rate: optax.ScalarOrSchedule,
    *,
    condition: ArrayLike = 1.5,
    momentum: ArrayLike = 0.3,
    every: int | Array = 1,
) -> optax.GradientTransformationExtraArgs:
    """CondLR: low-rank training with a bound on the condition number of every matrix.

    A step of :func:`lrjax.dynamical_low_rank` at the width of the node, then its singular
    values are brought within a factor of ``condition``
    (:func:`lrjax.lowrank.clamp_spectrum`), so that no perturbation of the input is
    amplified much more than another. This is the step of the paper; its code drops the
    triangular factors of the new bases.

    Args:
        learning_rate: a number or a schedule.
        condition: the largest ratio of singular values, at least one: 1.1 or 1.5 in the
            paper; one for multiples of a rotation.
        momentum: of the core and of all other leaves.
        every: the period in which bases move and spectra are clamped.

    Returns:
        An optax optimizer; ``update`` needs ``params``. Without an SVDForm node it is
        gradient descent with momentum.

    Raises:
        ValueError: for a ``condition`` below one.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.diag(jnp.array([3.0, 2.0, 1.0, 0.0]))
        >>> loss = lambda x: jnp.sum((x.materialize() - target) ** 2) / 2
        >>> x = lrjax.SVDForm(jnp.eye(4)[:, :2], jnp.eye(2), jnp.eye(4)[:, :2])
        >>> tx = lrjax.cond_lr(0.1, condition=1.2)
        >>> step = jax.jit(lambda x, s: tx.update(jax.grad(loss)(x), s, x))
        >>> state = tx.init(x)
        >>> for _ in range(60):
        ...     updates, state = step(x, state)
        ...     x = optax.apply_updates(x, updates)
        >>> print(jnp.linalg.cond(x.core).round(3))
        1.2

    Reference:
        D. Savostianova, E. Zangrando, G. Ceruti, F. Tudisco, "Robust low-rank training via
        approximate orthonormal constraints" (2023), arXiv 2306.01485.
    """
    if isinstance(condition, int | float) and condition < 1:
        raise ValueError(f"cond_lr needs a condition of at least one, got {condition}.")
    plain = optax.chain(optax.trace(momentum), optax.scale_by_learning_rate(learning_rate))
    clamp = lambda x: clamp_spectrum(x, condition)
    return dynamical_low_rank(plain, every=every, project=clamp)

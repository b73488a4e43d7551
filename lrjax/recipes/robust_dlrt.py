import optax
from jaxtyping import Array, ArrayLike

from .._arguments import checks_trees
from ..transforms import add_condition_penalty, dynamical_low_rank


@checks_trees
def robust_dlrt(
    learning_rate: optax.ScalarOrSchedule,
    *,
    tol: ArrayLike = 0.05,
    penalty: ArrayLike = 0.1,
    every: int | Array = 10,
    inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """RobustDLRT: ranks that adapt, and spectra that are kept flat by a penalty.

    Every ``every`` steps the bases of a node ``U S Vᵀ`` are augmented by the gradient, the
    core takes steps in them with the gradient of ``penalty · ‖S Sᵀ − (‖S‖²/r) I‖_F``
    added, and is truncated at the end of the period: :func:`lrjax.dynamical_low_rank` with
    ``method="augmented"`` behind :func:`lrjax.add_condition_penalty`. Other than in the
    published code the first step of a period moves the core and all biases too, and weight
    decay never acts on bases.

    Args:
        learning_rate: a number or a schedule.
        tol: the relative tail that is cut.
        penalty: the strength; 0.05 to 0.15 in the paper.
        every: the period.
        inner: transform of the gradient of cores and of all other leaves; Adam by default.

    Returns:
        An optax optimizer; ``update`` needs ``params``. Without an SVDForm node it is
        ``inner`` with a learning rate.

    Raises:
        ValueError: for a negative ``tol`` or ``penalty``.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.diag(jnp.array([3.0, 2.0, 0.0, 0.0]))
        >>> loss = lambda x: jnp.mean((x.materialize() - target) ** 2)
        >>> x = lrjax.svd(jnp.ones((4, 4)) + jnp.eye(4))
        >>> tx = lrjax.robust_dlrt(0.05, penalty=0.01, every=5)
        >>> step = jax.jit(lambda x, s: tx.update(jax.grad(loss)(x), s, x))
        >>> state, first = tx.init(x), loss(x)
        >>> for _ in range(60):
        ...     updates, state = step(x, state)
        ...     x = optax.apply_updates(x, updates)
        >>> print(loss(x) < first / 5)
        True

    Reference:
        S. Schotthöfer, H. L. Yang, S. Schnake, "Dynamical low-rank compression of neural
        networks with robustness under adversarial attacks" (2025), arXiv 2505.08022.
        Special case: without a penalty, :func:`lrjax.dlrt` with ``method="augmented"``.
    """
    plain = optax.chain(
        optax.scale_by_adam() if inner is None else inner,
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax.chain(
        add_condition_penalty(penalty),
        dynamical_low_rank(plain, tol, method="augmented", every=every),
    )

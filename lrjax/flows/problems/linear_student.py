"""A linear student of a linear teacher: what it should be, and a sample to learn from."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from ...linalg import times
from ...lowrank import LowRank


def student_loss(
    x: LowRank | Float[Array, "m n"],
    teacher: Float[Array, "m n"],
    covariance: Float[Array, "n n"],
) -> Scalar:
    """The expected loss of a student, ``½ E‖(T − X) z‖² = ½ tr (T − X) C (T − X)ᵀ``.

    Args:
        x: the student ``X``: an adapter, or the change by full fine-tuning.
        teacher: ``T``, for fine-tuning what the frozen weight lacks.
        covariance: ``C = E z zᵀ`` of the inputs.

    Returns:
        The loss.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> inputs = jnp.diag(jnp.array([1.0, 3.0]))
        >>> float(lrjax.flows.student_loss(jnp.zeros((2, 2)), jnp.eye(2), inputs))
        2.0
    """
    error = teacher - (x.materialize() if isinstance(x, LowRank) else x)
    return 0.5 * jnp.sum(times(error, covariance) * error)


def regression_loss(
    weights: Float[Array, " n"], inputs: Float[Array, "p n"], outputs: Float[Array, " p"]
) -> Scalar:
    """Least squares on p examples, ``‖y − Z w‖² / 2p``.

    Args:
        weights: ``w``.
        inputs: ``Z``, an example in each row.
        outputs: ``y``.

    Returns:
        The loss; its flow is :func:`linear_student`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> float(lrjax.flows.regression_loss(jnp.ones(1), jnp.ones((2, 1)), jnp.zeros(2)))
        0.5
    """
    return 0.5 * jnp.mean((outputs - times(inputs, weights[:, None])[:, 0]) ** 2)

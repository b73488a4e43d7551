import optax
from jaxtyping import ArrayLike

from .._arguments import checks_trees
from ..transforms import scale_by_gram
from ._common import on_nodes


@checks_trees
def prec_gd(
    learning_rate: optax.ScalarOrSchedule = 0.5,
    *,
    damping: ArrayLike | optax.Schedule = 1.0,
    f_min: ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Preconditioned gradient descent for factors that are wider than the rank.

    ``left ← left − η G_l (rightᵀright + λ_t I)⁻¹``, and ``right`` likewise, with a
    damping that falls with the error::

        λ_t = λ sqrt(max(value − f_min, 0))

    For half the sum of squared residuals that is λ times the size of the residual over
    √2. Where plain descent becomes sublinear as soon as the factors have more columns
    than the truth has rank, and a constant damping stalls at a level of its own, this
    converges linearly, whatever the condition number.

    Args:
        learning_rate: ``η``, a number or a schedule.
        damping: ``λ``, about 1 if the operator keeps norms, ``‖A(X)‖ ≈ ‖X‖``.
        f_min: the smallest value of the loss. With Gaussian noise of m measurements of
            standard deviation σ: ``m σ²/2``.

    Returns:
        An optax optimizer; its update needs ``value``. Leaves that are no LowRank nodes
        take plain gradient steps.

    Raises:
        ValueError: as :func:`lrjax.scale_by_gram`.

    Example:
        >>> import jax, lrjax
        >>> key = jax.random.key(0)
        >>> problem = lrjax.matrix_sensing(
        ...     key, (9, 7), 1, 400, objective=lrjax.recovery.Squared()
        ... )
        >>> start = lrjax.spectral_init(problem, 3, key=key)
        >>> solution = lrjax.solve(problem, lrjax.prec_gd(), start, steps=100)
        >>> bool(problem.relative_error(solution.x) < 1e-5)
        True

    Reference:
        J. Zhang, S. Fattahi, R. Zhang, "Preconditioned gradient descent for
        over-parameterized nonconvex matrix factorization" (2021), arXiv 2504.09708.
        Special case: without damping it is :func:`lrjax.scaled_gd`.
    """
    return optax.chain(
        on_nodes(scale_by_gram(damping, relative=False, loss_power=0.5, f_min=f_min)),
        optax.scale_by_learning_rate(learning_rate),
    )

import optax
from jaxtyping import ArrayLike

from .._arguments import checks_trees
from ..transforms import scale_by_gauss_newton
from ._common import Minimum, known_minimum, toward_minimum


@checks_trees
def levenberg_marquardt(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    f_min: Minimum = None,
    damping: ArrayLike | optax.Schedule = 1e-2,
    relative: bool = True,
    loss_power: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The Levenberg-Marquardt subgradient method, for any convex loss of the matrix.

    With ``J`` the derivative of ``(left, right) ↦ left @ right.T``::

        P = (JᵀJ + λ_t I)⁻¹ G

    solved in closed form, :func:`lrjax.scale_by_gauss_newton`. The step is ``η (value −
    f_min)/⟨G, P⟩ · P`` (Polyak) if ``f_min`` is given or searched, else ``η P /
    sqrt(⟨G, P⟩)``, for a geometric schedule of ``η``. Four policies for the damping:

    - constant: a number;
    - geometric, ``λ q^t``: ``damping=optax.exponential_decay(λ, 1, q)``;
    - proportional to the gap, ``λ (value − f_min)``: ``loss_power=1``;
    - to its root: ``loss_power=0.5``.

    For a smooth loss with a fixed step chain :func:`lrjax.scale_by_gauss_newton` with
    ``optax.scale_by_learning_rate``.

    Args:
        learning_rate: ``η``, a number or a schedule.
        f_min: the smallest value of the loss; ``"search"`` finds it on the way.
        damping: ``λ``; see :func:`lrjax.scale_by_gauss_newton`.
        relative: if True, ``λ`` multiplies the mean squared column norm; if False it is
            absolute.
        loss_power: the power of the gap in ``λ_t``, that of the searched level with
            ``f_min="search"``; ``None`` for a damping that does not follow the loss.

    Returns:
        An optax optimizer; with ``f_min`` its update needs ``value`` and ``grad``, and the
        step is one of all leaves. Those that are no LowRank nodes keep their gradient as
        direction.

    Raises:
        ValueError: for ``loss_power`` without ``f_min``; as the transforms that
            it chains.

    Example:
        >>> import jax, lrjax
        >>> key = jax.random.key(0)
        >>> problem = lrjax.matrix_sensing(key, (9, 7), 1, 400, outlier_fraction=0.1)
        >>> start = lrjax.spectral_init(problem, 3, key=key)
        >>> tx = lrjax.levenberg_marquardt(f_min="search", damping=1e-4)
        >>> solution = lrjax.solve(problem, tx, start, steps=150)
        >>> bool(problem.relative_error(solution.x) < 1e-4)
        True

    Reference:
        M. Díaz, L. Jiang, A. G. Labassi, "Preconditioned subgradient method for composite
        optimization: overparameterization and fast convergence" (2025), arXiv 2509.11486.
        Special case: ``damping=0`` is the Gauss-Newton subgradient method.
    """
    if loss_power is not None and f_min is None:
        raise ValueError(
            "levenberg_marquardt(loss_power=…) needs the smallest loss: pass f_min as a "
            'number, f_min="search", or a geometric damping, '
            "optax.exponential_decay(λ, 1, q)."
        )
    direction = scale_by_gauss_newton(
        damping,
        relative=relative,
        loss_power=loss_power,
        f_min=known_minimum(f_min),
        normalize=f_min is None,
    )
    return optax.chain(
        toward_minimum(direction, f_min),
        optax.scale_by_learning_rate(learning_rate),
    )

import optax
from jaxtyping import ArrayLike

from ...transforms import (
    add_nuclear_norm,
    rebalance as rebalance_factors,
    scale_by_gram,
    unit_norm,
)
from ._step import Minimum, known_minimum, step_size


def opsa(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    f_min: Minimum = None,
    reg: ArrayLike = 0.0,
    damping: ArrayLike | optax.Schedule = 0.1,
    relative: bool = True,
    loss_power: ArrayLike | None = 1.0,
    rebalance: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Overparameterized preconditioned subgradient descent, for a rank that is unknown.

    With factors wider than the rank of the truth, a loss with a kink and::

        P_l = (G_l + ρ left)(rightᵀright + λ_t I)⁻¹      and P_r likewise,

    the step is ``η (value − f_min)/⟨G, P⟩ · P`` (Polyak) if ``f_min`` is given or
    searched, else ``η P / sqrt(⟨G, P⟩)``, a step of length η in the metric of the
    preconditioner.

    Neither the rank nor the noise has to be known. On data that are only approximately
    low rank the nuclear norm term ``reg``, not the damping, makes surplus columns
    harmless: for the summed l1 loss ``0.4 sqrt(max(m, n))`` is a good weight, whatever
    the scale of the data. The learning rate may start at a sixth of ``‖X‖_F`` and fall
    by 5 % a step.

    With ``f_min`` the damping is proportional to the optimality gap, ``λ_t = λ (value −
    f_min)``: it has to be there at the start, where the surplus columns are noise, and
    has to vanish at the end, since a constant damping of balanced factors slows linear
    convergence to sublinear. Without ``f_min`` the gap is not known and λ is a constant
    or your schedule: a geometric one has the same effect.

    Args:
        learning_rate: ``η``, a number or a schedule.
        f_min: the smallest value of the loss, if it is known; ``"search"`` finds it on
            the way, :func:`lrjax.scale_by_level`.
        reg: ``ρ``, weight of the nuclear norm.
        damping: ``λ``; see :func:`lrjax.scale_by_gram`.
        relative: whether ``λ`` is relative to the mean squared column norm.
        loss_power: the power of the gap in ``λ_t``, when ``f_min`` is given; ``None`` for
            a constant damping.
        rebalance: balance the factors after every step.

    Returns:
        An optax optimizer; with ``f_min`` its update needs ``value`` and ``grad``.

    Raises:
        ValueError: as the transforms it chains.

    Example:
        The authors' code: constant damping, and a spectral start of which the left
        factor is doubled and the right one halved. That imbalance is what keeps the
        convergence linear under a constant damping:

        >>> import jax, lrjax
        >>> key = jax.random.key(0)
        >>> problem = lrjax.matrix_sensing(key, (9, 7), 1, 300, outlier_fraction=0.1)
        >>> start = lrjax.refactor(lrjax.spectral_init(problem, 2, key=key), scale=2.0)
        >>> tx = lrjax.opsa(
        ...     f_min=problem.loss(problem.truth),
        ...     damping=0.1,
        ...     relative=False,
        ...     loss_power=None,
        ... )
        >>> solution = lrjax.solve(problem, tx, start, steps=200)
        >>> bool(problem.relative_error(solution.x) < 1e-4)
        True

        The regularized form of the paper has one weight λ in both places and balances:

        >>> weight = 0.1
        >>> tx = lrjax.opsa(
        ...     reg=weight,
        ...     damping=weight,
        ...     relative=False,
        ...     loss_power=None,
        ...     rebalance=True,
        ... )

    Reference:
        P. Giampouras, H. Cai, R. Vidal, "OPSA" (2025), arXiv 2410.16826. Special case:
        ``reg = damping = 0`` at the true rank is :func:`lrjax.scaled_subgradient`.
    """
    known = known_minimum(f_min)
    return optax.chain(
        add_nuclear_norm(reg),
        scale_by_gram(
            damping,
            relative=relative,
            phi=unit_norm if f_min is None else None,
            loss_power=None if known is None else loss_power,
            f_min=0.0 if known is None else known,
        ),
        step_size(f_min),
        optax.scale_by_learning_rate(learning_rate),
        rebalance_factors() if rebalance else optax.identity(),
    )

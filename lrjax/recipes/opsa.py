import optax
from jaxtyping import ArrayLike

from ..transforms import (
    add_nuclear_norm,
    rebalance as rebalance_factors,
    scale_by_gram,
    unit_norm,
)
from ._common import Minimum, known_minimum, on_nodes, toward_minimum


def opsa(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    f_min: Minimum = "search",
    nuclear_weight: ArrayLike = 0.0,
    damping: ArrayLike | optax.Schedule = 0.1,
    relative: bool = True,
    loss_power: ArrayLike | None = 1.0,
    rebalance: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Overparameterized preconditioned subgradient descent, for a rank that is unknown.

    With factors wider than the rank of the truth, a loss with a kink and::

        P_l = (G_l + ρ left)(rightᵀright + λ_t I)⁻¹      and P_r likewise,

    the step is ``η (value − f_min)/⟨G, P⟩ · P``, Polyak's, with a smallest loss ``f_min``
    that is searched on the way or given; with ``f_min=None`` it is ``η P / sqrt(⟨G, P⟩)``,
    a step of length η in the metric of the preconditioner.

    Neither the rank nor the noise has to be known. On data that are only approximately
    low rank the nuclear norm term, not the damping, makes surplus columns
    harmless: for the summed l1 loss ``0.4 sqrt(max(m, n))`` is a good weight, whatever
    the scale of the data. With such a term pass ``f_min=None`` and a learning rate that
    starts at a sixth of ``‖X‖_F`` and falls by 5 % a step.

    With ``f_min`` the damping is proportional to the optimality gap, ``λ_t = λ (value −
    f_min)``: it has to be there at the start, where the surplus columns are noise, and
    has to vanish at the end, since a constant damping of balanced factors slows linear
    convergence to sublinear. Without ``f_min`` the gap is not known and λ is a constant
    or your schedule: a geometric one has the same effect.

    Args:
        learning_rate: ``η``, a number or a schedule.
        f_min: the smallest value of the loss; ``"search"`` finds it on the way,
            :func:`lrjax.scale_by_target_level`. ``None`` for steps of a given length.
        nuclear_weight: ``ρ``, weight of the nuclear norm.
        damping: ``λ``; see :func:`lrjax.scale_by_gram`.
        relative: if True, ``λ`` multiplies the mean squared column norm; if False it is
            absolute.
        loss_power: the power of the gap in ``λ_t``, unless ``f_min=None``; ``None`` for a
            constant damping.
        rebalance: if True, the factors are balanced after every step.

    Returns:
        An optax optimizer; with ``f_min`` its update needs ``value`` and ``grad``, and the
        step is one of all leaves. Those that are no LowRank nodes keep their gradient as
        direction.

    Raises:
        ValueError: as the transforms it chains.

    Example:
        Told neither the rank nor the smallest loss:

        >>> import jax, lrjax
        >>> key = jax.random.key(0)
        >>> problem = lrjax.matrix_sensing(key, (9, 7), 1, 300, outlier_fraction=0.1)
        >>> start = lrjax.spectral_init(problem, 2, key=key)
        >>> solution = lrjax.solve(problem, lrjax.opsa(), start, steps=200)
        >>> bool(problem.relative_error(solution.x) < 1e-5)
        True

        The authors' code: constant damping, and a spectral start of which the left
        factor is doubled and the right one halved. That imbalance is what keeps the
        convergence linear under a constant damping:

        >>> start = lrjax.refactor(start, scale=2.0)
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
        ...     f_min=None,
        ...     nuclear_weight=weight,
        ...     damping=weight,
        ...     relative=False,
        ...     loss_power=None,
        ...     rebalance=True,
        ... )

    Reference:
        P. Giampouras, H. Cai, R. Vidal, "Guarantees of a preconditioned subgradient
        algorithm for overparameterized asymmetric low-rank matrix recovery" (2025), arXiv
        2410.16826. Special case: ``nuclear_weight = damping = 0`` at the true rank is
        :func:`lrjax.scaled_subgradient`.
    """
    direction = optax.chain(
        add_nuclear_norm(nuclear_weight),
        scale_by_gram(
            damping,
            relative=relative,
            phi=unit_norm if f_min is None else None,
            loss_power=None if f_min is None else loss_power,
            f_min=known_minimum(f_min),
        ),
    )
    return optax.chain(
        toward_minimum(direction, f_min),
        optax.scale_by_learning_rate(learning_rate),
        on_nodes(rebalance_factors()) if rebalance else optax.identity(),
    )

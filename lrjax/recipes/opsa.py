from typing import Literal

import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike

from .._arguments import checks_trees
from ..linalg import nonzero
from ..transforms import (
    add_nuclear_norm,
    rebalance as rebalance_factors,
    scale_by_gram,
    unit_norm,
)
from ._common import Minimum, known_minimum, on_nodes, toward_minimum


@checks_trees
def opsa(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    f_min: Minimum | Literal["auto"] = "auto",
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
    that is searched on the way or given; with a schedule as learning rate it is
    ``η_t P / sqrt(⟨G, P⟩)``, a step of length ``η_t`` in the metric of the preconditioner.

    The damping has to be there at the start, where the surplus columns are noise, and has
    to vanish at the end: a constant damping of balanced factors slows linear convergence
    to sublinear. It is proportional to the optimality gap, ``λ_t = λ (value − f_min)``, of
    the searched level where the smallest loss is not known; where the steps follow a
    schedule, it falls with it, ``λ_t = λ η_t/η_0``.

    Neither the rank nor the noise has to be known: ``opsa()`` is told nothing, and
    converges for factors as wide as the matrix. On data that are only approximately
    low rank the nuclear norm term, not the damping, makes surplus columns
    harmless: for the summed l1 loss ``0.4 sqrt(max(m, n))`` is a good weight, whatever
    the scale of the data. With such a term, and wherever nothing is to be searched, use a
    schedule that starts at a sixth of ``‖X‖_F`` and falls by 5 % a step::

        lrjax.opsa(optax.exponential_decay(lrjax.norm(start) / 6, 1, 0.95))

    Args:
        learning_rate: ``η``, a number, or a schedule of the length of the steps.
        f_min: the smallest value of the loss; ``"search"`` finds it on the way,
            :func:`lrjax.scale_by_target_level`. ``None`` for steps of a given length. By
            default ``None`` with a schedule as learning rate, ``"search"`` with a number.
        nuclear_weight: ``ρ``, weight of the nuclear norm.
        damping: ``λ``; see :func:`lrjax.scale_by_gram`. A schedule is taken as it is.
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
    if isinstance(f_min, str) and f_min == "auto":
        f_min = None if callable(learning_rate) else "search"
    if f_min is None and callable(learning_rate) and not callable(damping):
        damping = _falling_with(learning_rate, damping)
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


def _falling_with(rate: optax.Schedule, damping: ArrayLike) -> optax.Schedule:
    """A damping in proportion to the steps; constant if these start at zero."""

    def schedule(count):
        first = jnp.asarray(rate(0))
        return damping * jnp.where(first > 0, rate(count) / nonzero(first), 1)

    return schedule

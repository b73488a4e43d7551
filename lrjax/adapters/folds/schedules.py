import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike


def rewarm(schedule: optax.Schedule, k: int | Array, steps: ArrayLike) -> optax.Schedule:
    """A schedule that warms up again after each fold.

    In the ``steps`` updates after the updates ``k, 2k, …`` the rate rises in a straight
    line from zero to where ``schedule`` is at the end of them; all others are those of
    ``schedule``. Optimizers whose moments were forgotten, under a count that runs on, take
    steps that are too large there.

    Args:
        schedule: of the count of updates.
        k: the period of the folds; may be traced.
        steps: how many updates warm up; may be traced.

    Returns:
        The schedule.

    Raises:
        ValueError: if ``k`` is below one, or ``steps`` outside of ``0 … k``.

    Example:
        >>> import lrjax, optax
        >>> rate = lrjax.adapters.rewarm(optax.constant_schedule(1.0), 10, 4)
        >>> [float(rate(t)) for t in (0, 9, 10, 11, 12, 13, 14, 20)]
        [1.0, 1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 0.0]

    Reference:
        V. Lialin et al., "ReLoRA: high-rank training through low-rank updates" (2023),
        arXiv:2307.05695. With ``steps=0`` it is the schedule.
    """
    known = not isinstance(k, Tracer) and not isinstance(steps, Tracer)
    if known and not np.all((np.asarray(k) >= 1) & (np.asarray(steps) >= 0)):
        raise ValueError(
            f"rewarm needs a period of at least one step and no negative number of steps "
            f"to warm up, got k={k} and steps={steps}."
        )
    if known and np.any(np.asarray(steps) > np.asarray(k)):
        raise ValueError(
            f"rewarm warms up for {steps} steps after each fold, and the next one comes "
            f"after {k}: steps must not be more than k."
        )

    def rate(count):
        phase = count % k
        warms = (count >= k) & (phase < steps)
        end = schedule(count - phase + steps)
        part = phase / jnp.where(warms, steps, 1)
        return jnp.where(warms, part * end, schedule(count))

    return rate


def relora_schedule(
    peak: ArrayLike,
    steps: int,
    k: int | Array,
    *,
    warmup: int = 500,
    rewarmup: ArrayLike = 100,
    floor: ArrayLike = 0.1,
) -> optax.Schedule:
    """ReLoRA's schedule: a cosine that begins anew after each fold, under one envelope.

    From zero to ``peak`` in the first ``warmup`` updates, then a cosine down to
    ``floor · peak`` after ``steps``; and in the ``rewarmup`` updates after each fold from
    zero up to the cosine again. Rates about twice those of dense training are usual.

    Args:
        peak: the largest rate.
        steps: the number of all updates.
        k: the period of the folds.
        warmup: updates of the first warm-up.
        rewarmup: updates of the others.
        floor: the last rate over the largest.

    Returns:
        The schedule.

    Raises:
        ValueError: as :func:`rewarm` does; if ``warmup`` is not less than ``steps``.

    Example:
        >>> import lrjax
        >>> rate = lrjax.adapters.relora_schedule(1e-3, 20_000, 5_000)
        >>> [round(1e3 * float(rate(t)), 3) for t in (0, 500, 4_999, 5_000, 5_050, 5_100)]
        [0.0, 1.0, 0.887, 0.0, 0.441, 0.882]

    Reference:
        V. Lialin et al., "ReLoRA: high-rank training through low-rank updates" (2023),
        arXiv:2307.05695; the numbers of updates are those of the published code. Without
        folds it is ``optax.warmup_cosine_decay_schedule``.
    """
    if warmup >= steps:
        raise ValueError(
            f"relora_schedule warms up for {warmup} of {steps} updates: warmup must be "
            "less than steps."
        )
    cosine = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, peak * floor)
    return rewarm(cosine, k, rewarmup)

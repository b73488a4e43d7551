from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float


def crossing_time(
    ts: Float[Array, " t"], values: Float[Array, " t"], level: ArrayLike
) -> Float[Array, ""]:
    """When a curve first comes down to a level; interpolated between the samples.

    Between a sample above and one below the logarithm is taken to be linear where both
    are positive, as it is for anything that decays.

    Args:
        ts: increasing times.
        values: the curve at these times. Non-finite values count as above.
        level: the level.

    Returns:
        The time; infinite if the curve stays above.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> ts = jnp.arange(5.0)
        >>> print(lrjax.metrics.crossing_time(ts, jnp.exp(-ts), jnp.exp(-2.5)).round(3))
        2.5
    """
    level = jnp.asarray(level)
    below = values <= level
    index = jnp.argmax(below)
    before = jnp.maximum(index - 1, 0)
    high, low = values[before], values[index]
    positive = (low > 0) & (level > 0)
    scale = lambda x: jnp.where(positive, jnp.log(jnp.where(positive, x, 1)), x)
    drop = scale(high) - scale(low)
    part = jnp.where(
        drop > 0, (scale(high) - scale(level)) / jnp.where(drop > 0, drop, 1), 1
    )
    time = jnp.where(below[0], ts[0], ts[before] + part * (ts[index] - ts[before]))
    return jnp.where(jnp.any(below), time, jnp.inf)


def fitted_rate(
    ts: Float[Array, " t"],
    amplitude: Float[Array, " t"],
    where: Bool[Array, " t"],
) -> Float[Array, ""]:
    """The rate k of an exponential decay ``amplitude ∝ exp(−kt)``, by least squares.

    The logarithm of a loss decays at twice the rate of its residual: hand over the
    residual's norm, ``sqrt(2·loss)``, for the rate of the parameters.

    Args:
        ts: times.
        amplitude: positive where it is used.
        where: which samples to use; at least two. Choose a window where the decay is
            asymptotic and above the rounding error.

    Returns:
        The rate; NaN for fewer than two samples.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> ts = jnp.linspace(0, 1, 9)
        >>> rate = lrjax.metrics.fitted_rate(ts, 5 * jnp.exp(-3 * ts), ts > 0.2)
        >>> print(rate.round(3))
        3.0
    """
    use = where & (amplitude > 0)
    count = jnp.sum(use)
    log = jnp.log(jnp.where(use, amplitude, 1))
    mean = lambda x: jnp.sum(jnp.where(use, x, 0)) / count
    t = jnp.where(use, ts - mean(ts), 0)
    log = jnp.where(use, log - mean(log), 0)
    return jnp.where(count >= 2, -jnp.sum(t * log) / jnp.sum(t * t), jnp.nan)


class PhaseTimes(NamedTuple):
    """When the three phases of a training from a small initialization end.

    Attributes:
        alignment: the singular spaces have turned to the target's.
        escape: the loss has left the plateau of the saddle.
        convergence: the loss is down to the local, linearly converging regime.
    """

    alignment: Float[Array, ""]
    escape: Float[Array, ""]
    convergence: Float[Array, ""]


def phase_times(
    ts: Float[Array, " t"],
    loss: Float[Array, " t"],
    misalignment: Float[Array, " t"],
    *,
    aligned: ArrayLike = 1e-2,
    escaped: ArrayLike = 0.9,
    local: ArrayLike = 1e-2,
) -> PhaseTimes:
    """When a run from a small initialization aligns, escapes the saddle and is local.

    Args:
        ts: increasing times.
        loss: the loss at these times, above its limit.
        misalignment: the distance of the singular spaces, for example
            :func:`misalignment`.
        aligned: the misalignment that counts as aligned.
        escaped: the fraction of the first loss at which the saddle is left.
        local: the fraction of the first loss at which convergence is local.

    Returns:
        Three times; infinite where a phase did not end.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> ts = jnp.linspace(0, 20, 201)
        >>> loss = 1 / (1 + jnp.exp(2 * (ts - 10)))
        >>> times = lrjax.metrics.phase_times(ts, loss, jnp.exp(-ts))
        >>> [round(float(t), 1) for t in times]
        [4.6, 8.9, 12.3]
    """
    return PhaseTimes(
        crossing_time(ts, misalignment, aligned),
        crossing_time(ts, loss, escaped * loss[0]),
        crossing_time(ts, loss, local * loss[0]),
    )

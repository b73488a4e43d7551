"""When a loss has come down and stays, and when something new has begun."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax.continual import PlateauDetector


@jax.jit
def fired(detector, losses):
    return jax.lax.scan(lambda own, x: own.update(x), detector, losses)[1]


def reference(losses, window=5, level=0.5, spread=0.1):
    """The rule with a list, over losses that are all finite."""
    peak, rearm, armed, out = 0.0, 0.0, True, []
    for i in range(len(losses)):
        last = np.asarray(losses[max(0, i + 1 - window) : i + 1], np.float64)
        now = False
        if len(last) == window:
            mean, std = last.mean(), last.std()
            if not armed and mean > rearm:
                armed, peak = True, mean
            peak = max(peak, mean)
            if armed and mean < level * peak and std < spread * peak:
                now, armed, rearm = True, False, mean + std
        out.append(now)
    return out


def sawtooth(key, tasks=3, steps=60):
    """Losses that fall at each task and begin anew at the next, with noise."""
    fall = jnp.tile(2.0 * jnp.exp(-jnp.arange(steps) / 8.0) + 0.2, tasks)
    return fall * (1 + 0.1 * jr.normal(key, fall.shape))


def test_it_is_the_rule_and_fires_once_a_task(getkey):
    losses = sawtooth(getkey())
    got = np.asarray(fired(PlateauDetector.start(), losses))
    np.testing.assert_array_equal(got, reference(np.asarray(losses)))
    np.testing.assert_array_equal(got.reshape(3, 60).sum(1), [1, 1, 1])


def test_the_scale_of_the_loss_does_not_matter(getkey):
    losses = sawtooth(getkey())
    want = fired(PlateauDetector.start(), losses)
    for scale in (2.0**-20, 2.0**20):  # exact in binary
        got = fired(PlateauDetector.start(), scale * losses)
        np.testing.assert_array_equal(got, want)


def test_it_is_silent_before_the_loss_has_come_down_and_without_a_peak():
    flat = jnp.full(40, 3.0)
    assert not np.any(fired(PlateauDetector.start(), flat))
    falling = jnp.concatenate([flat, jnp.full(80, 0.5)])
    assert np.sum(fired(PlateauDetector.start(), falling)) == 1


def test_losses_that_are_not_finite_are_not_seen(getkey):
    losses = sawtooth(getkey())
    with_holes = jnp.concatenate([losses[:7], jnp.array([jnp.nan, jnp.inf]), losses[7:]])
    got = np.asarray(fired(PlateauDetector.start(), with_holes))
    assert not got[7:9].any()
    want = fired(PlateauDetector.start(), losses)
    np.testing.assert_array_equal(np.delete(got, [7, 8]), want)


def test_thresholds_are_members_of_a_vmap(getkey):
    losses = sawtooth(getkey())
    levels = jnp.array([0.5, 0.01])
    got = jax.vmap(lambda level: fired(PlateauDetector.start(level=level), losses))(levels)
    np.testing.assert_array_equal(got[0], fired(PlateauDetector.start(), losses))
    assert not np.any(got[1])


def test_errors():
    with pytest.raises(ValueError, match="at least two losses, got 1"):
        PlateauDetector.start(1)

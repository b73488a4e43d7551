"""Calibration: against slow loops, closed forms, masks, and what calibrates itself."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax import metrics
from tests.helpers import assert_close
from tests.reference import calibration as slow


N, C = 60, 4
LOSSES = {
    "negative_log_likelihood": {},
    "brier_score": {},
    "expected_calibration_error": {"bins": 7},
    "expected_calibration_error of equal mass": {"bins": 7, "equal_mass": True},
}


def example(key, n=N):
    kz, ky, kw = jr.split(key, 3)
    weights = jr.uniform(kw, (n,)).at[::5].set(0)
    return 3 * jr.normal(kz, (n, C)), jr.randint(ky, (n,), 0, C), weights


def called(name, *args):
    return getattr(metrics, name.split()[0])(*args, **LOSSES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_is_the_loop_with_weights_masks_and_vmap(name, getkey):
    logits, labels, weights = example(getkey())
    reference = getattr(slow, name.split()[0])
    every = jax.jit(lambda *args: called(name, *args))
    got = every(logits, labels, weights)
    assert_close(got, reference(logits, labels, weights, **LOSSES[name]), rtol=1e-5)
    even = jnp.ones(N)
    want = reference(logits, labels, even, **LOSSES[name])
    assert_close(called(name, logits, labels), want, rtol=1e-5)
    # Rows of weight zero may hold anything; a weight of two is the example twice.
    broken = logits.at[::5].set(jnp.nan), labels.at[::5].set(99), weights
    assert_close(every(*broken), got)
    there = weights > 0
    assert_close(called(name, logits[there], labels[there], weights[there]), got, rtol=1e-5)
    both = jax.vmap(every)(*(jnp.stack([x, x[::-1]]) for x in (logits, labels, weights)))
    assert_close(both[0], got, rtol=1e-5)
    assert_close(every(logits, labels, 0 * weights), jnp.zeros(()))
    # Logits are those of their probabilities.
    log_p = jnp.log(jax.nn.softmax(logits))
    assert_close(every(log_p, labels, weights), got, rtol=1e-4)


@pytest.mark.slow
def test_closed_forms():
    uniform, labels = jnp.zeros((8, C)), jnp.arange(8) % C
    assert_close(metrics.negative_log_likelihood(uniform, labels), jnp.log(C), rtol=1e-6)
    assert_close(metrics.brier_score(uniform, labels), jnp.array(1 - 1 / C), rtol=1e-6)
    sure = 1e3 * jax.nn.one_hot(labels, C)
    wrong = jnp.roll(sure, 1, axis=1)
    for loss in (metrics.brier_score, metrics.negative_log_likelihood):
        assert float(loss(sure, labels)) == 0
    assert float(metrics.brier_score(wrong, labels)) == 2
    assert float(metrics.negative_log_likelihood(wrong, labels)) == 1e3
    for mass in (False, True):
        ece = lambda z, mass=mass: metrics.expected_calibration_error(
            z, labels, equal_mass=mass
        )
        assert float(ece(sure)) == 0
        assert float(ece(wrong)) == 1


@pytest.mark.slow_but("False")
@pytest.mark.parametrize("mass", [False, True])
def test_bins_hold_all_and_are_as_told(mass, getkey):
    logits, labels, weights = example(getkey())
    find = lambda w: metrics.reliability_bins(logits, labels, w, bins=6, equal_mass=mass)
    found = jax.jit(find)(weights)
    want = slow.reliability_bins(logits, labels, weights, 6, mass)
    for got, by_loop in zip(found[1:], want, strict=True):
        assert_close(got, jnp.asarray(by_loop, jnp.float32), rtol=1e-5)
    assert abs(float(jnp.sum(found.share)) - 1) < 1e-6
    assert np.all(np.diff(found.edges) >= 0)
    inside = np.asarray(found.share) > 0
    confidence = np.asarray(found.confidence)
    assert np.all(confidence[inside] <= np.asarray(found.edges)[1:][inside] + 1e-6)
    if mass:  # examples of one weight: none is split
        shares = find(None).share
        assert_close(shares, jnp.full(6, 1 / 6), rtol=1e-6)
    one = lambda **kw: metrics.expected_calibration_error(logits, labels, bins=1, **kw)
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    right = np.mean(p.argmax(1) == np.asarray(labels))
    assert abs(float(one(equal_mass=mass)) - abs(right - p.max(1).mean())) < 1e-5


@pytest.mark.slow
def test_labels_that_are_drawn_from_the_predictions_are_calibrated(getkey):
    """The error is that of b binomial means, at most about √(b/n)."""
    n, bins = 20_000, 10
    logits = 2 * jr.normal(getkey(), (n, C))
    labels = jr.categorical(getkey(), logits)
    for mass in (False, True):
        ece = lambda z, mass=mass: float(
            metrics.expected_calibration_error(z, labels, bins=bins, equal_mass=mass)
        )
        assert ece(logits) < (bins / n) ** 0.5
        assert ece(3 * logits) > 0.1
    fit = jax.jit(metrics.fit_temperature)(2.5 * logits, labels)
    # Its deviation is T / √(n Var[z]), and the variance of the logits is more than 1.
    assert abs(float(fit.temperature) - 2.5) < 5 * 2.5 / n**0.5
    assert bool(fit.converged)
    assert float(fit.nll_after) < float(fit.nll_before)


@pytest.mark.slow
def test_the_temperature_is_that_of_the_least_loss(getkey):
    logits, labels, weights = example(getkey())
    labels = jnp.where(jr.bernoulli(getkey(), 0.6, (N,)), jnp.argmax(logits, 1), labels)
    fit = jax.jit(metrics.fit_temperature)
    found = fit(logits, labels, weights)
    best = slow.temperature(logits, labels, weights)
    assert bool(found.converged)
    assert abs(float(found.temperature) / best - 1) < 1e-3
    # Logits in other units, and shifted by a number for each example.
    shift = jr.normal(getkey(), (N, 1))
    for scale in (1e-4, 1e3):
        other = fit(scale * logits + shift, labels, weights)
        assert bool(other.converged)
        assert abs(float(other.temperature) / (scale * best) - 1) < 2e-3
    keys = jr.split(getkey(), 3)
    each = [example(k) for k in keys]
    stacked = [jnp.stack(x) for x in zip(*each, strict=True)]
    many = jax.vmap(metrics.fit_temperature)(*stacked)
    assert many.temperature.shape == (3,)


def test_a_temperature_that_is_nowhere_is_said(getkey):
    logits = jr.normal(getkey(), (N, C))
    right, wrong = jnp.argmax(logits, 1), jnp.argmin(logits, 1)
    for labels in (right, wrong):
        found = metrics.fit_temperature(logits, labels)
        assert not bool(found.converged)
        assert np.all(np.isfinite(found[:3]))
    assert not bool(metrics.fit_temperature(0 * logits, right).converged)


def test_refusals():
    logits, labels = jnp.zeros((3, 2)), jnp.array([0, 1, 2])
    with pytest.raises(ValueError, match="labels from 0 to 2: labels are whole numbers"):
        metrics.brier_score(logits, labels)
    with pytest.raises(ValueError, match=r"labels of shape \(2,\)"):
        metrics.negative_log_likelihood(logits, labels[:2])
    with pytest.raises(ValueError, match=r"weights of shape \(1,\)"):
        metrics.fit_temperature(logits, labels % 2, jnp.ones(1))
    with pytest.raises(ValueError, match="at least one bin, got 0"):
        metrics.expected_calibration_error(logits, labels % 2, bins=0)

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.linalg import expm

from lrjax import flows, gradient_flow

from ..helpers import all_finite, assert_close


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(12, 5), (4, 7)])
def test_the_flow_of_least_squares(shape, getkey):
    inputs, outputs = jr.normal(getkey(), shape), jr.normal(getkey(), shape[:1])
    start = jr.normal(getkey(), shape[1:])
    times = jnp.array([0.0, 0.5, 3.0, 40.0])
    exact = flows.linear_student(times, inputs, outputs, start)
    flow = gradient_flow(
        flows.regression_loss, start, inputs, outputs, t1=40.0, ts=times, rtol=1e-10
    ).params
    assert_close(flow, exact, rtol=1e-8)
    forever = flows.linear_student(jnp.array(1e9), inputs, outputs, start)
    shift = np.linalg.pinv(inputs) @ (outputs - inputs @ start)
    assert_close(forever, start + shift, condition=1e4)


@pytest.mark.parametrize("shape", [(12, 5), (4, 7)])
def test_the_mean_error_of_given_examples(shape, getkey):
    """By the matrix exponential: the weights are affine in the noise."""
    inputs, wrong = np.asarray(jr.normal(getkey(), shape)), jr.normal(getkey(), shape[1:])
    (p, n), noise = shape, 0.3
    covariance = inputs.T @ inputs / p
    values, vectors = np.linalg.eigh(covariance)
    for t in (0.0, 0.7, 5.0):
        decay = expm(-t * covariance)
        gain = (np.eye(n) - decay) @ np.linalg.pinv(inputs)
        want = np.sum((decay @ wrong) ** 2) + noise * np.sum(gain**2)
        got = flows.student_error(
            jnp.array(t), jnp.maximum(values, 0), (vectors.T @ wrong) ** 2, noise / p
        )
        np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize("ratio", [0.3, 0.99, 1.0, 1.7])
def test_the_quadrature_has_the_moments_of_marchenko_and_pastur(ratio):
    values, weights = flows.marchenko_pastur(ratio, 64)
    moments = [jnp.sum(weights * values**k) for k in range(4)]
    want = [1, 1, 1 + ratio, 1 + 3 * ratio + ratio**2]
    np.testing.assert_allclose(moments, want, rtol=1e-13)
    if ratio > 1.5:
        np.testing.assert_allclose(weights[0], 1 - 1 / ratio, rtol=1e-12)


@pytest.mark.parametrize("ratio", [0.3, 1.0, 1.7])
def test_the_large_limit_is_the_integral(ratio):
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    signal, noise, t = 2.0, 0.5, 3.0

    def mean(theta):  # the density, in an angle in which it is smooth
        x = 1 + ratio + 2 * ratio**0.5 * np.cos(theta)
        error = signal * np.exp(-2 * x * t)
        error += ratio * noise * (1 - np.exp(-x * t)) ** 2 / x
        return error * 2 * np.sin(theta) ** 2 / np.pi / x

    want = quad(mean, 0, np.pi, epsabs=1e-12)[0] + signal * max(1 - 1 / ratio, 0)
    values, weights = flows.marchenko_pastur(ratio)
    assert low - 1e-12 <= values[-1] <= values[1] <= high + 1e-12
    got = flows.student_error(
        jnp.array(t), values, weights * signal, weights * ratio * noise
    )
    np.testing.assert_allclose(got, want, rtol=1e-9)


N, SIGNAL, NOISE = 120, 1.0, 0.5


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.6, 1.5])
def test_the_large_limit_is_the_mean_over_draws(ratio, getkey):
    p, draws = round(N / ratio), 40
    values, weights = flows.marchenko_pastur(N / p)
    limit = (values, weights * SIGNAL, weights * N / p * NOISE)
    best = flows.best_stopping_time(*limit)
    times = best * jnp.array([0.1, 0.6, 1.0, 1 / 0.6, 10.0])

    @jax.jit
    @jax.vmap
    def errors(key):
        kz, kw, kn = jr.split(key, 3)
        inputs = jr.normal(kz, (p, N))
        teacher = jr.normal(kw, (N,)) * (SIGNAL / N) ** 0.5
        outputs = inputs @ teacher + NOISE**0.5 * jr.normal(kn, (p,))
        found = flows.linear_student(times, inputs, outputs, jnp.zeros(N))
        return jnp.sum((found - teacher[None, :]) ** 2, axis=1)

    drawn = np.asarray(errors(jr.split(getkey(), draws)))
    standard = drawn.std(axis=0, ddof=1) / draws**0.5
    predicted = np.asarray(flows.student_error(times, *limit))
    # The mean is off by about 1/n, besides its standard error.
    assert np.all(abs(drawn.mean(axis=0) - predicted) <= 5 * standard + 2 / N * predicted)
    assert np.all(standard <= 0.05 * predicted)
    for other in (1, 3):  # on the same draws: it is worse to stop sooner or later
        more = drawn[:, other] - drawn[:, 2]
        assert more.mean() >= 3 * more.std(ddof=1) / draws**0.5


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.2, 1.0, 3.0])
def test_the_best_time_is_a_minimum(ratio):
    values, weights = flows.marchenko_pastur(ratio)
    problem = (values, weights, weights * ratio * 0.1)
    best = flows.best_stopping_time(*problem)
    error = lambda t: flows.student_error(t, *problem)
    slope, bend = jax.grad(error), jax.grad(jax.grad(error))
    assert jnp.abs(slope(best)) <= 1e-12 * error(best) / best
    assert bend(best) > 0
    around = best * jnp.logspace(-2, 2, 400)
    assert jnp.min(error(around)) >= error(best) * (1 - 1e-12)


@pytest.mark.slow
def test_times_of_one_mode_and_of_no_noise():
    rate, signal, noise = 0.7, 2.0, 0.3
    got = flows.best_stopping_time(jnp.array([0.0, rate]), signal, noise)
    np.testing.assert_allclose(got, np.log(1 + rate * signal / noise) / rate)
    assert flows.best_stopping_time(jnp.ones(2), 1.0, 0.0) == jnp.inf
    over = jax.jit(jax.vmap(flows.best_stopping_time, (None, 0, None)))
    times = over(jnp.array([0.5, 1.0]), jnp.array([0.0, 1.0, 5.0]), 0.5)
    assert times[0] == 0
    assert times[0] < times[1] < times[2]
    slopes = jax.jacrev(flows.student_error, (0, 1))(
        jnp.array([0.0, 2.0]), jnp.array([0.0, 1.0]), 1.0, 1.0
    )
    assert all_finite(slopes)

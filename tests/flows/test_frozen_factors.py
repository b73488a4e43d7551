import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import LowRank, flows, gradient_flow

from ..helpers import assert_close, with_spectrum


M, N, R = 6, 4, 2


def drawn(getkey):
    """A teacher, inputs of condition 10 and orthonormal factors."""
    teacher = jr.normal(getkey(), (M, N))
    root = with_spectrum(getkey(), N, N, jnp.array([1.5, 1.0, 0.7, 0.5]), jnp.float64)
    sides = (jnp.linalg.qr(jr.normal(getkey(), (k, R)))[0] for k in (M, N))
    return teacher, root @ root.T, LowRank(*sides)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_flow_of_one_factor_ends_at_its_regression(side, getkey):
    teacher, covariance, x = drawn(getkey)
    if side == "left":
        start, freeze = LowRank(jnp.zeros((M, R)), x.right), {"right": 0.0}
        best = flows.best_left(x.right, teacher, covariance)
    else:
        start, freeze = LowRank(x.left, jnp.zeros((N, R))), {"left": 0.0}
        best = flows.best_right(x.left, teacher)
    end = gradient_flow(
        flows.student_loss,
        start,
        teacher,
        covariance,
        t1=150.0,
        rtol=1e-8,
        precondition=lrjax.scale_factors(**freeze),
    ).params
    assert_close(end, best, rtol=1e-6)


def test_losses_are_those_of_projections(getkey):
    teacher, covariance, x = drawn(getkey)
    errors = flows.frozen_factor_errors(x, teacher, covariance)
    t, c, a, b = map(np.asarray, (teacher, covariance, x.right, x.left))
    seen = t @ c @ a @ np.linalg.inv(a.T @ c @ a) @ a.T @ c @ t.T
    want = 0.5 * np.trace(t @ c @ t.T - seen)
    np.testing.assert_allclose(errors.right_frozen, want, rtol=1e-10)
    want = 0.5 * np.trace((np.eye(M) - b @ b.T) @ t @ c @ t.T)
    np.testing.assert_allclose(errors.left_frozen, want, rtol=1e-10)


def blocks(key, n):
    """Orthonormal frames that share out all directions, a third or a half to each."""
    basis = jnp.linalg.qr(jr.normal(key, (n, n)))[0]
    return [basis[:, k : k + R] for k in range(0, n, R)]


def test_frames_that_share_out_all_directions_have_the_mean_loss(getkey):
    teacher, covariance, x = drawn(getkey)
    before = flows.student_loss(jnp.zeros((M, N)), teacher, covariance)
    of = flows.frozen_factor_errors
    left = [of(LowRank(b, x.right), teacher, covariance) for b in blocks(getkey(), M)]
    mean = np.mean([e.left_frozen for e in left])
    np.testing.assert_allclose(mean, (1 - R / M) * before)
    white, before = jnp.eye(N), 0.5 * jnp.sum(teacher**2)
    right = [of(LowRank(x.left, a), teacher, white) for a in blocks(getkey(), N)]
    mean = np.mean([e.right_frozen for e in right])
    np.testing.assert_allclose(mean, (1 - R / N) * before)


def test_a_frozen_right_factor_is_the_better_one_where_inputs_are_few(getkey):
    """A random one reads the large directions: better than ``1 − r/n``, white teachers."""
    n, draws = 8, 100
    covariance = jnp.diag(2.0 ** -jnp.arange(n))

    @jax.jit
    @jax.vmap
    def share(key):
        frame, _ = jnp.linalg.qr(jr.normal(key, (n, R)))
        errors = flows.frozen_factor_errors(LowRank(frame, frame), jnp.eye(n), covariance)
        return jnp.stack(errors) / (0.5 * jnp.trace(covariance))

    shares = np.asarray(share(jr.split(getkey(), draws)))
    ahead = shares[:, 1] - shares[:, 0]
    assert ahead.mean() >= 5 * ahead.std() / draws**0.5
    assert shares[:, 0].mean() < 0.8 * (1 - R / n)


def test_errors_of_finite_samples_are_the_mean_over_draws(getkey):
    teacher, covariance, x = drawn(getkey)
    samples, noise, draws = 12, 0.3, 4000
    root = jnp.linalg.cholesky(covariance)

    @jax.jit
    @jax.vmap
    def errors(key):
        kz, kn = jr.split(key)
        inputs = jr.normal(kz, (samples, N)) @ root.T
        outputs = inputs @ teacher.T + noise**0.5 * jr.normal(kn, (samples, M))
        fit = lambda z, y: jnp.linalg.solve(z.T @ z, z.T @ y)
        left = fit(inputs @ x.right, outputs).T
        right = fit(inputs, outputs @ x.left)
        loss = lambda pair: flows.student_loss(pair, teacher, covariance)
        return jnp.stack([loss(LowRank(left, x.right)), loss(LowRank(x.left, right))])

    drawn_errors = np.asarray(errors(jr.split(getkey(), draws)))
    want = flows.frozen_factor_errors(x, teacher, covariance, noise, samples)
    standard = drawn_errors.std(axis=0) / draws**0.5
    assert np.all(abs(drawn_errors.mean(axis=0) - np.array(want)) <= 5 * standard)
    assert np.all(standard <= 0.03 * np.array(want))
    # Two numbers of an output can be fitted to four examples, four cannot.
    few = flows.frozen_factor_errors(x, teacher, covariance, noise, 4)
    assert jnp.isfinite(few.right_frozen)
    assert few.left_frozen == jnp.inf

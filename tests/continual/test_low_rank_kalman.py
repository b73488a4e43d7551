"""The low-rank Kalman filter against dense ones and recursive least squares."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax.continual import LowRankKalman, RecursiveLeastSquares
from tests.helpers import relative_error


P, B, STEPS = 8, 2, 6
linear = lambda w, x: x @ w
forms = pytest.mark.parametrize("form", ["diagonal", "spherical"])


def filtered(start, model, x, y, *, decay=1.0, drift=0.0, **how):
    """The states after each batch, in one program."""

    @jax.jit
    def run(start, x, y):
        def step(state, xy):
            state = state.predict(decay, drift).update(model, *xy, **how)
            return state, state

        return jax.lax.scan(step, start, (x, y))[1]

    return run(start, x, y)


def dense(mean, covariance, x, y, noise, decay=1.0, drift=0.0):
    """The Kalman filter of a linear model."""
    means, covariances = [], []
    for a, b in zip(x, y, strict=True):
        mean = decay * mean
        covariance = decay**2 * covariance + drift * np.eye(len(mean))
        gain = (
            covariance @ a.T @ np.linalg.inv(a @ covariance @ a.T + noise * np.eye(len(a)))
        )
        mean = mean + gain @ (b - a @ mean)
        covariance = covariance - gain @ a @ covariance
        means.append(mean)
        covariances.append(covariance)
    return np.stack(means), np.stack(covariances)


def stream(key, rank=P):
    kx, ky, kb = jr.split(key, 3)
    x = jr.normal(kx, (STEPS, B, rank), jnp.float64) @ jr.normal(kb, (rank, P), jnp.float64)
    return x, jr.normal(ky, (STEPS, B), jnp.float64)


@pytest.mark.slow
@forms
@pytest.mark.parametrize(("decay", "drift"), [(1.0, 0.0), (0.9, 0.1)])
def test_at_full_rank_it_is_the_kalman_filter(form, decay, drift, getkey, x64):
    x, y = stream(getkey())
    start = LowRankKalman.start(jnp.ones(P), P, precision=0.5, form=form)
    got = filtered(start, linear, x, y, decay=decay, drift=drift, noise=0.3)
    want = dense(np.ones(P), 2 * np.eye(P), np.asarray(x), np.asarray(y), 0.3, decay, drift)
    assert relative_error(got.mean, want[0]) < 1e-10
    covariances = jax.vmap(lambda s: s.precision().inverse().as_matrix())(got)
    assert relative_error(covariances, want[1]) < 1e-10


@forms
def test_is_recursive_least_squares_while_the_samples_fit(form, getkey, x64):
    """Twelve samples of rank three."""
    x, y = stream(getkey(), 3)
    start = LowRankKalman.start(jnp.zeros(P), 3, precision=0.7, form=form)
    got = filtered(start, linear, x, y).mean[-1]
    head = RecursiveLeastSquares.start(P, 1, ridge=0.7, dtype=jnp.float64)
    want = head.update(x.reshape(-1, P), y.reshape(-1, 1)).weight()[0]
    assert relative_error(got, want) < 1e-12


@pytest.mark.slow
def test_what_does_not_fit_stays_on_the_diagonal(getkey, x64):
    """The diagonal of the precision is that of the full filter; a sphere loses some."""
    x, y = stream(getkey())
    states = {
        form: filtered(
            LowRankKalman.start(jnp.zeros(P), 2, precision=0.7, form=form), linear, x, y
        )
        for form in ("diagonal", "spherical")
    }
    rows = np.asarray(x).reshape(-1, P)
    want = 0.7 * np.eye(P) + rows.T @ rows
    last = {
        form: np.asarray(jax.tree.map(lambda a: a[-1], s).precision().as_matrix())
        for form, s in states.items()
    }
    np.testing.assert_allclose(np.diag(last["diagonal"]), np.diag(want), rtol=1e-12)
    assert np.trace(last["spherical"]) < np.trace(want) - 1


def test_the_prediction_of_low_rank_is_exact(getkey, x64):
    """Covariance γ²Σ + qI, of a factor of rank two and both kinds of diagonal."""
    for diagonal in (jnp.asarray(0.5), jnp.linspace(0.5, 2.0, P)):
        state = LowRankKalman(jnp.ones(P), jr.normal(getkey(), (P, 2)), diagonal)
        before, after = jax.jit(
            lambda s: [
                t.precision().inverse().as_matrix() for t in (s, s.predict(0.9, 0.2))
            ]
        )(state)
        assert relative_error(after, 0.81 * before + 0.2 * np.eye(P)) < 1e-12


def network(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"] + params["bias"][None]


@pytest.mark.slow
def test_of_a_network_with_classes_it_is_a_gauss_newton_step(getkey, x64):
    """On a tree: ``(Υ + Σ Jᵀ(diag p − ppᵀ)J)⁻¹`` times the slope of the log-likelihood."""
    params = {
        "in": jr.normal(getkey(), (3, 2)),
        "out": jr.normal(getkey(), (2, 3)),
        "bias": jnp.zeros(3),
    }
    x, y = jr.normal(getkey(), (4, 3)), jax.nn.one_hot(jnp.array([0, 2, 1, 1]), 3)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    start = LowRankKalman.start(params, 12, precision=0.5)
    run = jax.jit(lambda s: s.update(network, x, y, likelihood="categorical"))
    after = run(start)
    logits = lambda w: network(unravel(w), x)
    j, p = np.asarray(jax.jacobian(logits)(flat)), np.asarray(jax.nn.softmax(logits(flat)))
    middle = [np.diag(q) - np.outer(q, q) for q in p]
    hessian = 0.5 * np.eye(len(flat)) + sum(
        a.T @ m @ a for a, m in zip(j, middle, strict=True)
    )
    slope = np.einsum("bcp,bc->p", j, np.asarray(y) - p)
    want = flat + np.linalg.solve(hessian, slope)
    assert relative_error(jax.flatten_util.ravel_pytree(after.mean)[0], want) < 1e-10
    # Four samples of three classes have rank eight: nothing is cut off.
    assert relative_error(after.precision().as_matrix(), hessian) < 1e-10


@pytest.mark.slow
def test_single_precision_members_and_certain_classes_are_finite(getkey):
    """A batch of filters, with logits so large that the softmax is one and zeros."""
    x, y = jr.normal(getkey(), (4, 3)), jax.nn.one_hot(jnp.array([0, 2, 1, 1]), 3)
    model = lambda w, x: x @ w

    def run(scale):
        start = LowRankKalman.start(scale * jnp.ones((3, 3)) * jnp.arange(3.0)[None], 2)
        return start.update(model, x, y, likelihood="categorical")

    out = jax.jit(jax.vmap(run))(jnp.array([1.0, 1e4]))
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(out))
    alone = jax.jit(run)(1.0)
    np.testing.assert_allclose(out.mean[0], alone.mean, rtol=1e-3, atol=1e-4)


def test_refuses():
    with pytest.raises(ValueError, match="between 1 and the 3"):
        LowRankKalman.start(jnp.ones(3), 4)
    with pytest.raises(ValueError, match="'diagonal' or 'spherical'"):
        LowRankKalman.start(jnp.ones(3), 1, form="full")
    state = LowRankKalman.start(jnp.ones(3), 1)
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="shape of the outputs"):
        state.update(linear, x, jnp.ones((2, 1)))
    with pytest.raises(ValueError, match="'gaussian' or 'categorical'"):
        state.update(linear, x, jnp.ones(2), likelihood="poisson")

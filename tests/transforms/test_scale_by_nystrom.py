"""The sketched Hessian as preconditioner: Newton at full rank, its rate, its refreshes."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax.transforms import hessian_product
from tests.helpers import relative_error


N = 10


def as_tree(x):
    return {"w": x[:6].reshape(2, 3), "b": x[6:]}


def flat(tree):
    return jnp.concatenate([tree["w"].reshape(-1), tree["b"]])


def quadratic(key, values):
    q = np.linalg.qr(np.asarray(jr.normal(key, (N, N), jnp.float64)))[0]
    c = (q * np.asarray(values)) @ q.T
    return c, lambda p: 0.5 * flat(p) @ c @ flat(p)


def one_step(tx, value_fn, params, **extra):
    """The first update, with its state."""

    @jax.jit
    def step(params):
        grads = jax.grad(value_fn)(params)
        return tx.update(grads, tx.init(params), params, value_fn=value_fn, **extra)

    updates, state = step(params)
    return np.asarray(flat(updates)), state


FALLING = 10.0 ** -np.linspace(0, 4, N)


@pytest.mark.slow
def test_at_full_rank_it_is_half_a_damped_newton_step(getkey, x64):
    """The largest eigenvalue of (H + ρI)⁻¹H is λ₁/(λ₁ + ρ)."""
    c, value_fn = quadratic(getkey(), FALLING)
    x = jr.normal(getkey(), (N,), jnp.float64)
    rho = 1e-3
    tx = lrjax.scale_by_nystrom(N, rho, rate_steps=400)
    got, _ = one_step(tx, value_fn, as_tree(x))
    rate = 0.5 * (1 + rho)
    want = rate * np.linalg.solve(c + rho * np.eye(N), c @ x)
    assert relative_error(got, want) < 1e-2  # of the power iteration, whose gap is small
    tx = lrjax.scale_by_nystrom(N, rho, rate_steps=0)
    assert relative_error(one_step(tx, value_fn, as_tree(x))[0], want / rate) < 1e-8


@pytest.mark.slow
def test_the_rate_is_that_of_the_other_batch(getkey, x64):
    c, value_fn = quadratic(getkey(), FALLING)
    d, rate_fn = quadratic(getkey(), FALLING)
    tx = lrjax.scale_by_nystrom(4, 1e-2, rate_steps=300)
    params = as_tree(jnp.ones(N, jnp.float64))
    updates, state = one_step(tx, value_fn, params, rate_fn=rate_fn)
    u = np.concatenate([np.reshape(state.basis["w"], (6, 4)), state.basis["b"]])
    p = (u * np.asarray(state.values)) @ u.T + 1e-2 * np.eye(N)
    largest = np.max(np.linalg.eigvals(np.linalg.solve(p, d)).real)
    np.testing.assert_allclose(state.rate, 0.5 / largest, rtol=1e-3)
    want = np.linalg.solve(p, c @ np.ones(N)) * np.asarray(state.rate)
    assert relative_error(updates, want) < 1e-10


@pytest.mark.slow
def test_told_nothing_what_was_not_kept_has_curvature_one_at_most(getkey, x64):
    """And so the rate is near one half, whatever the condition of the Hessian."""
    _, value_fn = quadratic(getkey(), FALLING)
    _, state = one_step(lrjax.scale_by_nystrom(4), value_fn, as_tree(jnp.ones(N)))
    assert state.damping == state.values[-1]
    assert 0.1 < state.rate < 1


@pytest.mark.slow
def test_the_sketch_is_refreshed_when_due(getkey, x64):
    _, value_fn = quadratic(getkey(), FALLING)
    tx = lrjax.scale_by_nystrom(3, refresh_every=3)
    params = as_tree(jnp.ones(N))

    def step(state, _):
        grads = jax.grad(value_fn)(params)
        state = tx.update(grads, state, params, value_fn=value_fn)[1]
        return state, state.values

    values = jax.jit(lambda: jax.lax.scan(step, tx.init(params), length=5)[1])()
    np.testing.assert_array_equal(values[0], values[2])
    np.testing.assert_array_equal(values[3], values[4])
    assert np.any(values[2] != values[3])


@pytest.mark.slow
def test_other_curvature_and_what_is_not_finite(getkey):
    """Products may be any; where they are no numbers the preconditioner stays."""
    params = as_tree(jnp.ones(N))
    value_fn = lambda p: jnp.sum(flat(p) ** 2)
    twice = lambda f, p, v: jax.tree.map(lambda x: 3 * x, hessian_product(f, p, v))
    _, state = one_step(lrjax.scale_by_nystrom(2, product=twice), value_fn, params)
    np.testing.assert_allclose(state.values, [6, 6], rtol=1e-4)
    wrong = lambda f, p, v: jax.tree.map(lambda x: x * jnp.nan, v)
    got, state = one_step(lrjax.scale_by_nystrom(2, product=wrong), value_fn, params)
    np.testing.assert_allclose(got, 2 * np.ones(N), rtol=1e-6)
    np.testing.assert_array_equal(state.values, [0, 0])


@pytest.mark.slow
def test_training_is_the_dense_iteration(getkey, x64):
    """Of a quadratic function, 20 steps: η P⁻¹ g with P and η of the state."""
    c, value_fn = quadratic(getkey(), FALLING)
    start = as_tree(jr.normal(getkey(), (N,), jnp.float64))
    tx = optax.chain(lrjax.scale_by_nystrom(3, refresh_every=7), optax.scale(-0.9))

    def step(carry, _):
        params, state = carry
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        new = optax.apply_updates(params, updates)
        return (new, state), (flat(new), state[0])

    carry = (start, tx.init(start))
    points, states = jax.jit(lambda: jax.lax.scan(step, carry, length=20)[1])()
    x = np.asarray(flat(start))
    for t in range(20):
        w, b = np.asarray(states.basis["w"][t]), np.asarray(states.basis["b"][t])
        u = np.concatenate([w.reshape(6, 3), b])
        p = (u * np.asarray(states.values[t])) @ u.T
        p = p + np.asarray(states.damping[t]) * np.eye(N)
        assert np.linalg.eigvalsh(c - (u * np.asarray(states.values[t])) @ u.T)[0] > -1e-12
        direction = np.asarray(states.rate[t]) * np.linalg.solve(p, c @ x)
        x = x - 0.9 * direction
        assert relative_error(np.asarray(points[t]), x) < 1e-10


def test_asks_for_the_loss_as_a_function():
    tx = lrjax.scale_by_nystrom()
    x = jnp.ones(3)
    with pytest.raises(ValueError, match="value_fn=lambda"):
        tx.update(x, tx.init(x), x)
    with pytest.raises(ValueError, match="params"):
        tx.update(x, tx.init(x), value_fn=jnp.sum)
    with pytest.raises(ValueError, match="rank >= 1"):
        lrjax.scale_by_nystrom(0)

"""Several steps with one gradient: the optimizers that they are."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax.transforms import surrogate_steps

from ..helpers import assert_close, random_low_rank


ROWS, SIZE = 9, 4


@pytest.fixture
def fit(x64, getkey):
    """Inputs, and labels of a loss whose curvature is a quarter at the most."""
    x = jr.normal(getkey(), (ROWS, SIZE), jnp.float64)
    return x, jnp.sign(jr.normal(getkey(), (ROWS,), jnp.float64))


def loss(z, x, y):
    return jnp.sum(jnp.logaddexp(z, -y * z))


def linear(params, x, y):
    return x @ params["w"] + params["b"]


START = {"w": jnp.full(SIZE, 0.1), "b": jnp.ones(()), "none": None}


@pytest.mark.slow_but("sgd")
@pytest.mark.parametrize("tx", [optax.sgd(0.1), optax.adam(0.1)], ids=["sgd", "adam"])
def test_one_step_is_the_step_of_the_optimizer(fit, tx):
    """Whatever the step size in z; over five calls, with the state passed on."""
    params = other = jax.tree.map(lambda p: p.astype(jnp.float64), START)
    state = plain = tx.init(params)

    @jax.jit
    def whole(p, state):
        value, grad = jax.value_and_grad(lambda p: loss(linear(p, *fit), *fit))(p)
        updates, state = tx.update(grad, state, p)
        return optax.apply_updates(p, updates), state, value

    one = functools.partial(surrogate_steps, loss, linear, tx=tx, steps=1)
    call = jax.jit(lambda p, s, step_size: one(p, s, *fit, step_size=step_size))
    for step_size in (1e-3, 1.0, 1e3, jnp.inf, 0.5):
        params, state, value = call(params, state, step_size)
        other, plain, want = whole(other, plain)
        assert_close((params, value), (other, want))


def test_of_linear_targets_the_minimum_is_a_preconditioned_step(fit):
    """``θ − η (XᵀX)⁻¹ Xᵀ ∇loss``, by plain descent on the model, to its minimum."""
    x, y = fit
    # Singular values from one to two: descent at 1/4 loses three quarters of the error.
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    x = jnp.asarray(u * np.linspace(1, 2, SIZE) @ vt)
    w, eta = jnp.full(SIZE, 0.1), 0.3
    target = lambda w, x, y: x @ w
    tx = optax.sgd(eta / 4)
    got, _, _ = surrogate_steps(
        loss, target, w, tx.init(w), x, y, tx=tx, step_size=eta, steps=130
    )
    slope = jax.grad(loss)(x @ w, x, y)
    want = w - eta * jnp.linalg.solve(x.T @ x, x.T @ slope)
    assert_close(got, want, rtol=1e-12)


def product(x, *args):
    return x.materialize()


@pytest.fixture
def factored(x64, getkey):
    """A pair, and a smooth loss of its product whose curvature is one at the most."""
    x = random_low_rank(getkey(), 7, 6, 3, dtype=jnp.float64)
    matrix = jr.normal(getkey(), (7, 6), jnp.float64)
    return x, lambda z: jnp.sum(jnp.sqrt(1 + (z - matrix) ** 2))


def test_exact_alternating_minima_in_factors_are_scaled_descent(factored):
    """Gauss-Seidel: each half-step a new gradient, solved in one factor exactly."""
    x, loss = factored
    eta = 0.7
    tx = optax.chain(
        lrjax.scale_by_gram(0.0, order="alternating"), optax.scale_by_learning_rate(eta)
    )
    state, values = tx.init(x), []
    call = jax.jit(
        lambda x, s: surrogate_steps(loss, product, x, s, tx=tx, step_size=eta, steps=1)
    )
    left, right = np.asarray(x.left), np.asarray(x.right)
    slope = jax.jit(jax.grad(loss))
    for half in range(6):
        x, state, value = call(x, state)
        values.append(value)
        g = np.asarray(slope(left @ right.T))
        if half % 2 == 0:
            left = left - eta * g @ right @ np.linalg.inv(right.T @ right)
        else:
            right = right - eta * g.T @ left @ np.linalg.inv(left.T @ left)
        assert_close(x, lrjax.LowRank(jnp.array(left), jnp.array(right)), rtol=1e-12)
    assert np.all(np.diff(values) < 0)  # for eta below one over the curvature


@pytest.mark.slow
def test_the_minimum_in_both_factors_is_a_truncated_gradient_step(factored):
    """``left rightᵀ`` is the best of its rank near ``z_t − η ∇loss``."""
    x, loss = factored
    # So large that the gradient step leaves a gap behind the third singular value.
    x, eta = jax.tree.map(lambda a: 4 * a, x), 0.7
    tx = optax.chain(
        lrjax.scale_by_gram(0.0, order="alternating"), optax.scale_by_learning_rate(eta)
    )
    got, _, _ = surrogate_steps(
        loss, product, x, tx.init(x), tx=tx, step_size=eta, steps=400
    )
    z = product(x) - eta * jax.grad(loss)(product(x))
    want = lrjax.truncate(z, 3).materialize()
    assert_close(got.materialize(), want, rtol=1e-6)


@pytest.mark.slow
def test_below_the_curvature_the_model_is_above_the_loss(fit, getkey):
    """So that steps which lower it lower the loss at least as much."""
    x, y = fit
    w = jr.normal(getkey(), (SIZE,), jnp.float64)
    target = lambda w, x, y: jnp.tanh(x @ w)
    heights = []

    def spy(updates, state, params, *, value, **extra):
        return updates, value

    tx = optax.GradientTransformationExtraArgs(lambda p: jnp.zeros(()), spy)
    tx = optax.chain(tx, optax.sgd(0.01))
    for steps in (1, 2, 5, 20):
        new, state, first = surrogate_steps(
            loss, target, w, tx.init(w), x, y, tx=tx, step_size=1.0, steps=steps
        )
        heights.append(state[0])
        if steps > 1:
            # The last height is that of the parameters one step before.
            before, _, _ = surrogate_steps(
                loss, target, w, tx.init(w), x, y, tx=tx, step_size=1.0, steps=steps - 1
            )
            assert loss(target(before, x, y), x, y) <= state[0] + 1e-12
        assert loss(target(new, x, y), x, y) < first
    assert np.all(np.diff(heights) < 0)


def test_runs_are_a_batch_and_no_steps_are_refused(fit):
    tx = optax.sgd(0.1)
    w = jnp.zeros(SIZE)
    target = lambda w, x, y: x @ w
    run = lambda eta: surrogate_steps(
        loss, target, w, tx.init(w), *fit, tx=tx, step_size=eta, steps=3
    )[0]
    both = jax.vmap(run)(jnp.array([0.1, 1.0]))
    assert_close(both[1], run(1.0), condition=10)
    with pytest.raises(ValueError, match="at least one step, got steps=0"):
        surrogate_steps(loss, target, w, (), *fit, tx=tx, step_size=1.0, steps=0)

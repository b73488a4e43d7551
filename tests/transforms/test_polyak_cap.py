"""Polyak's step with a cap: no learning rate is too large where one point fits all."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax

from ..helpers import assert_close, tol


ROWS, SIZE, STEPS = 40, 8, 300
CAPS = np.logspace(-3, 3, 13)


@pytest.fixture
def problem(x64, getkey):
    """Equations that one point fulfils, of condition 3; each is a batch of its own."""
    kr, kx = jr.split(getkey())
    rows = jr.normal(kr, (ROWS, SIZE), jnp.float64)
    u, _, vt = np.linalg.svd(rows, full_matrices=False)
    rows = jnp.asarray(u * np.linspace(3, 1, SIZE) @ vt)
    truth = jr.normal(kx, (SIZE,), jnp.float64)
    return rows, truth


LOSSES = {
    "squares": lambda x, row, y: jnp.sum((row @ x - y) ** 2) / 2,
    "absolute": lambda x, row, y: jnp.sum(jnp.abs(row @ x - y)),
    "log cosh": lambda x, row, y: (
        jnp.sum(jnp.logaddexp(row @ x - y, y - row @ x)) - jnp.log(2.0)
    ),
}


def distances(loss, tx, rows, truth, key, metric):
    """Squared distances to the truth along single random batches."""
    targets = rows @ truth

    def step(carry, i):
        x, state = carry
        row, y = rows[i][None], targets[i][None]
        value, grad = jax.value_and_grad(loss)(x, row, y)
        updates, state = tx.update(grad, state, x, value=value, grad=grad)
        x = optax.apply_updates(x, updates)
        return (x, state), jnp.sum(metric * (x - truth) ** 2)

    x = jnp.zeros(SIZE)
    order = jr.randint(key, (STEPS,), 0, ROWS)
    far = jax.lax.scan(step, (x, tx.init(x)), order)[1]
    return jnp.concatenate([jnp.sum(metric * truth**2)[None], far])


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_no_cap_is_too_large_where_one_point_fits_all(problem, getkey, name):
    """Six decades; every step comes nearer, and plain steps of that length blow up."""
    rows, truth = problem
    scales = 1 + jnp.arange(SIZE) / 2
    key = getkey()

    def run(cap):
        tx = optax.chain(
            optax.stateless(
                lambda g, _: jax.tree.map(lambda a: scales * a, g)
            ),  # any fixed preconditioner
            lrjax.scale_by_polyak(cap=cap),
            optax.scale_by_learning_rate(1.0),
        )
        return distances(LOSSES[name], tx, rows, truth, key, 1 / scales)

    far = np.asarray(jax.jit(jax.vmap(run))(CAPS))
    # Near the end the loss is rounding, and so is what the step is made of.
    bound = far[:, :-1] + tol(far) * far[:, :1]
    assert np.all(far[:, 1:] <= bound)
    assert np.all(far[CAPS >= 1, -1] < 1e-2 * far[CAPS >= 1, 0])
    plain = lambda rate: distances(LOSSES[name], optax.sgd(rate), rows, truth, key, 1.0)
    worst = jax.jit(plain)(CAPS[-1])[-1]
    assert not worst <= far[-1, 0]


def test_of_all_lengths_up_to_the_cap_it_has_the_best_guarantee(problem, getkey):
    """The bound −2 η gap + η² ⟨G, P⟩ on the squared distance, on a grid below the cap."""
    grad = jr.normal(getkey(), (SIZE,), jnp.float64)
    value, f_min = jnp.array(2.0, jnp.float64), 0.5
    bound = lambda length: -2 * length * (value - f_min) + length**2 * jnp.sum(grad**2)
    lengths = jnp.linspace(0, 1, 100)
    for cap in CAPS:
        tx = lrjax.scale_by_polyak(f_min, cap=cap)
        step, _ = tx.update(grad, tx.init(grad), value=value, grad=grad)
        length = optax.tree.vdot(step, grad) / (grad @ grad)
        best = jnp.min(bound(cap * lengths))
        assert bound(length) <= best + tol(grad) * abs(best)


def test_below_the_cap_it_is_polyak_and_above_it_the_cap(problem, getkey):
    grad = jr.normal(getkey(), (SIZE,), jnp.float64)
    extra = {"value": grad @ grad / 2, "grad": grad}  # Polyak's length is 1/2
    step = lambda tx: tx.update(grad, tx.init(grad), **extra)[0]
    assert_close(step(lrjax.scale_by_polyak(cap=0.6)), step(lrjax.scale_by_polyak()))
    assert_close(step(lrjax.scale_by_polyak(cap=0.4)), 0.4 * grad)
    assert_close(step(lrjax.scale_by_polyak()), 0.5 * grad)


def test_a_wrong_minimum_does_limited_harm():
    """Too small: steps up to the cap. Too large: the loss falls to it and stays."""
    loss = lambda x: jnp.sum(x**2) / 2

    def run(f_min, cap):
        tx = optax.chain(
            lrjax.scale_by_polyak(f_min, cap=cap), optax.scale_by_learning_rate(1.0)
        )

        def step(x, _):
            value, grad = jax.value_and_grad(loss)(x)
            updates, _ = tx.update(grad, tx.init(x), x, value=value, grad=grad)
            return optax.apply_updates(x, updates), value

        return jax.lax.scan(step, jnp.ones(3), length=60)[1][-1]

    low, high, capless = jax.jit(jax.vmap(run))(
        jnp.array([-1.0, 0.2, -1.0]), jnp.array([0.9, 0.9, jnp.inf])
    )
    assert low < 1e-6
    np.testing.assert_allclose(high, 0.2, rtol=1e-3)
    assert capless > 1e-2


def test_a_negative_cap_is_refused():
    with pytest.raises(ValueError, match=r"scale_by_polyak needs cap >= 0, got -1"):
        lrjax.scale_by_polyak(cap=-1.0)

"""The natural gradient of a window: dense recursion, single precision, degenerate ones."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from tests.helpers import all_finite, relative_error
from tests.reference.natural_gradient import windowed


N, WINDOW, STEPS = 10, 4, 9


def as_tree(x):
    """A vector, or a row for each step, as a tree of parameters."""
    lead = x.shape[:-1]
    return {"w": x[..., :6].reshape(*lead, 2, 3), "b": x[..., 6:]}


def as_rows(tree):
    flat = lambda x: np.asarray(x).reshape(len(x), -1)
    return np.concatenate([flat(tree["w"]), flat(tree["b"])], axis=1)


def run(make, grads, params=None):
    """The updates of all steps at the same parameters."""

    @jax.jit
    def all_steps(grads):
        tx = make()
        start = jax.tree.map(lambda x: x[0], grads) if params is None else params
        step = lambda state, g: tx.update(g, state, params)[::-1]
        return jax.lax.scan(step, tx.init(start), grads)[1]

    return as_rows(all_steps(as_tree(grads)))


@pytest.mark.slow_but("True")
@pytest.mark.parametrize("relative", [True, False])
def test_equals_the_dense_recursion(relative, getkey, x64):
    grads = jr.normal(getkey(), (STEPS, N), jnp.float64)
    got = run(lambda: lrjax.scale_by_gradient_window(WINDOW, 0.1, relative=relative), grads)
    want = windowed(np.asarray(grads), WINDOW, 0.1, relative=relative)
    assert relative_error(got, want) < 1e-12


@pytest.mark.slow
def test_the_recipe_equals_its_reference(getkey, x64):
    """With its default arguments, and with other ones and decay."""
    grads = jr.normal(getkey(), (20, N), jnp.float64)
    params = jr.normal(getkey(), (N,), jnp.float64)
    for make, window, b, decay in (
        (lambda: lrjax.mfac(0.5), 32, 0.9, 0.0),
        (lambda: lrjax.mfac(0.5, WINDOW, momentum=0.5, weight_decay=0.3), WINDOW, 0.5, 0.3),
    ):
        got = run(make, grads, as_tree(params))
        matrix = np.arange(N) < 6
        decayed = decay * np.asarray(params) * matrix
        average, want = np.zeros(N), []
        for direction in windowed(np.asarray(grads), window, 1.0, relative=True):
            average = b * average + (1 - b) * direction
            want.append(-0.5 * (average + decayed))
        assert relative_error(got, np.stack(want)) < 1e-12


def test_single_precision_keeps_its_digits_at_small_damping(getkey, x64):
    """Gradients that agree to 3e-2 and λ = 1e-6: the condition is 1e7."""
    grads = 1.0 + 3e-2 * jr.normal(getkey(), (STEPS, N), jnp.float64)
    make = lambda: lrjax.scale_by_gradient_window(WINDOW, 1e-6, relative=False)
    single = grads.astype(jnp.float32)
    got = run(make, single)
    want = windowed(np.asarray(single, np.float64), WINDOW, 1e-6, relative=False)
    # The Gram matrix is off by eps · 40 = 5e-6; its small eigenvalues are near 5e-3.
    assert relative_error(got, want) < 1e-2


@pytest.mark.slow_but("0.0")
@pytest.mark.parametrize("damping", [0.0, 1e-6])
def test_repeated_and_vanishing_gradients_are_finite(damping, getkey):
    same = jnp.tile(jr.normal(getkey(), (1, N)), (STEPS, 1)).at[2].set(0)
    make = lambda: lrjax.scale_by_gradient_window(WINDOW, damping, relative=False)
    got = run(make, same)
    assert np.all(np.isfinite(got))
    assert np.all(got[2] == 0)
    # All alike: the pseudo-inverse gives g/‖g‖². Null directions are damped to 1/16 of it.
    want = np.asarray(same[-1]) / np.sum(np.asarray(same[-1]) ** 2)
    assert relative_error(got[-1], want) < 0.2


def test_a_gradient_that_is_not_finite_leaves_the_state(getkey):
    g = as_tree(jr.normal(getkey(), (N,)))
    tx = lrjax.scale_by_gradient_window(WINDOW)

    @jax.jit
    def both(g):
        _, state = tx.update(g, tx.init(g))
        return state, *tx.update({**g, "b": g["b"].at[0].set(jnp.nan)}, state)

    before, updates, after = both(g)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(x, y)
    assert all(np.all(np.asarray(u) == 0) for u in jax.tree.leaves(updates))


def test_a_window_in_half_precision_is_half_as_long(getkey):
    grads = jr.normal(getkey(), (STEPS, N))
    make = lambda: lrjax.scale_by_gradient_window(WINDOW, 0.1, dtype=jnp.bfloat16)
    state = jax.eval_shape(lambda: make().init(as_tree(grads[0])))
    assert {x.dtype for x in jax.tree.leaves(state.gradients)} == {jnp.dtype("bfloat16")}
    rounded = np.asarray(grads.astype(jnp.bfloat16), np.float64)
    assert (
        relative_error(run(make, grads), windowed(rounded, WINDOW, 0.1, relative=True))
        < 1e-4
    )


def test_scales_as_the_loss_by_default(getkey, x64):
    grads = jr.normal(getkey(), (STEPS, N), jnp.float64)
    make = lambda: lrjax.scale_by_gradient_window(WINDOW)
    assert relative_error(run(make, 100 * grads), 100 * run(make, grads)) < 1e-12


def test_refuses():
    with pytest.raises(ValueError, match="window >= 1"):
        lrjax.scale_by_gradient_window(0)
    with pytest.raises(ValueError, match="damping >= 0"):
        lrjax.scale_by_gradient_window(2, -1.0)
    assert all_finite(lrjax.scale_by_gradient_window(2).init(jnp.ones(3)))

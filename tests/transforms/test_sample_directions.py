"""Sparse spectral training beside its definition on dense matrices."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from tests.helpers import all_finite, assert_close, with_spectrum
from tests.reference import spectra as reference


def run(tx, x, target, steps):
    """Nodes and states after each step of ½‖W − T‖²."""
    loss = lambda x: jnp.sum((x.materialize() - target) ** 2) / 2

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(jax.grad(loss)(x), state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), (x, state.chosen, state.inner)

    return jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), length=steps)[1])(x)


def test_steps_are_those_of_the_reference_and_an_svd_moves_nothing(getkey, x64):
    """One value is at zero, and some are stopped there; draws last three steps."""
    start = with_spectrum(getkey(), 6, 5, [2.0, 1.0, 0.1, 0.02, 0.0], jnp.float64)
    target = jr.normal(getkey(), (6, 5), jnp.float64)
    x, rate = lrjax.svd(start), 0.05
    tx = lrjax.sample_directions(
        rate, 2, period=3, refactor_every=6, inner=optax.identity(), key=getkey()
    )
    path, chosen, _ = run(tx, x, target, 12)
    u, s, v = (np.asarray(part) for part in (x.left, jnp.diag(x.core), x.right))
    for t in range(12):
        new = jax.tree.map(lambda a, t=t: np.asarray(a[t]), path)
        g = (u * s) @ v.T - np.asarray(target)
        # The direction of a value at zero has no gradient.
        drawn = [i for i in chosen[t].tolist() if s[i] > 0]
        u, s, v = reference.spectral_step(u, s, v, g, drawn, rate)
        assert_close(new.left @ new.core @ new.right.T, (u * s) @ v.T, rtol=1e-9)
        if (t + 1) % 6 == 0:
            u, s, v = new.left, np.diag(new.core), new.right
            assert_close(u.T @ u, np.eye(5), rtol=1e-12)
            assert_close(v.T @ v, np.eye(5), rtol=1e-12)
            assert_close(new.core, np.diag(s), rtol=1e-12)
        assert_close(np.linalg.norm(new.left, axis=0), np.ones(5), rtol=1e-12)
    same = (chosen[1:] == chosen[:-1]).all(axis=1)
    assert same[jnp.arange(11) % 3 != 2].all()
    assert not same[2::3].all()


@pytest.mark.slow
def test_moments_are_those_of_the_drawn_columns_and_start_anew(getkey):
    x = lrjax.svd(jr.normal(getkey(), (8, 6)))
    tx = lrjax.sample_directions(1e-3, 2, period=4, refactor_every=100)
    _, _, inner = run(tx, x, jnp.ones((8, 6)), 9)
    assert inner.count.tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 1]
    shapes = [part.shape[1:] for part in (inner.mu.left, inner.mu.core, inner.mu.right)]
    assert shapes == [(8, 2), (6,), (6, 2)]


def test_columns_are_drawn_by_their_weights(getkey):
    """One of four: column i with ½ (¼ + σ_i/Σσ)."""
    values = jnp.array([6.0, 2.0, 0.0, 0.0])
    x = lrjax.SVDForm(jnp.eye(4), jnp.diag(values), jnp.eye(4))
    still = jax.tree.map(jnp.zeros_like, x)

    def drawn(key):
        tx = lrjax.sample_directions(0.1, 1, key=key)
        return tx.update(still, tx.init(x), x)[1].chosen[0]

    draws = 4000
    counts = np.bincount(jax.jit(jax.vmap(drawn))(jr.split(getkey(), draws)), minlength=4)
    p = np.array([0.5, 0.25, 0.125, 0.125])
    assert (abs(counts - draws * p) < 5 * np.sqrt(draws * p * (1 - p))).all()


@pytest.mark.slow
def test_all_columns_at_once_reach_any_matrix(getkey):
    target = jr.normal(getkey(), (6, 5))
    x = lrjax.svd(jr.normal(getkey(), (6, 5)))
    rate = optax.cosine_decay_schedule(0.05, 600)
    tx = lrjax.sample_directions(rate, 5, period=600, refactor_every=50)
    path, _, _ = run(tx, x, target, 600)
    last = jax.tree.map(lambda a: a[-1], path)
    assert jnp.linalg.norm(last.materialize() - target) < 0.02


@pytest.mark.slow
def test_a_tree_is_trained_whole_and_zeros_stay_finite(getkey):
    params = {"w": lrjax.svd(jr.normal(getkey(), (2, 6, 5))), "b": jnp.ones(3)}
    loss = lambda p: jnp.sum(p["w"].materialize() ** 2) + jnp.sum(p["b"] ** 2)
    tx = lrjax.sst(0.05, 2, period=3, refactor_every=5, warmup=1)
    step = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p))
    state, p = tx.init(params), params
    for _ in range(40):
        updates, state = step(p, state)
        p = optax.apply_updates(p, updates)
    assert loss(p) < 0.5 * loss(params)
    assert all(abs(p["b"]) < 0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert all_finite(step(zeros, tx.init(zeros)))


def test_refusals():
    with pytest.raises(ValueError, match="at least 1 column, got 0"):
        lrjax.sample_directions(0.1, 0)

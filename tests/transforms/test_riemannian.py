"""Descent on the manifold of matrices of a rank, and the penalty on conditions."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from tests.helpers import all_finite, assert_close, relative_error
from tests.transforms.test_dynamical_low_rank import (
    quadratic,
    start_at,
    target_of,
    train,
)


def dense_descent(x, gradient, rate, momentum, steps):
    """``Z ← β Z + P(G)``, ``W ← SVD_r(W − η Z)``, ``Z ← P(Z)`` at the new point."""
    w, r = np.asarray(x.materialize()), x.rank
    u, _, vt = np.linalg.svd(w)
    u, v, z = u[:, :r], vt[:r].T, np.zeros_like(w)

    def project(g):
        return u @ u.T @ g + g @ v @ v.T - u @ u.T @ g @ v @ v.T

    history = []
    for _ in range(steps):
        z = momentum * z + project(gradient(w))
        a, s, bt = np.linalg.svd(w - rate * z)
        u, v = a[:, :r], bt[:r].T
        w, z = (u * s[:r]) @ v.T, project(z)
        history.append(w)
    return history


def train_fixed(tx, loss, x, steps):
    def body(carry, _):
        x, state = carry
        updates, state = tx.update(jax.grad(loss)(x), state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), x.materialize()

    return jax.lax.scan(body, (x, tx.init(x)), length=steps)[1]


@pytest.mark.slow
@pytest.mark.parametrize("width", [3, 9])
def test_momentum_is_tangent_and_follows_the_point(width, getkey, x64):
    x = start_at(getkey(), np.linspace(3, 1, width), width)
    loss, gradient = quadratic(getkey(), target_of(getkey()))
    tx = lrjax.riemannian_sgd(0.2, momentum=0.8)
    got = jax.jit(lambda x: train_fixed(tx, loss, x, 30))(x)
    for a, b in zip(got, dense_descent(x, gradient, 0.2, 0.8, 30), strict=True):
        assert relative_error(a, b) < 1e-12


def test_it_does_not_depend_on_the_factors(getkey, x64):
    x = start_at(getkey(), [3.0, 2.0, 1.0], 3)
    turn = lambda: jnp.linalg.qr(jr.normal(getkey(), (3, 3), jnp.float64))[0]
    p, q = turn(), turn()
    y = lrjax.SVDForm(x.left @ p, p.T @ x.core @ q, x.right @ q)
    loss, _ = quadratic(getkey(), target_of(getkey()))
    run = jax.jit(lambda x: train_fixed(lrjax.riemannian_sgd(0.2), loss, x, 8))
    assert_close(run(y), run(x), condition=1e3)


@pytest.mark.slow
def test_without_momentum_it_is_the_parallel_method_at_full_width(getkey, x64):
    x = start_at(getkey(), [3.0, 2.0, 1.0], 3)
    loss, _ = quadratic(getkey(), target_of(getkey()))
    first = train_fixed(lrjax.riemannian_sgd(0.2, momentum=0.0), loss, x, 8)
    tx = lrjax.dlrt(0.2, tol=0.0, inner=optax.identity())
    assert_close(train_fixed(tx, loss, x, 8), first, condition=1e3)


@pytest.mark.slow
def test_weight_decay_is_that_of_the_matrix(getkey, x64):
    x = start_at(getkey(), [3.0, 2.0, 1.0], 3)
    inner = optax.chain(optax.add_decayed_weights(0.1), optax.scale(-1.0))
    tx = lrjax.riemannian(inner)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, x), tx.init(x), x)
    moved = optax.apply_updates(x, updates).materialize()
    assert_close(moved, 0.9 * x.materialize(), condition=10)


def test_second_moments_are_refused(getkey):
    x = start_at(getkey(), [3.0, 2.0], 2, dtype=jnp.float32)
    with pytest.raises(ValueError, match="linear in the gradient"):
        lrjax.riemannian(optax.adam(0.1)).init(x)


@pytest.mark.slow
def test_the_penalty_is_its_formula(getkey, x64):
    x = start_at(getkey(), [], 5)
    core = jnp.zeros((5, 5), jnp.float64).at[:3, :3].set(jr.normal(getkey(), (3, 3)))
    x = lrjax.SVDForm(x.left, core, x.right)

    def penalty(core):
        s = core[:3, :3]
        return jnp.linalg.norm(s @ s.T - jnp.sum(s**2) / 3 * jnp.eye(3))

    zero = jax.tree.map(jnp.zeros_like, x)
    tx = lrjax.add_condition_penalty(0.7)
    got, _ = tx.update(zero, tx.init(x), x)
    assert_close(got.core, 0.7 * jax.grad(penalty)(core), condition=10)
    assert not np.any(got.left)
    # It vanishes where all singular values are equal, and is finite there.
    turn = jnp.linalg.qr(core[:3, :3])[0]
    even = lrjax.SVDForm(x.left, jnp.zeros_like(core).at[:3, :3].set(2 * turn), x.right)
    for point in (even, zero):
        slope, _ = tx.update(zero, tx.init(point), point)
        assert all_finite(slope)
    flat = lrjax.SVDForm(x.left, 2 * jnp.eye(5), x.right)
    assert not np.any(tx.update(zero, tx.init(flat), flat)[0].core)


@pytest.mark.slow
def test_spectra_are_flatter_the_stronger_the_penalty(getkey, x64):
    x = start_at(getkey(), [1.0, 0.5, 0.3], 6)
    loss, _ = quadratic(getkey(), target_of(getkey(), rank=3))

    @jax.jit
    def condition(penalty):
        tx = lrjax.robust_dlrt(
            0.05, tol=0.05, penalty=penalty, every=5, inner=optax.identity()
        )
        (y, _), _ = train(tx, loss, x, 200)
        return y

    conditions = []
    for penalty in (0.0, 2.0):
        values = np.linalg.svd(condition(penalty).core, compute_uv=False)
        values = values[values > 1e-12]
        conditions.append(values[0] / values[-1])
    assert conditions[1] - 1 < 0.8 * (conditions[0] - 1)


@pytest.mark.slow
def test_conditions_stay_within_their_bound(getkey, x64):
    x = start_at(getkey(), [3.0, 2.0, 1.0], 3)
    loss, _ = quadratic(getkey(), target_of(getkey()))

    @jax.jit
    @jax.vmap
    def conditions(bound):
        tx = lrjax.cond_lr(0.1, condition=bound)

        def body(carry, _):
            x, state = carry
            updates, state = tx.update(jax.grad(loss)(x), state, x)
            x = optax.apply_updates(x, updates)
            return (x, state), jnp.linalg.svd(x.core, compute_uv=False)

        return jax.lax.scan(body, (x, tx.init(x)), length=20)[1]

    for bound, values in zip(
        (1.0, 1.1, 1.5), conditions(jnp.array([1.0, 1.1, 1.5])), strict=True
    ):
        assert np.all(values[:, 0] / values[:, -1] < bound * (1 + 1e-12))
    with pytest.raises(ValueError, match="at least one"):
        lrjax.cond_lr(0.1, condition=0.0)

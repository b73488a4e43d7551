import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax.linalg import polar
from tests.helpers import all_finite, assert_close, random_low_rank, with_spectrum


def dense_step(g, x, damping):
    """The definition, by dense inverses in float64."""
    l, r = np.asarray(x.left, np.float64), np.asarray(x.right, np.float64)
    eye = np.eye(l.shape[1])
    return lrjax.LowRank(
        jnp.asarray(np.asarray(g.left) @ np.linalg.inv(r.T @ r + damping * eye)),
        jnp.asarray(np.asarray(g.right) @ np.linalg.inv(l.T @ l + damping * eye)),
    )


def update(tx, g, x, **extra):
    return tx.update(g, tx.init(x), x, **extra)[0]


@pytest.fixture
def pair(getkey, x64):
    x = random_low_rank(getkey(), 9, 7, 3, dtype=jnp.float64)
    g = random_low_rank(getkey(), 9, 7, 3, dtype=jnp.float64)
    return g, x


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_is_the_definition(pair, damping):
    g, x = pair
    tx = lrjax.scale_by_gram(damping, relative=False)
    assert_close(update(tx, g, x), dense_step(g, x, damping), condition=1e3)


def test_relative_damping_is_a_multiple_of_the_mean_column(pair):
    g, x = pair
    got = update(lrjax.scale_by_gram(0.5), g, x)
    mean = np.sum(np.asarray(x.right) ** 2) / 3
    want = dense_step(g, x, 0.5 * mean).left
    assert_close(got.left, want, condition=1e3)


def test_any_symmetric_phi_of_the_whitened_gradient(pair):
    """phi = id is the plain step; the whitened polar step has orthonormal image."""
    g, x = pair
    plain = update(lrjax.scale_by_gram(0.1), g, x)
    assert_close(
        update(lrjax.scale_by_gram(0.1, phi=lambda w: w), g, x), plain, condition=1e3
    )
    sign = lambda w: lrjax.LowRank(polar(w.left), polar(w.right))
    step = update(lrjax.scale_by_gram(phi=sign), g, x)
    # P_l rightᵀ has all singular values one: a spectral step on the product itself.
    singular = np.linalg.svd(np.asarray(step.left @ x.right.T), compute_uv=False)[:3]
    np.testing.assert_allclose(singular, 1, rtol=1e-10)


def test_unit_norm_gives_a_step_of_dual_norm_one(pair):
    g, x = pair
    step = update(lrjax.scale_by_gram(0.1, phi=lrjax.unit_norm), g, x)
    plain = update(lrjax.scale_by_gram(0.1), g, x)
    dual = jnp.sum(g.left * plain.left) + jnp.sum(g.right * plain.right)
    assert_close(step, jax.tree.map(lambda p: p / jnp.sqrt(dual), plain), condition=1e3)


@pytest.mark.slow
def test_alternating_is_alternating_least_squares(getkey, x64):
    """With learning rate one each step solves for one factor; two reach any low rank."""
    target = with_spectrum(getkey(), 9, 7, [5.0, 1.0, 0.1], jnp.float64)
    x = random_low_rank(getkey(), 9, 7, 3, dtype=jnp.float64)
    tx = lrjax.scaled_gd(1.0, order="alternating")
    state = tx.init(x)
    for turn in range(2):
        residual = x.materialize() - target
        grad = lrjax.LowRank(residual @ x.right, residual.T @ x.left)
        updates, state = tx.update(grad, state, x)
        still = updates.right if turn == 0 else updates.left
        assert not still.any()
        x = optax.apply_updates(x, updates)
    # The second solve is with the Gram matrix of the factor that the first one found.
    gram = x.left.T @ x.left
    assert_close(x.materialize(), target, condition=float(jnp.linalg.cond(gram)))


def test_damping_follows_the_loss(pair):
    g, x = pair
    tx = lrjax.scale_by_gram(0.5, relative=False, loss_power=0.5, f_min=1.0)
    got = update(tx, g, x, value=jnp.array(10.0))
    assert_close(got, dense_step(g, x, 0.5 * 3.0), condition=1e3)
    below = update(tx, g, x, value=jnp.array(0.0))
    assert_close(below, dense_step(g, x, 0.0), condition=1e3)


def test_damping_may_be_a_schedule(pair):
    g, x = pair
    tx = lrjax.scale_by_gram(optax.exponential_decay(0.5, 1, 0.1), relative=False)
    state = tx.init(x)
    for count in range(3):
        got, state = tx.update(g, state, x)
        assert_close(got, dense_step(g, x, 0.5 * 0.1**count), rtol=1e-6)


def test_lora_start_is_safe():
    """B = 0: its partner gets no gradient, and nothing blows up in the next step."""
    x = lrjax.LowRank(jnp.zeros((6, 2)), jnp.ones((4, 2)) * jnp.array([[1.0, 2.0]]))
    tx = lrjax.scale_by_gram()
    state = tx.init(x)
    for _ in range(3):
        residual = x.materialize() - 1.0
        grad = lrjax.LowRank(residual @ x.right, residual.T @ x.left)
        updates, state = tx.update(grad, state, x)
        assert all_finite(updates)
        x = optax.apply_updates(x, jax.tree.map(lambda u: -0.5 * u, updates))
    assert np.abs(x.materialize() - 1.0).max() < 0.3


@pytest.mark.slow
def test_local_rate_of_scaled_gd_is_free_of_the_condition_number(getkey, x64):
    """max(|1 − η|, |1 − 2η|) whatever the spectrum; not convergent at η = 1."""
    for condition in (1.0, 1e3):
        values = jnp.geomspace(1, 1 / condition, 3)
        target = with_spectrum(getkey(), 12, 10, values, jnp.float64)
        start = lrjax.truncate(lrjax.LowRank(target, jnp.eye(10)), 3)
        noise = random_low_rank(getkey(), 12, 10, 3, dtype=jnp.float64)
        size = 1e-5 / condition
        u, _, vt = jnp.linalg.svd(target)
        start = jax.tree.map(lambda a, b, size=size: a + size * b, start, noise)

        def errors(eta, start=start, target=target, u=u[:, :3], vt=vt[:3]):
            """Within both spaces of the target, where it is 1 − 2η, and beside, 1 − η."""

            def body(x, _):
                residual = x.materialize() - target
                within = u @ (u.T @ residual @ vt.T) @ vt
                parts = within, residual - within
                grad = lrjax.LowRank(residual @ x.right, residual.T @ x.left)
                tx = lrjax.scaled_gd(eta)
                updates, _ = tx.update(grad, tx.init(x), x)
                return optax.apply_updates(x, updates), jax.tree.map(jnp.linalg.norm, parts)

            return jax.lax.scan(body, start, length=14)[1]

        # Of each step the part that decides: both are small, and how small is the draw's.
        etas = jnp.array([0.2, 0.5, 0.6, 0.7, 0.8, 0.9])
        histories = np.asarray(jax.vmap(errors)(etas))
        history = np.where((etas > 2 / 3)[:, None], *histories)
        measured = (history[:, 12] / history[:, 6]) ** (1 / 6)
        want = np.maximum(abs(1 - etas), abs(1 - 2 * etas))
        np.testing.assert_allclose(measured, want, atol=1e-2)


def test_only_the_pair_is_touched(pair):
    g, x = pair
    grads = {"w": g, "bias": jnp.arange(3.0), "nested": [None, jnp.ones((4, 4))]}
    params = {"w": x, "bias": jnp.ones(3), "nested": [None, jnp.ones((4, 4))]}
    got = update(lrjax.scale_by_gram(), grads, params)
    assert_close(got["bias"], grads["bias"], rtol=0)
    assert_close(got["nested"], grads["nested"], rtol=0)


def test_bad_arguments():
    with pytest.raises(ValueError, match="damping >= 0, got -1"):
        lrjax.scale_by_gram(-1.0)
    with pytest.raises(Exception, match="alternating"):
        lrjax.scale_by_gram(order="random")
    x = lrjax.LowRank(jnp.ones((3, 1)), jnp.ones((2, 1)))
    tx = lrjax.scale_by_gram()
    with pytest.raises(ValueError, match=r"tx.update\(updates, state, params\)"):
        tx.update(x, tx.init(x))


def descent(key, order, partner):
    """Losses of ``½ ‖D ⊙ (X − T)‖²`` with ``D² ≤ L``, and what each step promises."""
    kx, kt, kd, ke = jr.split(key, 4)
    m, n, rank, size = 9, 7, 5, 40
    x = random_low_rank(kx, m, n, rank, dtype=jnp.float64)
    spoil = {
        "generic": lambda a: a,
        "ill-conditioned": lambda a: a * jnp.logspace(0, -3, rank)[None],
        "deficient": lambda a: a.at[:, 3:].set(a[:, :2]),
    }[partner]
    x = lrjax.LowRank(spoil(x.left), spoil(x.right))
    truth = random_low_rank(kt, m, n, 2, dtype=jnp.float64).materialize()
    weights = jr.uniform(kd, (m, n), jnp.float64, 0, 3.0)
    eta = jr.uniform(ke, (), jnp.float64, 0.05, 1) / jnp.max(weights)  # at most 1/L
    value = lambda x: 0.5 * jnp.sum(weights * (x.materialize() - truth) ** 2)
    tx = lrjax.scale_by_gram(order=order)

    def inside(g, partner):
        """``‖G Q‖²`` with an orthonormal basis of the columns, by an SVD."""
        u, s, _ = jnp.linalg.svd(partner, full_matrices=False)
        return jnp.sum((g @ (u * (s > 1e-6 * s[0])[None])) ** 2)

    def body(carry, turn):
        x, state = carry
        dense = weights * (x.materialize() - truth)
        updates, state = tx.update(jax.grad(value)(x), state, x)
        both = inside(dense, x.right), inside(dense.T, x.left)
        due = jnp.any(updates.left) if order == "greedy" else turn % 2 == 0
        moved = jax.tree.map(lambda a, u: a - eta * u, x, updates)
        moves = [jnp.any(u) for u in jax.tree.leaves(updates)]
        known = jnp.stack([value(x), value(moved), eta / 2 * jnp.where(due, *both)])
        return (moved, state), (known, jnp.stack([*moves, due]))

    return jax.lax.scan(body, (x, tx.init(x)), jnp.arange(size))[1]


@pytest.mark.slow
@pytest.mark.parametrize("partner", ["generic", "ill-conditioned", "deficient"])
@pytest.mark.parametrize("order", ["alternating", "greedy"])
def test_one_factor_at_a_time_is_monotone(getkey, x64, order, partner):
    """``f(X⁺) ≤ f(X) − η/2 ‖G Q‖²`` for ``η ≤ 1/L``, at any rank and condition."""
    run = jax.jit(jax.vmap(lambda key: descent(key, order, partner)))
    known, moves = run(jr.split(getkey(), 20))
    before, after, promised = np.moveaxis(np.asarray(known), -1, 0)
    assert np.all(after <= before - promised + 1e-6 * promised + 1e-15)
    left, right, due = np.moveaxis(np.asarray(moves), -1, 0)
    # One factor moves, the one whose turn it is.
    np.testing.assert_array_equal(left, due)
    np.testing.assert_array_equal(right, ~due)


def test_greedy_chooses_for_each_member_of_a_stack(getkey, x64):
    x = random_low_rank(getkey(), 6, 5, 2, batch=(8,), dtype=jnp.float64)
    g = random_low_rank(getkey(), 6, 5, 2, batch=(8,), dtype=jnp.float64)
    both = update(lrjax.scale_by_gram(), g, x)
    step = update(lrjax.scale_by_gram(order="greedy"), g, x)
    dual = [
        np.sum(np.asarray(a * b), axis=(1, 2))
        for a, b in zip(jax.tree.leaves(g), jax.tree.leaves(both), strict=True)
    ]
    left = (dual[0] >= dual[1])[:, None, None]
    assert_close(step.left, jnp.asarray(np.where(left, both.left, 0)))
    assert_close(step.right, jnp.asarray(np.where(left, 0, both.right)))

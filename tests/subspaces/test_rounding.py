"""What is left of a gradient by rounding alone is no direction: nothing follows it."""

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

import lrjax
from tests.helpers import assert_close


sub = lrjax.subspaces


def of_rank(key, m, n, rank):
    left, right = jr.split(key)
    return jr.normal(left, (m, rank)) @ jr.normal(right, (rank, n))


def last_update(tx, gradients):
    params = {"w": jnp.zeros_like(gradients[0])}
    step, state = jax.jit(tx.update), tx.init(params)
    for g in gradients:
        updates, state = step({"w": g}, state, params)
    return updates["w"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [lrjax.fira, lrjax.subtrack])
def test_a_residual_of_rounding_size_does_not_hold_the_next_one_down(recipe):
    # A batch of four leaves nothing outside the basis of rank eight that it sets.
    gradients = [of_rank(jr.key(i), 32, 40, 4) for i in range(3)]
    free = last_update(recipe(1.0, rank=8, max_growth=None), gradients[:2])
    limited = last_update(recipe(1.0, rank=8), gradients[:2])
    assert_close(limited, free, rtol=1e-5)
    # The first real residual sets the limit of the one after it.
    held = last_update(recipe(1.0, rank=8, max_growth=0.1), gradients)
    assert jnp.linalg.norm(held) < jnp.linalg.norm(limited)


@pytest.mark.slow
def test_the_sign_of_rounding_is_no_direction():
    key, rank = jr.key(0), 4
    dead = jr.normal(key, (24, 24)).at[::2].set(0.0)
    tx = lrjax.frugal(1.0, rank=rank)
    assert jnp.max(jnp.abs(last_update(tx, [dead])[::2])) < 1e-5  # where a sign is one
    # A gradient inside the subspace leaves nothing outside, at any scale.
    inside = sub.Project()
    adam = optax.scale_by_adam()
    signed = lrjax.project_updates(adam, sub.SVD(rank), lift=sub.SignResidual())
    plain = lrjax.project_updates(adam, sub.SVD(rank), lift=inside)
    for scale in (1.0, 1e-12, 1e12):
        g = scale * of_rank(key, 24, 24, 3)
        assert_close(last_update(signed, [g]), last_update(plain, [g]), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["both", "short"])
@pytest.mark.parametrize("axis", [0, 1])
def test_units_without_a_gradient_stay_where_they_are(side, axis):
    alive = jnp.expand_dims(jnp.arange(16) % 2, 1 - axis)
    tx = lrjax.soap(1.0, weight_decay=0.0, side=side)
    step = jax.jit(tx.update)
    w = {"w": jnp.zeros((16, 16))}
    state = tx.init(w)
    for i in range(60):
        g = {"w": jr.normal(jr.key(i), (16, 16)) * alive}
        updates, state = step(g, state, w)
        w = optax.apply_updates(w, updates)
    moved = jnp.abs(w["w"])
    assert jnp.max(moved * (1 - alive)) < 1e-3 * jnp.max(moved)


@pytest.mark.slow_but("1-1.0-columns")
@pytest.mark.parametrize("normalize", ["columns", "qr"])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("steps", [1, 10])
def test_momentum_of_lower_rank_gives_no_step_outside_it(normalize, scale, steps):
    true, rank = 4, 12
    g = scale * of_rank(jr.key(3), 32, 48, true)
    tx = lrjax.dion(1.0, rank, normalize=normalize, weight_decay=0.0)
    values = jnp.linalg.svd(last_update(tx, [g] * steps), compute_uv=False)
    assert jnp.linalg.norm(values[true:]) < 0.02
    assert values[true - 1] > 0.1


@pytest.mark.slow_but("qr")
@pytest.mark.parametrize("normalize", ["columns", "qr"])
def test_columns_without_a_direction_take_up_new_ones(normalize):
    few, more = of_rank(jr.key(3), 32, 48, 2), of_rank(jr.key(4), 32, 48, 8)
    tx = lrjax.dion(1.0, 8, normalize=normalize, momentum=0.5, weight_decay=0.0)
    values = jnp.linalg.svd(last_update(tx, [few] * 3 + [more] * 8), compute_uv=False)
    assert values[7] > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("blocks", [1, 2, 8])
@pytest.mark.parametrize("first", [None, sub.SVD(8)], ids=["random", "svd"])
def test_full_rank_momentum_survives_every_turn_of_the_basis(when, blocks, first, x64):
    """Also that of the members of a stack whose gradients start late."""
    basis = sub.Power(8, blocks=blocks, first=first)
    schedule = sub.Always(when=when)
    tx = lrjax.project_updates(
        optax.trace(0.9), basis, schedule=schedule, carry=sub.Rotate()
    )
    plain = optax.trace(0.9)
    params = {"w": jnp.zeros((2, 8, 20))}
    state, want = tx.init(params), plain.init(params)
    step = jax.jit(tx.update)
    for i in range(10):
        g = jr.normal(jr.key(i), (2, 8, 20), jnp.float64)
        g = {"w": g.at[1].set(jnp.where(i < 3, 0.0, g[1]))}
        updates, state = step(g, state, params)
        expected, want = plain.update(g, want)
        assert_close(updates, expected, rtol=1e-9)


@pytest.mark.slow
def test_a_geodesic_basis_stays_orthonormal():
    basis = sub.Geodesic(4, step_size=1.0)
    tx = lrjax.project_updates(optax.identity(), basis, schedule=sub.Always())
    params = {"w": jnp.zeros((16, 24))}

    def step(state, key):
        _, state = tx.update({"w": 10 * jr.normal(key, (16, 24))}, state, params)
        return state, None

    keys = jr.split(jr.key(0), 1000)
    state, _ = jax.lax.scan(step, tx.init(params), keys)
    p = state.basis["w"]
    assert jnp.max(jnp.abs(p.T @ p - jnp.eye(4))) < 1e-4


@pytest.mark.slow
def test_the_null_space_of_the_first_gradients_is_no_accident():
    """Gradients of a small batch, once more but for rounding, give the same optimizer."""
    tx = lrjax.soap(1.0, weight_decay=0.0, refresh_every=2)
    gradients = [of_rank(jr.key(i), 12, 20, 3) for i in range(6)]
    noise = [1 + 1e-7 * jr.normal(jr.key(100 + i), (12, 20)) for i in range(6)]
    again = [g * e for g, e in zip(gradients, noise, strict=True)]
    assert_close(last_update(tx, again), last_update(tx, gradients), rtol=2e-2)

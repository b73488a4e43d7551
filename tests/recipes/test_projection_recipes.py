"""Each recipe that stays in its subspace: one exact fact about it."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax import subspaces as sub
from lrjax._matrices import MatrixLeaf

from ..helpers import assert_close, random_low_rank


anything = lambda path, shape: len(shape) >= 2


def first_step(recipe, g):
    """The first update at rate one, uphill, and the state of the subspace loop."""
    updates, state = jax.jit(lambda g: recipe.update(g, recipe.init(g), g))(g)
    loop = [x for x in jax.tree.leaves(state, is_leaf=is_loop) if is_loop(x)]
    return -updates, loop[0]


def is_loop(x):
    return isinstance(x, sub.ProjectUpdatesState)


@pytest.mark.slow
def test_randomized_galore_is_galore_where_the_rank_suffices(rollout, noisy, getkey):
    """Adam commutes with the sign of a single singular vector."""
    g = noisy(getkey(), 4, 8, 1) * noisy(getkey(), 4, 1, 12)
    run = lambda method: rollout(lrjax.galore(1.0, 1, method=method, where=anything), g)[0]
    assert_close(run("randomized"), run("svd"), condition=100)


@pytest.mark.slow
def test_four_leaves_take_turns_over_a_period(rollout, noisy, getkey):
    """They refresh a quarter of 200 steps apart: updates of rank one show the basis."""
    g = {name: noisy(getkey(), 201, 8, 9) for name in "abcd"}
    updates, _ = rollout(lrjax.galore(1.0, 1), g)

    def moments_of_change(u):
        direction = u / jnp.linalg.norm(u, axis=1, keepdims=True)
        cosines = jnp.abs(jnp.sum(direction[1:] * direction[:-1], axis=1)[:, 0])
        return (jnp.flatnonzero(cosines < 1 - 1e-3) + 1).tolist()

    found = {name: moments_of_change(u) for name, u in updates.items()}
    assert found == {"a": [200], "b": [150], "c": [100], "d": [50]}


@pytest.mark.slow
def test_sara_draws_everything_at_full_rank(rollout, noisy, getkey):
    g = noisy(getkey(), 3, 6, 9)
    run = lambda recipe: rollout(recipe(1.0, 6, refresh_every=2, where=anything), g)[0]
    assert_close(run(lrjax.sara), run(lrjax.galore), condition=1e3)


def test_grass_at_full_rank_is_adam(rollout, noisy, getkey):
    g = noisy(getkey(), 4, 9, 6)
    got, _ = rollout(lrjax.grass(1.0, 6, scale=1.0, where=anything), g)
    assert_close(got, rollout(optax.adam(1.0), g)[0])


@pytest.mark.slow
def test_sumo_at_full_rank_is_the_polar_factor_of_momentum(rollout, noisy, getkey, x64):
    """Whatever the bases are, and across their changes."""
    g = {"w": noisy(getkey(), 5, 5, 8, dtype=jnp.float64)}
    g["b"] = g["w"][:, 0]
    got, _ = rollout(lrjax.sumo(1.0, 5, refresh_every=2, where=anything), g)
    momentum, _ = rollout(optax.trace(0.95), g["w"])
    assert_close(-got["w"], lrjax.linalg.polar(momentum), condition=1e3)
    assert_close(got["b"], rollout(optax.adam(1.0), g["b"])[0])


@pytest.mark.slow
def test_the_heads_of_galore_plus_share_the_basis_of_one(getkey):
    heads = random_low_rank(getkey(), 8, 12, 2, batch=(3,)).materialize()
    heads = heads.at[1].set(0.0)  # a head without a gradient is never the one
    got, state = first_step(
        lrjax.galore_plus(1.0, 2, scale=1.0, fraction=0.25, where=anything), heads
    )
    (p,) = state.basis
    inside = p @ (p.T @ heads)
    lost = jnp.linalg.norm(heads - inside, axis=(1, 2)) / jnp.linalg.norm(heads)
    drawn, other = (0, 2) if lost[0] < lost[2] else (2, 0)
    assert lost[drawn] < 1e-6 < 0.1 < lost[other]
    # The first step of Adam is the sign: of all coordinates inside, of a few outside.
    outside = (got - p @ jnp.sign(p.T @ heads))[other]
    chosen = jnp.abs(outside) > 0.5
    assert chosen.sum() == 24
    want = jnp.where(chosen, jnp.sign((heads - inside)[other]), 0)
    assert_close(outside, want, rtol=1e-3)


def test_fused_heads_are_cut_apart(getkey):
    spec = sub.MatrixSpec(blocks=3)
    x = jr.normal(getkey(), (2, 24, 8))
    fused = MatrixLeaf("w", 0, spec, x.shape)
    heads = fused.view(x)
    assert sub.matrix_shape(x.shape, spec) == (2, 3, 8, 8)
    assert_close(heads, x.reshape(2, 3, 8, 8), rtol=0)
    assert_close(fused.restore(heads), x, rtol=0)
    columns = sub.MatrixSpec(rows=(-1,), cols=(-2,), blocks=3)
    fused = MatrixLeaf("w", 0, columns, x.mT.shape)
    assert_close(fused.view(x.mT), heads, rtol=0)
    assert_close(fused.restore(heads), x.mT, rtol=0)
    five = lambda path, shape: sub.MatrixSpec(blocks=5)
    with pytest.raises(ValueError, match=r"24 rows .* into 5 equal blocks"):
        lrjax.galore_plus(1.0, where=five).init(x)


@pytest.mark.slow
def test_a_basis_shared_by_all_is_that_of_their_gradients_side_by_side(getkey):
    a = jr.normal(getkey(), (2, 3, 6, 9))
    basis = sub.Shared(sub.SVD(2), choice="all")
    tx = lrjax.project_updates(optax.identity(), basis, where=anything)
    step = jax.jit(lambda a: tx.update(a, tx.init(a)))
    got, state = step(a)
    assert state.basis.shape == (2, 1, 6, 2)
    joined = jnp.concatenate([a[:, h] for h in range(3)], axis=-1)
    p = jnp.linalg.svd(joined, full_matrices=False)[0][:, None, :, :2]
    assert_close(got, p @ (p.mT @ a), condition=10)
    alone = step(a[0, 0])[0]  # no heads: its own basis
    p = jnp.linalg.svd(a[0, 0])[0][:, :2]
    assert_close(alone, p @ (p.T @ a[0, 0]), condition=10)


@pytest.mark.slow
def test_q_galore_steps_in_a_quantized_basis(getkey):
    g = jr.normal(getkey(), (16, 24))
    recipe = lrjax.q_galore(1.0, 4, block=32, min_size=1, where=anything)
    got, state = first_step(recipe, g)
    basis = sub.Quantized(sub.SVD(4), group=32)
    projector = basis.projector(state.basis, jr.key(0), 16, 4, True)
    p = jnp.linalg.svd(g)[0][:, :4]
    step = state.basis.scale.max()
    assert jnp.max(jnp.abs(projector.matrix - p)) <= 0.5 * step * (1 + 1e-3)
    assert jnp.linalg.matrix_rank(got) == 4
    assert_close(got, 0.25 * projector.lift(jnp.sign(projector.project(g))), rtol=1e-4)


@pytest.mark.slow
def test_accumulated_gradients_are_the_projection_of_their_mean(rollout, noisy, getkey):
    g = {"w": noisy(getkey(), 8, 6, 9), "b": noisy(getkey(), 8, 1, 5)[:, 0]}
    key = getkey()

    def run(steps, g):
        tx = lrjax.accumulate_gradients(optax.trace(0.5), 2, steps, where=anything, key=key)
        return rollout(tx, g)[0]

    got = run(4, g)
    means = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]).mean(1), g)
    want = run(1, means)  # one batch a cycle: the same keys
    for name in g:
        assert_close(got[name][3::4], want[name], condition=10)
        silent = jnp.delete(got[name], jnp.array([3, 7]), axis=0)
        assert not silent.any()
    assert_close(got["b"][7], means["b"][1] + 0.5 * means["b"][0])
    assert np.linalg.matrix_rank(got["w"][3]) == 2
    assert np.linalg.matrix_rank(got["w"][7]) == 4  # the next cycle draws anew


@pytest.mark.slow
def test_a_bad_microbatch_is_left_out_of_the_mean(rollout, noisy, getkey):
    g = {"w": noisy(getkey(), 4, 6, 9), "b": noisy(getkey(), 4, 1, 5)[:, 0]}
    spoilt = {"w": g["w"].at[1, 2, 3].set(jnp.nan), "b": g["b"]}
    key = getkey()

    def run(steps, g):
        tx = lrjax.accumulate_gradients(optax.identity(), 2, steps, where=anything, key=key)
        return jax.tree.map(lambda x: x[-1], rollout(tx, g)[0])

    kept = jax.tree.map(lambda x: x[jnp.array([0, 2, 3])], g)
    assert_close(run(4, spoilt), run(3, kept), condition=10)
    all_bad = jax.tree.map(lambda x: x * jnp.inf, g)
    assert not any(x.any() for x in jax.tree.leaves(run(4, all_bad)))

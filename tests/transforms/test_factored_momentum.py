"""Momentum kept as an SVD: the slow dense reference and its special cases."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from tests.helpers import assert_close, random_low_rank
from tests.reference.mofasgd import mofasgd as reference


STEPS, DECAY = 6, 0.9


def make(rank):
    return lrjax.factored_momentum(rank, DECAY, where=lambda path, shape: len(shape) >= 2)


@functools.cache
def scan(rank):
    """One compiled program a rank: all updates and all momenta as dense matrices."""

    def dense(state):
        scaled = state.left * state.values[..., None, :]
        return jnp.einsum("...mr,...nr->...mn", scaled, state.right)

    @jax.jit
    def run(grads):
        def step(state, g):
            updates, state = make(rank).update(g, state)
            return state, (updates, dense(state))

        return jax.lax.scan(step, make(rank).init(grads[0]), grads)[1]

    return run


def gradients(key, dtype=jnp.float32):
    """Noise around a fixed gradient, of a stack of two matrices."""
    fixed, fresh = jr.split(key)
    mean = jr.normal(fixed, (1, 2, 6, 9), dtype)
    return mean + 0.5 * jr.normal(fresh, (STEPS, 2, 6, 9), dtype)


@pytest.mark.slow
def test_a_stack_of_matrices_equals_the_reference(getkey, x64):
    """Also the identity of the core: M is SVD_r of the decayed M and the tangent part."""
    g = gradients(getkey(), jnp.float64)
    updates, momenta = scan(2)(g)
    for layer in range(2):
        want_updates, want_momenta = reference(list(np.asarray(g[:, layer])), 2, DECAY)
        assert_close(updates[:, layer], want_updates, condition=1e6)
        assert_close(momenta[:, layer], want_momenta, condition=1e6)
    assert_close(scan(2)(g.mT)[0], updates.mT, condition=1e6)


def test_full_rank_is_the_polar_factor_of_heavy_ball_momentum(getkey, x64):
    g = gradients(getkey(), jnp.float64)
    updates, momenta = scan(6)(g)
    want = [sum(DECAY ** (t - k) * g[k] for k in range(t + 1)) for t in range(STEPS)]
    assert_close(momenta, jnp.stack(want), condition=100)
    assert_close(updates, lrjax.linalg.polar(jnp.stack(want)), condition=1e4)


@pytest.mark.slow
def test_a_zero_gradient_decays_and_repeats(getkey, x64):
    g = gradients(getkey(), jnp.float64).at[3].set(0)
    updates, momenta = scan(2)(g)
    assert_close(updates[3], updates[2])
    assert_close(momenta[3], DECAY * momenta[2])


@pytest.mark.slow
def test_null_directions_of_the_momentum_do_not_move_the_weights(getkey):
    one = jnp.einsum("li,lj->lij", jr.normal(getkey(), (2, 6)), jr.normal(getkey(), (2, 9)))
    updates, _ = scan(2)(jnp.broadcast_to(one, (STEPS, 2, 6, 9)))
    size = jnp.linalg.norm(one, axis=(-2, -1), keepdims=True)
    assert_close(updates, jnp.broadcast_to(one / size, updates.shape), condition=10)


@pytest.mark.slow
def test_gradients_of_any_size_in_float32(getkey):
    g = gradients(getkey())
    want = scan(2)(g)[0]
    for scale in (1e-9, 1e9):
        assert_close(scan(2)(scale * g)[0], want, condition=1e3)


@pytest.mark.slow
def test_zero_and_non_finite_gradients(getkey):
    g = gradients(getkey()).at[0].set(0).at[4, 0, 1, 1].set(jnp.inf)
    updates, momenta = scan(2)(g)
    assert not np.any(updates[0])
    assert_close(updates[1], scan(2)(g[1:])[0][0])  # the first gradient that counts
    assert not np.any(updates[4, 0])
    assert np.any(updates[4, 1])
    assert_close(momenta[4, 0], momenta[3, 0], rtol=0)


def test_memory_is_r_times_m_plus_n_plus_one():
    params = {"w": jnp.zeros((3, 16, 24)), "b": jnp.zeros(5)}
    state = jax.eval_shape(make(4).init, params)
    assert sum(x.size for x in jax.tree.leaves(state)) == 3 * 4 * (16 + 24 + 1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cholesky", "qr"])
def test_product_svd_of_dependent_and_ill_scaled_columns(method, getkey, x64):
    """A tall factor with a repeated and a tiny column, a zero one, and one too wide."""
    x = random_low_rank(getkey(), 9, 4, 3, dtype=jnp.float64)
    tiny = 1e-12 * jr.normal(getkey(), (9, 1), jnp.float64)
    left = jnp.concatenate([x.left, x.left[:, :1], tiny, jnp.zeros((9, 1))], axis=1)
    core = jr.normal(getkey(), (6, 5), jnp.float64)
    right = jr.normal(getkey(), (4, 5), jnp.float64)
    product_svd = jax.jit(
        lrjax.linalg.product_svd, static_argnums=3, static_argnames="method"
    )
    got = product_svd(left, core, right, 3, method=method)
    u, s, vt = jnp.linalg.svd(left @ core @ right.T, full_matrices=False)
    assert_close(got.values, s[:3], condition=100)
    value = (got.left * got.values[None]) @ got.right.T
    assert_close(value, (u[:, :3] * s[None, :3]) @ vt[:3], condition=100)
    small = product_svd(left[:, 4:5], core[4:5], right, 1, method=method)
    assert_close(
        small.values,
        jnp.linalg.norm(tiny) * jnp.linalg.norm(core[4:5] @ right.T)[None],
        condition=10,
    )
    with pytest.raises(ValueError, match="rank between 1 and 4"):
        lrjax.linalg.product_svd(left, core, right, 5)

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import lrjax
from tests.helpers import assert_close, relative_error, with_spectrum


anything = lambda path, shape: len(shape) >= 2


def make(rank, momentum=0.95, **kwargs):
    return lrjax.compress_momentum(rank, momentum, where=anything, **kwargs)


def run(tx, grads):
    step = lambda state, g: tx.update(g, state)[::-1]
    return jax.lax.scan(step, tx.init(grads[0]), grads)


def test_full_rank_momentum_is_heavy_ball(getkey, x64):
    g = jr.normal(getkey(), (4, 6, 9), jnp.float64)
    state, _ = run(make(6, 0.8), g)
    want = sum(0.8 ** (4 - k) * g[k] for k in range(4))
    assert_close(state.buffer, want, condition=100)


@pytest.mark.slow_but("qr")
@pytest.mark.parametrize("normalize", ["columns", "qr"])
def test_a_constant_momentum_converges_to_its_polar_factor(normalize, getkey, x64):
    values = jnp.array([4.0, 3.0, 2.0, 0.5, 0.2, 0.1], jnp.float64)
    m = with_spectrum(getkey(), 6, 9, values, jnp.float64)
    tx = make(3, 1.0, normalize=normalize)  # momentum 1 never takes anything away
    state = tx.init(m)._replace(buffer=m)
    step = lambda state, _: tx.update(jnp.zeros_like(m), state)[::-1]
    _, updates = jax.lax.scan(step, state, length=200)
    u, _, vt = jnp.linalg.svd(m)
    assert relative_error(updates[-1], u[:, :3] @ vt[:3]) < 1e-9
    if normalize == "qr":
        singular = jnp.linalg.svd(updates[0], compute_uv=False)
        assert_close(singular[:3], jnp.ones(3))


def test_powersgd_loses_nothing(getkey, x64):
    g = jr.normal(getkey(), (5, 6, 9), jnp.float64)
    state, updates = run(make(2, 0.0, normalize="none"), g)
    assert_close(updates.sum(0) + state.buffer, g.sum(0))


def test_zero_and_non_finite_gradients_leave_the_warm_start(getkey):
    tx = make(2)
    g = jr.normal(getkey(), (6, 9))
    state = tx.init(g)
    update = jax.jit(tx.update)
    for bad in (jnp.zeros_like(g), g.at[0, 0].set(jnp.nan)):
        updates, new = update(bad, state)
        assert not jnp.any(updates)
        assert_close(new, state)

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.sharding import PartitionSpec

import lrjax
from tests.helpers import assert_close, relative_error, with_spectrum


anything = lambda path, shape: len(shape) >= 2


def make(rank, decay=0.95, **kwargs):
    return lrjax.compress_momentum(rank, decay, where=anything, **kwargs)


def run(tx, grads):
    step = lambda state, g: tx.update(g, state)[::-1]
    return jax.lax.scan(step, tx.init(grads[0]), grads)


def test_full_rank_momentum_is_heavy_ball(getkey, x64):
    g = jr.normal(getkey(), (4, 6, 9), jnp.float64)
    state, _ = run(make(6, 0.8), g)
    want = sum(0.8 ** (4 - k) * g[k] for k in range(4))
    assert_close(state.buffer, want, condition=100)


@pytest.mark.parametrize("normalize", ["columns", "qr"])
def test_a_constant_momentum_converges_to_its_polar_factor(normalize, getkey, x64):
    values = jnp.array([4.0, 3.0, 2.0, 0.5, 0.2, 0.1], jnp.float64)
    m = with_spectrum(getkey(), 6, 9, values, jnp.float64)
    tx = make(3, 1.0, normalize=normalize)  # decay 1 never takes anything away
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


def test_powersgd_reduces_inside_shard_map(getkey):
    """Eight devices with a gradient each do what one does with their mean."""
    g = jr.normal(getkey(), (8, 3, 6, 9))
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("data",), axis_types=auto)
    average = lambda x: jax.lax.pmean(x, "data")
    tx = make(2, 0.0, normalize="none", reduce=average, key=jr.key(1))

    def device(g):
        state, updates = run(tx, g[0])
        return updates[None], state.buffer[None]

    spec = PartitionSpec("data")
    mapped = jax.shard_map(
        device, mesh=mesh, in_specs=spec, out_specs=(spec, spec), check_vma=False
    )
    updates, errors = jax.jit(mapped)(g)
    assert_close(updates, jnp.broadcast_to(updates[:1], updates.shape))
    single = make(2, 0.0, normalize="none", key=jr.key(1))
    state, want = run(single, g.mean(0))
    assert_close(updates[0], want, condition=100)
    assert_close(errors.mean(0), state.buffer, condition=100)
    text = jax.jit(mapped).lower(g).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text


def test_zero_and_non_finite_gradients_leave_the_warm_start(getkey):
    tx = make(2)
    g = jr.normal(getkey(), (6, 9))
    state = tx.init(g)
    for bad in (jnp.zeros_like(g), g.at[0, 0].set(jnp.nan)):
        updates, new = tx.update(bad, state)
        assert not jnp.any(updates)
        assert_close(new, state)


def test_dion_gives_the_rest_to_adam(getkey):
    params = {"w": jr.normal(getkey(), (8, 12)), "b": jr.normal(getkey(), (5,))}
    tx = lrjax.dion(0.1, 8, weight_decay=0.0)
    updates, _ = tx.update(params, tx.init(params), params)
    assert_close(updates["b"], -0.1 * jnp.sign(params["b"]), rtol=1e-5)
    assert jnp.linalg.norm(updates["w"], 2) < 0.1 * (8 / 12) ** 0.5 * 2


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="True and False"):
        lrjax.compress_momentum(
            2, where=lambda path, shape: lrjax.subspaces.MatrixSpec()
        ).init(jnp.ones((8, 8)))

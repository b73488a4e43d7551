"""Optimizers that compress the momentum: Dion, Orth-Dion, PowerSGD, MoFaSGD."""

import math
import re

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import lrjax
from tests.helpers import assert_close


every_matrix = lambda path, shape: len(shape) >= 2
RATE, RANK, STEPS = 0.1, 2, 5


def run(tx, params, grads):
    step = lambda state, g: tx.update(g, state, params)[::-1]
    return jax.lax.scan(step, tx.init(params), grads)


@pytest.fixture(scope="module")
def data_parallel():
    """PowerSGD on eight devices with a gradient each: all updates, errors, HLO."""
    params = {"w": jnp.zeros((16, 24)), "b": jnp.zeros(3)}
    kw, kb = jr.split(jr.key(0))
    # (device, step, …), with a common part and much of each device's own
    grads = {"w": jr.normal(kw, (8, STEPS, 16, 24)), "b": jr.normal(kb, (8, STEPS, 3))}
    grads = jax.tree.map(lambda g: g + g[:1], grads)
    tx = lrjax.power_sgd(RATE, RANK, axis_name="data", key=jr.key(1))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = lrjax.data_parallel_specs(jax.eval_shape(tx.init, params), "data")

    def train(params, state, grads):
        def step(state, g):
            updates, state = tx.update(g, state, params)
            return state, updates

        return jax.lax.scan(step, state, jax.tree.map(lambda g: g[0], grads))

    # With the check of replication on: JAX itself proves that all devices agree.
    init = jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs)
    mapped = jax.jit(
        jax.shard_map(
            train,
            mesh=mesh,
            in_specs=(P(), specs, P("data")),
            out_specs=(specs, P()),
        )
    )
    compiled = mapped.lower(params, init(params), grads).compile()
    state, updates = compiled(params, init(params), grads)
    errors = state[0][0].buffer["w"].reshape(8, 16, 24)
    return params, grads, updates, errors, compiled.as_text()


@pytest.mark.slow
def test_power_sgd_on_eight_devices_is_one_on_the_mean_gradient(data_parallel):
    params, grads, updates, errors, _ = data_parallel
    mean = jax.tree.map(lambda g: g.mean(0), grads)
    state, want = run(lrjax.power_sgd(RATE, RANK, key=jr.key(1)), params, mean)
    assert_close(updates, want, condition=1e3)
    assert_close(errors.mean(0), state[0][0].buffer["w"], condition=1e3)
    # What a device could not send is its own.
    assert jnp.linalg.norm(errors[0] - errors[1]) > 0.1 * jnp.linalg.norm(errors[0])


@pytest.mark.slow
def test_power_sgd_sends_only_the_thin_factors(data_parallel):
    text = data_parallel[-1]
    assert "all-gather" not in text
    sent = 0
    for found in re.finditer(r"= ([^=\n]*?) all-reduce(?:-start)?\(", text):
        for shape in re.findall(r"\[([\d,]*)\]", found.group(1)):
            sent += math.prod(int(n) for n in shape.split(",") if n)
    assert sent == (16 + 24) * RANK + 3


def test_power_sgd_telescopes(getkey, x64):
    """The decompressed gradients and the error add up to the gradients: nothing is lost."""
    params = {"w": jnp.zeros((3, 8, 9), jnp.float64)}
    grads = {"w": jr.normal(getkey(), (STEPS, 3, 8, 9), jnp.float64)}
    tx = lrjax.power_sgd(1.0, 1, momentum=0.0, where=every_matrix)
    state, updates = run(tx, params, grads)
    # Without momentum U = P Rᵀ + P Rᵀ.
    total = -updates["w"].sum(0) / 2 + state[0][0].buffer["w"]
    assert_close(total, grads["w"].sum(0), condition=10)


def test_power_sgd_at_full_rank_is_sgd_with_momentum(getkey, x64):
    params = {"w": jnp.zeros((6, 9), jnp.float64)}
    grads = {"w": jr.normal(getkey(), (STEPS, 6, 9), jnp.float64)}
    tx = lrjax.power_sgd(RATE, 6, momentum=0.8, where=every_matrix)
    _, updates = run(tx, params, grads)
    _, momenta = run(optax.trace(0.8), params, grads)
    assert_close(updates["w"], -RATE * (grads["w"] + momenta["w"]), condition=100)


def test_power_sgd_compresses_where_it_pays():
    params = {"w": jnp.zeros((64, 64)), "thin": jnp.zeros((64, 4)), "b": jnp.zeros(9)}
    state = jax.eval_shape(lrjax.power_sgd(RATE, 4).init, params)
    compressed = {n for n, q in state[0][0].right.items() if q != optax.MaskedNode()}
    assert compressed == {"w"}
    # Nothing pays: momentum on the whole gradient.
    thin = {"thin": params["thin"] + 1.0}
    tx = lrjax.power_sgd(RATE, 4)
    updates, _ = tx.update(thin, tx.init(thin), thin)
    assert_close(updates, jax.tree.map(lambda g: -2 * RATE * g, thin))


@jax.jit
def first_updates(params):
    dion = lrjax.dion(0.1, 3, weight_decay=0.0)
    mofasgd = lrjax.mofasgd(0.1, 3, weight_decay=0.5)
    return [tx.update(params, tx.init(params), params)[0] for tx in (dion, mofasgd)]


@pytest.mark.slow
def test_matrices_get_polar_factors_and_the_rest_adam(getkey):
    params = {"w": jr.normal(getkey(), (8, 12)), "b": jr.normal(getkey(), (5,))}
    dion, mofasgd = first_updates(params)
    assert_close(dion["b"], -0.1 * jnp.sign(params["b"]), rtol=1e-5)
    assert jnp.linalg.norm(dion["w"], 2) < 0.1 * (8 / 12) ** 0.5 * 2
    u, _, vt = jnp.linalg.svd(params["w"], full_matrices=False)
    decayed = -0.1 * (u[:, :3] @ vt[:3]) - 0.05 * params["w"]
    assert_close(mofasgd["w"], decayed, condition=1e4)
    # A vector is not decayed.
    assert_close(mofasgd["b"], -0.1 * jnp.sign(params["b"]), rtol=1e-5)


@pytest.mark.slow
def test_orth_dion_updates_are_scaled_isometries(getkey, x64):
    params = jr.normal(getkey(), (8, 12), jnp.float64)
    grads = jr.normal(getkey(), (3, 8, 12), jnp.float64)
    tx = lrjax.dion(0.1, 3, normalize="qr", weight_decay=0.0)
    _, updates = run(tx, params, grads)
    values = jnp.linalg.svd(updates, compute_uv=False)
    want = 0.1 * (8 / 12) ** 0.5 * jnp.where(jnp.arange(8) < 3, 1.0, 0.0)
    assert_close(values, jnp.broadcast_to(want, values.shape))


def test_kernels_of_a_convolution_are_matrices(getkey):
    kernel = lrjax.subspaces.MatrixSpec(rows=(0,), cols=(1, 2, 3))
    g = jr.normal(getkey(), (8, 2, 3, 3))
    conv = lrjax.dion(0.1, 2, weight_decay=0.0, where=lambda path, shape: kernel)
    flat = lrjax.dion(0.1, 2, weight_decay=0.0, where=every_matrix)
    matrix = g.reshape(8, 18)

    @jax.jit
    def both(g, matrix):
        one = lambda tx, x: tx.update(x, tx.init(x), x)
        return *one(conv, g), one(flat, matrix)[0]

    got, state, want = both(g, matrix)
    assert_close(got.reshape(8, 18), want)
    assert state[0][0].buffer.shape == g.shape


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"of shape \(5,\), which is no matrix"):
        lrjax.power_sgd(0.1, where=lambda path, shape: True).init({"b": jnp.ones(5)})

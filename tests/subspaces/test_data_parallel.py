"""Data-parallel training within shard_map is training on one device."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.sharding import AxisType, PartitionSpec as P

import lrjax

from ..helpers import assert_close


def loss(model, x, y):
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def train_step(tx, reduce):
    def step(params, state, static, x, y):
        grads = jax.grad(lambda p: loss(eqx.combine(p, static), x, y))(params)
        updates, state = tx.update(reduce(grads), state, params)
        return optax.apply_updates(params, updates), state

    return step


def test_eight_devices_train_like_one():
    model = eqx.nn.MLP(8, 8, 16, 1, key=jr.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    x, y = jr.normal(jr.key(1), (2, 32, 8))
    tx = lrjax.subspace_adam(1e-2, 4, blocks=2)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    mean = lambda grads: jax.tree.map(lambda g: jax.lax.pmean(g, "data"), grads)

    # Without the check of varying axes jax.grad leaves the sum over devices to us.
    spread = jax.shard_map(
        lambda p, s, x, y: train_step(tx, mean)(p, s, static, x, y),
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P("data")),
        out_specs=P(),
        check_vma=False,
    )

    def run(step):
        @jax.jit
        def three(params, x, y):
            return jax.lax.fori_loop(
                0, 3, lambda _, c: step(*c, x, y), (params, tx.init(params))
            )

        return three(params, x, y)

    got = run(spread)
    want = run(lambda p, s, x, y: train_step(tx, lambda g: g)(p, s, static, x, y))
    assert_close(jax.device_get(got), jax.device_get(want), condition=1e3)

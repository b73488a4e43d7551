"""Transforms on sharded factors: same numbers, same shardings, nothing tall gathered."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lrjax
from tests.helpers import assert_close, random_low_rank
from tests.registry import PARTS


pairs = {name: e for name, e in PARTS.items() if e.params == "pairs" and e.shards}
SPECS = lrjax.LowRank(jnp.zeros((16, 2)), jnp.zeros((24, 2)))
object.__setattr__(SPECS, "left", P("x", None))
object.__setattr__(SPECS, "right", P("y", None))


def mesh(axis_type):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)


def problem():
    params = {"w": random_low_rank(jr.key(0), 16, 24, 2)}
    grads = {"w": random_low_rank(jr.key(1), 16, 24, 2)}
    return params, grads


def put(tree, on):
    shardings = jax.tree.map(lambda spec: NamedSharding(on, spec), {"w": SPECS})
    return jax.device_put(tree, shardings)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("entry", pairs.values(), ids=pairs.keys())
def test_sharded_factors_stay_sharded(entry, axis_type):
    params, grads = problem()
    tx = entry.make()
    value = jnp.array(0.7)

    @jax.jit
    def update(grads, state, params):
        return tx.update(grads, state, params, value=value, grad=grads)

    want, _ = update(grads, tx.init(params), params)
    on = mesh(axis_type)
    grads, params = put(grads, on), put(params, on)
    with jax.set_mesh(on):
        state = tx.init(params)
        compiled = update.lower(grads, state, params).compile()
        got, _ = compiled(grads, state, params)
    assert_close(jax.device_get(got), jax.device_get(want), condition=1e3)
    for side in ("left", "right"):
        factor = getattr(got["w"], side)
        kept = NamedSharding(on, getattr(SPECS, side))
        assert factor.sharding.is_equivalent_to(kept, factor.ndim)
    text = compiled.as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text


def test_stacks_may_be_sharded_over_their_layers():
    on = mesh(AxisType.Explicit)
    params = random_low_rank(jr.key(0), 16, 24, 2, batch=(4,))
    grads = random_low_rank(jr.key(1), 16, 24, 2, batch=(4,))
    tx = lrjax.scale_by_gram(1e-3)
    want, _ = tx.update(grads, tx.init(params), params)
    by_layer = NamedSharding(on, P("x"))
    grads, params = jax.device_put((grads, params), by_layer)
    with jax.set_mesh(on):
        compiled = jax.jit(tx.update).lower(grads, tx.init(params), params).compile()
        got, _ = compiled(grads, tx.init(params), params)
    assert_close(jax.device_get(got), jax.device_get(want), condition=1e3)
    text = compiled.as_text()
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all"))

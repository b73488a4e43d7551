import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax import LowRank, flows, gradient_flow, lowrank, metrics

from ..helpers import assert_close


def drawn(key, widths):
    """Frozen weights without singular values near zero, and a target far from them."""
    *keys, last = jr.split(key, len(widths))
    weights = [
        jnp.linalg.qr(jr.normal(k, (max(a, b), max(a, b))))[0][:b, :a]
        + 0.3 * jr.normal(jr.fold_in(k, 1), (b, a)) / max(a, b) ** 0.5
        for k, a, b in zip(keys, widths[:-1], widths[1:], strict=True)
    ]
    return weights, jr.normal(last, (widths[-1], widths[0]))


def dense_floor(weights, target, rank):
    product = np.linalg.multi_dot([np.eye(len(target)), *map(np.asarray, weights[::-1])])
    tail = np.linalg.svd(np.asarray(target) - product)[1][rank * len(weights) :]
    return 0.5 * np.sum(tail**2)


@pytest.mark.slow_but("1-1", "1-2", "2-2")
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_adapters_reach_the_tail_of_the_spectrum(layers, rank, getkey):
    weights, target = drawn(getkey(), (9,) * (layers + 1))
    adapters = flows.deep_lora_optimum(weights, target, rank)
    assert all(x.rank == rank for x in adapters)
    floor = flows.deep_lora_floor(weights, target, rank)
    np.testing.assert_allclose(floor, dense_floor(weights, target, rank), atol=1e-13)
    reached = flows.deep_lora_loss(adapters, weights, target)
    assert jnp.abs(reached - floor) <= 1e-9 * jnp.sum(target**2)


@pytest.mark.slow
def test_hidden_layers_may_be_wider_than_both_ends(getkey):
    weights, target = drawn(getkey(), (5, 9, 8, 6))
    adapters = flows.deep_lora_optimum(weights, target, 1)
    assert [x.shape for x in adapters] == [w.shape for w in weights]
    floor = dense_floor(weights, target, 1)
    assert floor > 1e-3
    reached = flows.deep_lora_loss(adapters, weights, target)
    assert jnp.abs(reached - floor) <= 1e-9 * jnp.sum(target**2)


@pytest.mark.slow
def test_the_optimum_is_stationary_and_no_flow_gets_below_the_floor(getkey):
    weights, target = drawn(getkey(), (5, 5, 5, 5))
    best = flows.deep_lora_optimum(weights, target, 1)
    slope = jax.grad(flows.deep_lora_loss)(best, weights, target)
    assert max(jnp.max(jnp.abs(x)) for x in jax.tree.leaves(slope)) <= 1e-8
    start = [lowrank.gaussian_init((5, 5), 1, 0.3, key=getkey()) for _ in weights]
    end = gradient_flow(
        flows.deep_lora_loss, start, weights, target, t1=20.0, rtol=1e-6
    ).params
    floor = flows.deep_lora_floor(weights, target, 1)
    assert flows.deep_lora_loss(end, weights, target) >= floor
    # What adapters of the layers change together has at most three directions.
    moved = [w + x.materialize() for w, x in zip(weights, end, strict=True)]
    change = moved[2] @ moved[1] @ moved[0] - weights[2] @ weights[1] @ weights[0]
    assert jnp.all(metrics.singular_values(change)[3:] <= 1e-12)


@pytest.mark.slow
def test_adapters_beyond_the_spectrum_have_nothing_to_do():
    weights, target = [jnp.eye(3)] * 2, jnp.diag(jnp.array([4.0, 3.0, 2.0]))
    first, second = flows.deep_lora_optimum(weights, target, 2)
    assert jnp.linalg.norm(second.left[:, 1]) == 0
    assert flows.deep_lora_floor(weights, target, 2) == 0
    assert flows.deep_lora_loss([first, second], weights, target) <= 1e-25


@pytest.mark.slow
def test_two_layers_are_a_deep_network():
    weights, target = drawn(jr.key(0), (4, 4, 4))
    x = LowRank(jr.normal(jr.key(1), (4, 1)), jr.normal(jr.key(2), (4, 1)))
    pair, base = flows.TwoLayers(None, x), flows.TwoLayers(*weights)
    assert_close(
        flows.two_layer_loss(pair, base, target),
        flows.deep_lora_loss([None, x], weights, target),
    )


@pytest.mark.slow_but("bfloat16")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_deep_lora_keeps_the_dtype_and_runs_batched(dtype):
    weights, target = drawn(jr.key(3), (5, 5, 5))
    weights, target = jax.tree.map(lambda x: x.astype(dtype), (weights, target))
    stack = lambda x: jnp.stack([x, 2 * x])
    found = jax.jit(
        jax.vmap(lambda w, m: flows.deep_lora_optimum(w, m, 1)),
    )([stack(w) for w in weights], stack(target))
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    alone = flows.deep_lora_optimum([2 * w for w in weights], 2 * target, 1)
    for x, y in zip(found, alone, strict=True):
        one = jax.tree.map(lambda z: z[1], x)
        # Beside the rounding of a dtype that of the singular vectors.
        assert_close(one.materialize(), y.materialize(), condition=100)

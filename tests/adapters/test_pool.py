"""A pool is one for all layers: trained or frozen, under scan, vmap and checkpoints."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from tests.adapters.models import moved
from tests.helpers import assert_close


def stack(getkey, depth=3, width=4):
    make = eqx.filter_vmap(lambda k: eqx.nn.Linear(width, width, key=k))
    return make(jr.split(getkey(), depth))


def run(blocks, x):
    """The layers one after the other, by scan."""
    arrays, static = eqx.partition(blocks, eqx.is_array)
    step = lambda x, layer: (jnp.tanh(eqx.combine(layer, static)(x)), None)
    return jax.lax.scan(jax.checkpoint(step), x, arrays)[0]


def loop(blocks, x):
    """The same without scan."""
    for i in range(blocks.weight.shape[0]):
        x = jnp.tanh(jax.tree.map(lambda a, i=i: a[i], blocks)(x))
    return x


@pytest.mark.slow_but("frozen")
@pytest.mark.parametrize(
    "kind",
    [lrjax.VeRA(3), lrjax.TiedLoRA(3), lrjax.adapters.RandLoRA(3, 3.0)],
    ids=["frozen", "trained", "bases"],
)
def test_scan_equals_a_loop_in_value_and_gradient(kind, getkey):
    blocks, x = stack(getkey), jr.normal(getkey(), (4,))
    params, frozen = lrjax.partition(lrjax.adapt(blocks, kind, key=getkey()))
    params = moved(params, getkey())
    shared = jax.tree.leaves(params.pools)
    assert len(shared) == (2 if isinstance(kind, lrjax.TiedLoRA) else 0)

    def scanned(params):
        return jnp.sum(run(lrjax.bind(blocks, eqx.combine(params, frozen)), x) ** 2)

    def looped(params):
        return jnp.sum(loop(lrjax.merge(blocks, eqx.combine(params, frozen)), x) ** 2)

    got, want = (jax.jit(jax.value_and_grad(f))(params) for f in (scanned, looped))
    assert_close(got, want, condition=100)
    assert all(np.any(g) for g in jax.tree.leaves(got[1]))


def test_members_of_a_vmap_have_pools_of_their_own(getkey):
    blocks, x = stack(getkey), jr.normal(getkey(), (4,))
    params, frozen = lrjax.partition(lrjax.adapt(blocks, lrjax.TiedLoRA(2), key=getkey()))
    members = [moved(params, getkey()) for _ in range(2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *members)
    call = lambda p: run(lrjax.bind(blocks, eqx.combine(p, frozen)), x)
    got = jax.jit(jax.vmap(call))(stacked)
    want = jnp.stack([jax.jit(call)(p) for p in members])
    assert_close(got, want, condition=100)


@pytest.mark.slow
def test_layers_under_scan_hold_no_copies_of_the_pool(getkey):
    """Temporaries of the gradient with wide factors, beside those with one column."""
    depth, width, rank = 16, 64, 32
    blocks, x = stack(getkey, depth, width), jr.normal(getkey(), (8, width))

    def temporaries(kind):
        adapters = lrjax.adapt(blocks, kind, key=getkey())
        params, frozen = lrjax.partition(adapters)

        def loss(params, frozen, blocks, x):
            bound = lrjax.bind(blocks, eqx.combine(params, frozen))
            return jnp.sum(jax.vmap(run, (None, 0))(bound, x) ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(params, frozen, blocks, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    pool = 4 * 2 * rank * width  # bytes; a copy for each layer would be 16 of them
    assert temporaries(lrjax.VeRA(rank)) < 4 * pool + temporaries(lrjax.VeRA(1))


def test_a_pool_serves_layers_of_all_shapes_of_one_group(getkey):
    model = eqx.nn.MLP(5, 3, 9, 2, key=getkey())
    rule = lambda path, site: lrjax.VeRA(2, group="last" if path == "layers.2" else "rest")
    adapters = lrjax.adapt(model, rule, where=r"layers\..*", key=getkey())
    shapes = {name: pool.pair.shape for name, pool in adapters.pools.items()}
    assert shapes == {"rest": (9, 9), "last": (3, 9)}
    assert adapters["layers.0"].shape == (9, 5)
    assert "pool rest" in adapters.summary()
    mixed = lambda path, site: lrjax.VeRA(3 if path == "layers.2" else 2)
    with pytest.raises(ValueError, match="different settings share the pool 'VeRA'"):
        lrjax.adapt(model, mixed, where=r"layers\..*", key=getkey())


def test_detach_gives_the_pool_back(getkey):
    blocks = stack(getkey)
    adapters = lrjax.adapt(blocks, lrjax.TiedLoRA(2), key=getkey())
    assert eqx.tree_equal(lrjax.detach(lrjax.bind(blocks, adapters)), (blocks, adapters))


def test_adapters_without_their_pool_are_refused(getkey):
    blocks = stack(getkey)
    adapters = lrjax.adapt(blocks, lrjax.TiedLoRA(2), key=getkey())
    lost = lrjax.adapters.Adapters(adapters.layers)
    with pytest.raises(ValueError, match="pool 'TiedLoRA', which is not there"):
        lrjax.bind(blocks, lost)
    # The adapters are whole, the pool is not.
    half = eqx.tree_at(lambda a: a.pools["TiedLoRA"].pair.left, adapters, None)
    with pytest.raises(ValueError, match="pool 'TiedLoRA' is only a part of one"):
        lrjax.merge(blocks, half)


def test_a_bound_model_is_prepared_once_and_called_many_times(getkey):
    """Passed through jit the pool is a constant of the program, and the call is right."""
    blocks, x = stack(getkey), jr.normal(getkey(), (4,))
    params, frozen = lrjax.partition(lrjax.adapt(blocks, lrjax.VeRA(2), key=getkey()))
    adapters = eqx.combine(moved(params, getkey()), frozen)
    bound = lrjax.bind(blocks, adapters)
    traces = []

    @eqx.filter_jit
    def call(bound, x):
        traces.append(1)
        return run(bound, x)

    for scale in (1.0, 2.0):
        want = loop(lrjax.merge(blocks, adapters), scale * x)
        assert_close(call(bound, scale * x), want, condition=100)
    assert len(traces) == 1

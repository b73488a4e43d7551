"""Heads that are trained apart and merged: as a loop, as one LoRA, over devices."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import lrjax
from lrjax import adapters as room
from tests.adapters.models import OneAndStack, adapt, merge, moved
from tests.helpers import assert_close


R, HEADS = 2, 8
MODEL = eqx.filter_jit(OneAndStack)(jr.key(0), 3)
LAYER = eqx.nn.Linear(5, 6, use_bias=False, key=jr.key(1))
PATHS = ["one", "stack"]


start_here, merge_heads = eqx.filter_jit(room.start_here), eqx.filter_jit(room.merge_heads)


@eqx.filter_jit
def heads_of(model, kind, key, count=HEADS, where=None):
    one = lambda key: lrjax.adapt(model, kind, where=where, key=key)
    return jax.vmap(one)(jr.split(key, count))


@eqx.filter_jit
def fold(rule, *args, key):
    return rule(*args, key=key)


def trained(kind, key):
    params, frozen = lrjax.partition(heads_of(MODEL, kind, key, where=PATHS))
    return eqx.combine(moved(params, key), frozen)


def at(tree, head):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[head]), tree)


def wide(tree):
    """In float64."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), float), tree)


KINDS = {
    "LoRA": lrjax.LoRA(R, 3.0),
    "a frozen start": lrjax.LoRA(R, init="small"),
    "lengths": lrjax.DoRA(R),
    "copies": room.Full(),
    "biases": room.WithBias(lrjax.LoRA(R)),
    "entries": room.HiRA(R),
    "a pool": lrjax.TiedLoRA(R),
}


@pytest.mark.slow_but("copies")
@pytest.mark.parametrize("name", KINDS)
def test_merged_is_the_mean_of_what_each_would_be(name, getkey):
    heads = trained(KINDS[name], getkey())
    if name == "a frozen start":
        params, frozen = lrjax.partition(start_here(heads))
        heads = eqx.combine(moved(params, getkey()), frozen)
    got = merge_heads(MODEL, heads)
    each = eqx.filter_jit(eqx.filter_vmap(lambda own: lrjax.merge(MODEL, own)))(heads)
    mean = lambda x: np.mean(np.asarray(x, np.float64), axis=0).astype(x.dtype)
    arrays = lambda model: jax.tree.leaves(eqx.filter(model, eqx.is_array))
    assert_close(arrays(got), list(map(mean, arrays(each))), condition=10)
    if name not in ("copies", "biases"):
        np.testing.assert_array_equal(got.one.bias, MODEL.one.bias)


def data(key, chunks=HEADS, each=4):
    rng = np.random.default_rng(np.asarray(jr.key_data(key)))
    return tuple(jnp.asarray(rng.standard_normal((chunks, each, n)), float) for n in (5, 6))


def loss(model, x, y):
    return jnp.mean(jnp.sum((jax.vmap(model)(x) - y) ** 2, axis=1)) / 2


def head_step(tx, model, own, state, x, y):
    """One step of one head on its part of the data."""
    params, frozen = lrjax.partition(own)
    value = lambda p: loss(lrjax.bind(model, eqx.combine(p, frozen)), x, y)
    updates, state = tx.update(jax.grad(value)(params), state, params)
    return eqx.combine(optax.apply_updates(params, updates), frozen), state


def explorer(tx, rule, k, key, axis_name=None):
    """``T`` steps of all heads, with a fold after every k-th."""
    folds = lrjax.fold(k, rule, key=key)

    def run(weight, heads, states, x, y, steps=6):
        def step(carry, count):
            weight, heads, states = carry
            model = eqx.tree_at(lambda m: m.weight, LAYER, weight)
            each = lambda own, state, x, y: head_step(tx, model, own, state, x, y)
            heads, states = jax.vmap(each)(heads, states, x, y)
            model, heads, states = folds(count, model, heads, states)
            return (model.weight, heads, states), None

        return jax.lax.scan(step, (weight, heads, states), jnp.arange(1, steps + 1))[0]

    return run


TX = optax.adam(1e-2)
KIND = lrjax.LoRA(R, 4.0)


def start(key, tx=TX, continues=True):
    heads = heads_of(LAYER, KIND, key)
    heads = start_here(heads) if continues else heads
    return heads, jax.jit(jax.vmap(tx.init))(lrjax.partition(heads)[0])


def rules(tx, axis_name=None):
    settings = {"heads": True, "axis_name": axis_name}
    return {
        "continue": room.Continue(**settings),
        "restart": room.Restart(KIND, room.ResetMoments(tx), **settings),
        "prune": room.Restart(KIND, room.PruneMoments(tx, 0.5), **settings),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["continue", "restart", "prune"])
def test_heads_are_a_loop_and_the_same_over_devices(name, getkey):
    key, (x, y) = getkey(), data(getkey())
    heads, states = start(getkey(), continues=name == "continue")
    whole = jax.jit(explorer(TX, rules(TX)[name], 3, key))
    want = whole(LAYER.weight, heads, states, x, y)

    mesh = jax.make_mesh((4,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    local = explorer(TX, rules(TX, "heads")[name], 3, key)
    spread = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P("heads"), P("heads"), P("heads"), P("heads")),
        out_specs=(P(), P("heads"), P("heads")),
    )
    got = jax.jit(spread)(LAYER.weight, heads, states, x, y)
    assert_close(got, want, condition=1e3)

    if name == "continue":  # as its authors' loop: one head after the other
        weight, owns = LAYER.weight, [at((heads, states), h) for h in range(HEADS)]
        one = jax.jit(
            lambda weight, own, state, x, y: head_step(
                TX, eqx.tree_at(lambda m: m.weight, LAYER, weight), own, state, x, y
            )
        )
        change = jax.jit(lambda own: own[""].factors()[0].materialize())
        for count in range(1, 7):
            owns = [one(weight, *own, x[h], y[h]) for h, own in enumerate(owns)]
            if count % 3 == 0:
                mean = np.mean([2.0 * change(own) for own, _ in owns], axis=0)
                weight = jnp.asarray(np.asarray(weight) + mean)
                owns = [(start_here(own), state) for own, state in owns]
        assert_close(weight, want[0], condition=1e3)


def wide_lora(heads, scale):
    """All heads side by side: one pair of factors of rank H r."""
    side = lambda x: jnp.asarray(np.moveaxis(np.asarray(x), 0, -2).reshape(x.shape[1], -1))
    pair = heads[""].pair
    kind = lrjax.LoRA(HEADS * R, scale * HEADS * R)
    own = adapt(LAYER, kind, key=jr.key(0))
    both = lrjax.LowRank(side(pair.left), side(pair.right))
    return eqx.tree_at(lambda a: a.layers[""].pair, own, both)


@pytest.mark.slow_but("adam")
@pytest.mark.parametrize("tx", [optax.sgd(0.05), optax.adam(1e-2)], ids=["sgd", "adam"])
def test_the_sum_of_heads_is_one_lora_of_all_their_ranks(tx, getkey, x64):
    """Trained together on the same data, number by number."""
    heads, (x, y) = wide(heads_of(LAYER, KIND, getkey())), data(getkey(), 1, 8)
    layer = wide(LAYER)
    one = wide(wide_lora(heads, 2.0))

    def train(adapters, weight_of):
        params, frozen = lrjax.partition(adapters)

        def value(p):
            weight = weight_of(eqx.combine(p, frozen))
            return loss(eqx.tree_at(lambda m: m.weight, layer, weight), x[0], y[0])

        def step(carry, _):
            p, state = carry
            updates, state = tx.update(jax.grad(value)(p), state, p)
            return (optax.apply_updates(p, updates), state), None

        params, _ = jax.lax.scan(step, (params, tx.init(params)), length=10)[0]
        return eqx.combine(params, frozen)

    def summed(own):  # their mean times their number
        more = room.merge_heads(layer, own).weight - layer.weight
        return layer.weight + HEADS * more

    ends = jax.jit(lambda own: train(own, summed))(heads)
    want = jax.jit(lambda own: train(own, lambda a: lrjax.merge(layer, a).weight))(one)
    assert_close(jax.jit(summed)(ends), merge(layer, want).weight, condition=1e4)
    assert_close(wide_lora(ends, 2.0)[""].pair, want[""].pair, condition=1e4)


def test_folded_in_every_step_it_is_one_lora_of_all_their_ranks(getkey, x64):
    """By gradient descent, all on the same data: H times the rate makes good the mean."""
    x, y = data(getkey(), 1, 8)
    x, y = (jnp.asarray(np.repeat(v, HEADS, axis=0)) for v in (x, y))
    heads, states = wide(start(getkey(), optax.sgd(0.02)))
    run = jax.jit(explorer(optax.sgd(0.02), room.Continue(heads=True), 1, getkey()))
    got, ends, _ = run(LAYER.weight.astype(float), heads, states, x, y)

    one, tx = wide(wide_lora(heads, 2.0 / HEADS)), optax.sgd(0.02 * HEADS)
    state = jax.jit(tx.init)(lrjax.partition(one)[0])
    step = jax.jit(lambda own, s: head_step(tx, wide(LAYER), own, s, x[0], y[0]))
    for _ in range(6):
        one, state = step(one, state)
    assert_close(got, merge(wide(LAYER), one).weight, condition=1e4)
    assert_close(wide_lora(ends, 2.0)[""].pair, one[""].pair, condition=1e4)


@pytest.mark.slow
def test_updates_of_continued_heads_telescope_and_of_new_ones_add_up(getkey, x64):
    big = eqx.nn.Linear(12, 12, use_bias=False, key=getkey())
    kind = lrjax.LoRA(1)
    found = {}
    for name, rule in {
        "continue": room.Continue(heads=True),
        "restart": room.Restart(kind, heads=True),
    }.items():
        model, heads = big, heads_of(big, kind, getkey(), 2)
        heads = start_here(heads) if name == "continue" else heads
        for _ in range(3):
            params, frozen = lrjax.partition(heads)
            heads = eqx.combine(moved(params, getkey()), frozen)
            model, heads, _ = fold(rule, model, heads, (), key=getkey())
        change = np.asarray(model.weight) - np.asarray(big.weight)
        values = np.linalg.svd(change, compute_uv=False)
        found[name] = int(np.sum(values > 1e-9 * values[0]))
    # ``moved`` moves A as well: a start with B = 0 and another A is a product of zero.
    assert found == {"continue": 2, "restart": 6}


@pytest.mark.slow
def test_copies_and_biases_of_heads_become_their_mean(getkey):
    kind = room.WithBias(lrjax.LoRA(R))
    heads = start_here(trained(kind, getkey()))
    for rule in (room.Continue(heads=True), room.Restart(kind, heads=True)):
        old = heads if isinstance(rule, room.Continue) else trained(kind, jr.key(5))
        model, new, _ = fold(rule, MODEL, old, (), key=getkey())
        mean = np.mean(np.asarray(old["one"].own), axis=0)
        for own in np.asarray(new["one"].own):
            assert_close(own, mean)
        assert_close(model.one.bias, mean, condition=10)


def test_refusals(getkey):
    with pytest.raises(ValueError, match="one leading axis"):
        room.merge_heads(LAYER, lrjax.adapt(LAYER, KIND, key=getkey()))
    other = eqx.nn.Linear(4, 6, key=getkey())
    with pytest.raises(ValueError, match=r"for a matrix of shape \(6, 5\)"):
        room.merge_heads(other, heads_of(LAYER, KIND, getkey()))

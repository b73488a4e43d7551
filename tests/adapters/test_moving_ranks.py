"""Rounds of ALoRA, growth of IncreLoRA, PRILoRA's pruning by inputs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import adapters as room
from lrjax.transforms import Sensitivity
from tests.adapters.models import OneAndStack, moved
from tests.helpers import assert_close
from tests.reference import rank_adaptive as reference


R, LAYERS = 5, 3
MODULES = 1 + LAYERS
STEPS = 20


MODEL = OneAndStack(jr.key(0), LAYERS)


@eqx.filter_jit
def trained(kind, key):
    params, frozen = lrjax.partition(lrjax.adapt(MODEL, kind, key=key))
    return eqx.combine(moved(params, key), frozen)


def rows(adapters, of=lambda a: a.mask >= 1):
    return [*of(adapters["one"])[None].tolist(), *of(adapters["stack"]).tolist()]


def by_path(table):
    return {"one": table[0], "stack": table[1:]}


@pytest.mark.slow
def test_rounds_move_ranks_as_published_in_one_program(getkey):
    adapters = room.with_ranks(trained(room.NLS((R, 2)), getkey()), 2)
    traces = []

    @jax.jit
    def rounds(adapters, scores, amount):
        traces.append(1)
        step = lambda a, s: (room.move_ranks(a, by_path(s), amount),) * 2
        return jax.lax.scan(step, adapters, scores)[1]

    many = jax.vmap(rounds, (None, None, 0))
    scores = jr.normal(getkey(), (STEPS, MODULES, R))
    amounts = jnp.array([1, MODULES, 2])
    path = many(adapters, scores, amounts)
    many(adapters, scores, amounts + 1)
    assert len(traces) == 1
    for member, amount in enumerate(amounts):
        masks = rows(adapters)
        for t in range(STEPS):
            masks = reference.alora_round(masks, scores[t].tolist(), int(amount))
            got = jax.tree.map(lambda x, m=member, t=t: x[m, t], path)
            assert rows(got) == masks, (int(amount), t)
        assert sum(map(sum, masks)) <= 2 * MODULES


@pytest.mark.slow
def test_a_new_column_starts_with_no_change(getkey):
    adapters = room.with_ranks(trained(room.NLS((R, 2)), getkey()), 2)
    scores = by_path(jnp.ones((MODULES, R)).at[1:].set(3.0))
    new = room.move_ranks(adapters, scores, 1)  # one loses a column, stack[0] has one more
    assert rows(new)[0] == [False, True, False, False, False]
    assert rows(new)[1] == [True, True, True, False, False]
    want = lrjax.merge(MODEL, adapters).stack.weight
    assert_close(lrjax.merge(MODEL, new).stack.weight, want)
    assert np.any(new["stack"].pair.right[0, :, 2]), "a dead column"


def test_ablation_scores_are_those_of_all_single_ablations(getkey):
    adapters = room.with_ranks(trained(room.NLS((R, 2)), getkey()), {"one": 2, "stack": 1})
    x = jr.normal(getkey(), (5,))

    def score(adapters):
        merged = lrjax.merge(MODEL, adapters)
        deep = jax.vmap(lambda layer: layer(x[:3]))(merged.stack)
        return -jnp.sum(merged.one(x) ** 2) * jnp.sum(jnp.tanh(deep))

    got = jax.jit(lambda a: room.ablation_scores(score, a))(adapters)
    score = jax.jit(score)
    masks = {path: np.asarray(a.mask) for path, a in adapters.layers.items()}

    def at(path, index, alone):
        new = {p: np.zeros_like(m) if alone else m.copy() for p, m in masks.items()}
        new[path][index] = masks[path][index] if alone else 0
        where = lambda a: [a.layers[p].mask for p in new]
        return score(eqx.tree_at(where, adapters, [jnp.asarray(m) for m in new.values()]))

    whole = score(adapters)
    for path, mask in masks.items():
        for index in np.ndindex(mask.shape):
            want = 0.0
            if mask[index]:
                want = whole - at(path, index, False) + at(path, index, True)
            assert abs(got[path][index] - want) < 1e-3 * (1 + abs(want))


@pytest.mark.slow
def test_growth_is_as_published_in_one_program(getkey):
    """Ranks, the column in reserve, gates, and the scale that falls."""
    kind = room.IncreLoRA(R, alpha=3.0)
    adapters = trained(kind, getkey())
    samples = jr.uniform(getkey(), (STEPS, MODULES), minval=0.1)
    targets = jnp.array([6, 11, 20])
    traces = []

    @jax.jit
    def run(adapters, samples, target):
        traces.append(1)

        def step(carry, sample):
            adapters, tracked = carry
            tracked = tracked.updated(by_path(sample), 0.85, 0.85)
            adapters = room.grow_ranks(adapters, tracked.scores(), target, matrices=2)
            return (adapters, tracked), adapters

        start = Sensitivity.zeros(by_path(samples[0]))
        return jax.lax.scan(step, (adapters, start), samples)[1]

    many = jax.vmap(run, (None, None, 0))
    path = many(adapters, samples, targets)
    many(adapters, samples, targets + 1)
    assert len(traces) == 1
    for member, target in enumerate(targets):
        model = reference.IncreLoRA([1] * MODULES, int(target), 2, 1, R)
        mean, deviation = np.zeros(MODULES), np.zeros(MODULES)
        for t in range(STEPS):
            sample = np.asarray(samples[t], np.float64)
            mean = 0.85 * mean + 0.15 * sample
            deviation = 0.85 * deviation + 0.15 * np.abs(sample - mean)
            before = list(model.ranks)
            model.grow(mean * deviation)
            got = jax.tree.map(lambda x, m=member, t=t: x[m, t], path)
            ranks = [sum(row) for row in rows(got)]
            assert ranks == model.ranks, (int(target), t)
            reserve = rows(got, lambda a: (a.mask > 0) & (a.mask < 1))
            done = sum(model.ranks) >= target
            want = [[not done and k == r for k in range(R)] for r in model.ranks]
            assert reserve == want
            # A column that came into use has the gate that it had in reserve.
            gates, old = (rows(a, lambda a: a.gate) for a in (got, adapters))
            for m in range(MODULES):
                for k in range(before[m], model.ranks[m]):
                    np.testing.assert_allclose(gates[m][k], 1e-5 * old[m][k], rtol=1e-5)
        assert sum(model.ranks) == min(int(target), MODULES * R)
        one = jax.tree.map(lambda x, m=member: x[m, -1], path)
        scale = one["one"].factors()[1]
        assert_close(scale, jnp.float32(3 / ranks[0]), condition=10)
    start = adapters["one"].factors()[1]
    assert_close(start, jnp.float32(3 / (1 + 1e-5)))


@pytest.mark.slow
def test_growing_leaves_the_change_of_each_column_as_it_is(getkey):
    adapters = trained(room.IncreLoRA(R), getkey())
    scores = by_path(jnp.arange(1.0, MODULES + 1))
    more = room.grow_ranks(adapters, scores, 9, matrices=1)
    (old, s), (new, t) = (a["stack"].factors() for a in (adapters, more))
    assert_close(new.left[2, :, :2], old.left[2, :, :2])
    assert_close(t[2], s[2] / 2, condition=100)  # the scale of two ranks


@pytest.mark.slow
def test_sensitivity_of_a_change_is_its_dense_formula(getkey):
    adapters = trained(lrjax.LoRA(2), getkey())
    x = jr.normal(getkey(), (5,))

    def loss(model):
        deep = jax.vmap(lambda layer: layer(x[:3]))(model.stack)
        return jnp.sum(model.one(x) ** 2) + jnp.sum(deep**3)

    merged = lrjax.merge(MODEL, adapters)
    gradient = eqx.filter_grad(loss)(merged)
    got = room.change_sensitivity(MODEL, adapters, gradient)
    for path in ("one", "stack"):
        new, old, slope = (getattr(m, path).weight for m in (merged, MODEL, gradient))
        product = np.abs(np.asarray((new - old) * slope, np.float64))
        want = product.sum(axis=(-2, -1)) / np.sqrt(np.prod(old.shape[-2:]))
        assert_close(got[path], want.astype(np.float32), condition=100)


@pytest.mark.slow
def test_pruning_by_inputs_is_that_of_prilora(getkey):
    adapters = trained(lrjax.LoRA(3), getkey())
    norms = {"stack": jr.uniform(getkey(), (LAYERS, 3))}
    pruned = jax.jit(lambda a, n: room.prune_inputs(a, n, fraction=0.4))(adapters, norms)
    assert pruned["one"].pair.right is not None
    np.testing.assert_array_equal(pruned["one"].pair.right, adapters["one"].pair.right)
    right, got = (np.asarray(a["stack"].pair.right) for a in (adapters, pruned))
    for layer in range(LAYERS):
        for k in range(3):
            met = np.abs(right[layer, :, k]) * np.asarray(norms["stack"][layer])
            want = right[layer, :, k].copy()
            want[np.argsort(met)[:1]] = 0  # ⌊0.4 · 3⌋
            np.testing.assert_array_equal(got[layer, :, k], want)


def test_what_has_no_mask_or_gate_is_refused(getkey):
    adapters = trained(lrjax.LoRA(2), getkey())
    for call in (
        lambda: room.move_ranks(adapters, {}, 1),
        lambda: room.ablation_scores(lambda a: 0.0, adapters),
    ):
        with pytest.raises(ValueError, match="no adapter with a mask"):
            call()
    with pytest.raises(ValueError, match="no gate at"):
        room.grow_ranks(room.with_ranks(adapters, 1), {}, 3, matrices=1)
    with pytest.raises(ValueError, match=r"start \+ reserve at least"):
        room.IncreLoRA(2, start=2)

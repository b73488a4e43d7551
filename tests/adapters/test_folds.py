"""Adapters folded into the weights: the function stays, the rank adds up, one program."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax import adapters as room
from tests.adapters.models import OneAndStack, adapt, assert_same, moved
from tests.helpers import all_finite, assert_close, tol


R, LAYERS = 2, 3
MODEL = eqx.filter_jit(OneAndStack)(jr.key(0), LAYERS)
WHERE = ("one", "stack")
TX = optax.adam(1e-2)


def trained(model, kind, key):
    """Adapters whose numbers have moved, and a state with moments of them."""
    params, frozen = lrjax.partition(adapt(model, kind, where=WHERE, key=key))
    adam, rest = jax.jit(TX.init)(params)
    adam = adam._replace(mu=moved(adam.mu, key), nu=moved(adam.nu, key))
    return eqx.combine(moved(params, key), frozen), (adam, rest)


@eqx.filter_jit
def folded_at(rule, step, model, adapters, state, key):
    return lrjax.fold(5, rule, key=key)(step, model, adapters, state)


def folded(rule, step, *rest):
    """One program for all steps."""
    return folded_at(rule, np.int32(step), *rest)


start_here, follow = (
    eqx.filter_jit(room.start_here),
    eqx.filter_jit(lambda f, *a, **k: f(*a, **k)),
)


@eqx.filter_jit
def weights(model, adapters):
    merged = lrjax.merge(model, adapters)
    return {"one": merged.one.weight, "stack": merged.stack.weight}


def loss(params, frozen, model):
    merged = weights(model, eqx.combine(params, frozen))
    return sum(jnp.sum(jnp.sin(w) ** 2) for w in merged.values())


slopes_of = eqx.filter_jit(jax.grad(loss))


def as_dtype(model, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_array(x) else x, model)


RULES = {
    "LoRA": room.Restart(lrjax.LoRA(R, 3.0)),
    "left alone": room.Restart(lrjax.LoRA(R, train="left")),
    "a start from the weight": room.Restart(lrjax.LoRA(R, init="pissa")),
    "a start that is no zero change": room.Restart(lrjax.LoRA(R, init="small")),
    "a random core": room.Restart(lrjax.LoRAXS(R, std=0.5)),
    "lengths": room.Restart(lrjax.DoRA(R)),
    "a copy": room.Restart(room.Full()),
    "biases": room.Restart(room.WithBias(lrjax.LoRA(R))),
    "entries": room.Restart(room.HiRA(R)),
    "a pool": room.Restart(lrjax.TiedLoRA(R)),
}


@pytest.mark.slow_but("a copy")
@pytest.mark.parametrize("name", RULES)
def test_a_fold_keeps_the_function_and_all_train_on(name, getkey):
    rule = RULES[name]
    adapters, state = trained(MODEL, rule.kind, getkey())
    want = weights(MODEL, adapters)
    model, new, kept = folded(rule, 10, MODEL, adapters, state, getkey())
    assert_close(weights(model, new), want, condition=10)
    assert jax.tree.structure(new) == jax.tree.structure(adapters)
    assert_same(kept, state)
    slopes = slopes_of(*lrjax.partition(new), model)
    for path, own in slopes.layers.items():
        shared = slopes.pools  # without any, or of all layers
        assert any(np.any(g) for g in jax.tree.leaves((own, shared))), f"{path} is dead"
    model, same, kept = folded(rule, 9, MODEL, adapters, state, getkey())
    assert_same((model, same, kept), (MODEL, adapters, state))
    model, same, kept = folded(rule, 0, MODEL, adapters, state, getkey())
    assert_same((model, same), (MODEL, adapters))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LoRA", "a start that is no zero change"])
def test_in_float64_to_its_rounding(name, getkey, x64):
    rule, model = RULES[name], as_dtype(MODEL, jnp.float64)
    adapters, state = trained(model, rule.kind, getkey())
    assert adapters["one"].pair.dtype == jnp.float64
    want = weights(model, adapters)
    model, new, _ = folded(rule, 5, model, adapters, state, getkey())
    assert_close(weights(model, new), want, condition=10)


@pytest.mark.slow
def test_bfloat16_loses_what_is_below_half_a_spacing_and_no_more(getkey):
    half = as_dtype(MODEL, jnp.bfloat16)
    rule = room.Restart(lrjax.LoRA(R, dtype=jnp.float32))
    adapters, state = trained(half, rule.kind, getkey())
    thousandth = lambda p: jnp.asarray(np.asarray(p) * 1e-3, p.dtype)
    small = lambda a: jax.tree.map(thousandth, lrjax.partition(a)[0])
    for shrink in (lambda a: a, lambda a: eqx.combine(small(a), lrjax.partition(a)[1])):
        own = shrink(adapters)
        model, new, _ = folded(rule, 5, half, own, state, getkey())
        for path in ("one", "stack"):
            site = lambda model, path=path: getattr(model, path).weight
            pair, scale = own[path].factors()
            left, right = (np.asarray(x, np.float64) for x in (pair.left, pair.right))
            change = left @ right.swapaxes(-2, -1)
            want = np.asarray(site(half), np.float64) + float(np.ravel(scale)[0]) * change
            got = np.asarray(site(model), np.float64)
            # Eight bits, of which one is not stored: half a spacing is 2^-8 at most.
            assert np.all(np.abs(got - want) <= 2.0**-8 * np.abs(want) + 1e-6)
            assert site(model).dtype == jnp.bfloat16
            assert not np.any(new[path].pair.left)
    # Changes of a millionth of the weights are gone as a whole.
    assert np.array_equal(model.one.weight, half.one.weight) or np.any(
        np.abs(np.asarray(half.one.weight, np.float32)) < 1e-3
    )


def test_a_copy_loses_nothing_in_bfloat16(getkey):
    half = as_dtype(MODEL, jnp.bfloat16)
    rule = room.Restart(room.WithBias(room.Full(dtype=jnp.float32)))
    adapters, state = trained(half, rule.kind, getkey())
    _, new, _ = folded(rule, 5, half, adapters, state, getkey())
    assert_same(new, adapters)


@pytest.mark.slow_but("left")
@pytest.mark.parametrize("train", ["both", "left", "right"])
def test_ranks_add_up(train, getkey, x64):
    """On generic data each update of rank r is a new one: the bound is met."""
    layer = eqx.nn.Linear(9, 8, use_bias=False, key=getkey())
    target = jr.normal(getkey(), (8, 9))
    kind, tx = lrjax.LoRA(R, train=train), optax.sgd(0.05)
    folds = lrjax.fold(4, room.Restart(kind), key=getkey())
    traces = []

    @jax.jit
    def run(weight, adapters):
        traces.append(1)

        def step(carry, count):
            weight, adapters, state = carry
            model = eqx.tree_at(lambda m: m.weight, layer, weight)
            params, frozen = lrjax.partition(adapters)

            def loss(params):
                merged = lrjax.merge(model, eqx.combine(params, frozen))
                return jnp.sum((merged.weight - target) ** 2) / 2

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
            model, adapters, state = folds(count, model, eqx.combine(params, frozen), state)
            now = lrjax.merge(model, adapters).weight
            return (model.weight, adapters, state), now

        state = tx.init(lrjax.partition(adapters)[0])
        return jax.lax.scan(step, (weight, adapters, state), jnp.arange(1, 15))[1]

    adapters = adapt(layer, kind, key=getkey())
    path = np.asarray(run(layer.weight, adapters)) - np.asarray(layer.weight)
    assert len(traces) == 1
    values = np.linalg.svd(path, compute_uv=False)
    ranks = np.sum(values > 1e-9 * values[:, :1], axis=1)
    folds_before = np.arange(14) // 4
    np.testing.assert_array_equal(ranks, np.minimum(R * (folds_before + 1), 8))


@pytest.mark.slow
def test_members_of_a_vmap_fold_when_they_are_due_and_share_the_work(getkey):
    rule = RULES["LoRA"]
    adapters, state = trained(MODEL, rule.kind, getkey())
    key, periods = getkey(), np.array([2, 3, 4], np.int32)
    dynamic, static = eqx.partition(MODEL, eqx.is_array)

    def one(k, step, dynamic, adapters, state):
        model = eqx.combine(dynamic, static)
        model, *rest = lrjax.fold(k, rule, key=key)(step, model, adapters, state)
        return eqx.filter(model, eqx.is_array), *rest

    many = jax.vmap(one, (0, None, None, None, None))
    program = jax.make_jaxpr(many)(periods, 4, dynamic, adapters, state)
    (loop,) = [e for e in program.eqns if e.primitive.name == "while"]
    asked = loop.params["cond_jaxpr"].jaxpr  # of one flag for all, or all would work
    assert asked.invars[0].aval.shape == asked.outvars[0].aval.shape == ()
    rest = [e.primitive.name for e in program.eqns if e is not loop]
    assert "dot_general" not in rest
    assert "random_split" not in rest
    got = jax.tree.map(np.asarray, jax.jit(many)(periods, 4, dynamic, adapters, state))
    single = jax.jit(one)
    for member, k in enumerate(periods):
        want = single(k, 4, dynamic, adapters, state)
        assert_close(jax.tree.map(lambda x, m=member: x[m], got), want, condition=10)
    assert_same(jax.tree.map(lambda x: x[1], got[1]), adapters)


def test_a_stack_folds_as_its_layers(getkey):
    rule = RULES["LoRA"]
    adapters, state = trained(MODEL, rule.kind, getkey())
    model, new, _ = folded(rule, 5, MODEL, adapters, state, getkey())
    pair = adapters["stack"].pair
    for layer in range(LAYERS):
        change = 1.5 * np.asarray(pair.left)[layer] @ np.asarray(pair.right)[layer].T
        want = np.asarray(MODEL.stack.weight)[layer] + change
        assert_close(np.asarray(model.stack.weight)[layer], want, condition=10)
    rights = np.asarray(new["stack"].pair.right)
    assert len({row.tobytes() for row in rights}) == LAYERS, "layers begin alike"
    assert_same(model.stack.bias, MODEL.stack.bias)


@pytest.mark.slow
def test_masks_of_ranks_go_on(getkey):
    kind = lrjax.LoRA(R)
    adapters = room.with_ranks(adapt(MODEL, kind, key=getkey()), 1)
    state = jax.jit(TX.init)(lrjax.partition(adapters)[0])
    _, new, _ = folded(room.Restart(kind), 5, MODEL, adapters, state, getkey())
    assert new["one"].mask.tolist() == [1.0, 0.0]


MOMENTS = {
    "reset": room.ResetMoments(TX),
    "pruned at random": room.PruneMoments(TX, 0.5),
    "pruned by magnitude": room.PruneMoments(TX, 0.5, by="magnitude"),
    "turned": room.RotateMoments(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MOMENTS)
def test_on_a_mesh_nothing_moves_that_is_wide(name, getkey):
    """Weights by rows and columns over eight devices, and the factors with them."""
    axes = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=axes)
    kind, key = lrjax.LoRA(R), getkey()
    rule = room.Restart(kind, MOMENTS[name])
    layer = eqx.nn.Linear(16, 8, use_bias=False, key=getkey())
    place = jax.sharding.NamedSharding(mesh, jax.P("rows", "columns"))

    @jax.jit
    def run(weight):
        model = eqx.tree_at(lambda m: m.weight, layer, weight)
        adapters = lrjax.adapt(model, kind, key=key)
        params, frozen = lrjax.partition(adapters)
        grads = jax.tree.map(lambda x: jnp.ones_like(x) + x, params)
        updates, state = TX.update(grads, TX.init(params), params)
        adapters = eqx.combine(optax.apply_updates(params, updates), frozen)
        folds = lrjax.fold(2, rule, key=key)
        model, *rest = folds(jnp.int32(2), model, adapters, state)
        return model.weight, rest

    want = run(layer.weight)
    with jax.set_mesh(mesh):
        weight = jax.device_put(layer.weight, place)
        got = run(weight)
        pair = got[1][0][""].pair
        places = [x.sharding.spec for x in (got[0], pair.left, pair.right)]
        text = run.lower(weight).compile().as_text()
    assert places == [jax.P("rows", "columns"), jax.P("rows", None), jax.P("columns", None)]
    assert_close(jax.device_get(got), jax.device_get(want), condition=100)
    assert "f32[8,16]{1,0} all-gather" not in text


def test_each_fold_begins_with_other_numbers(getkey):
    rule, key = RULES["LoRA"], getkey()
    adapters, state = trained(MODEL, rule.kind, getkey())
    ends = [folded(rule, step, MODEL, adapters, state, key)[1] for step in (5, 10, 10)]
    assert not np.allclose(ends[0]["one"].pair.right, ends[1]["one"].pair.right)
    assert_same(ends[1], ends[2])


@pytest.mark.slow
def test_ranks_may_step_down_outside_of_jit(getkey):
    adapters, state = trained(MODEL, lrjax.LoRA(4), getkey())
    rule = room.Restart(lrjax.LoRA(1), room.ResetMoments(TX))
    model, new, state = follow(rule, MODEL, adapters, state, key=getkey())
    assert new["one"].pair.rank == 1
    assert_close(weights(model, new), weights(MODEL, adapters), condition=10)
    assert jax.tree.leaves(state[0].mu)[0].shape[-1] == 1


def test_continuing_moves_no_number(getkey):
    adapters, state = trained(MODEL, room.WithBias(lrjax.LoRA(R)), getkey())
    want = weights(MODEL, adapters)
    begun = start_here(adapters)
    numbers = lambda own: jax.tree.leaves(lrjax.partition(own)[0])
    assert_same(numbers(begun), numbers(adapters))
    assert_close(weights(MODEL, begun)["one"], MODEL.one.weight, condition=10)
    model, new, kept = follow(room.Continue(), MODEL, adapters, state, key=getkey())
    assert_close(weights(model, new), want, condition=10)
    assert_same((new, kept), (begun, state))
    # What is added from here on is what the factors move by.
    more = moved(lrjax.partition(new)[0], getkey())
    got = weights(model, eqx.combine(more, lrjax.partition(new)[1]))
    params, frozen = lrjax.partition(adapters)
    same = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(more))
    plain = eqx.combine(same, frozen)
    assert_close(got, weights(MODEL, plain), condition=100)


@pytest.mark.slow_but("LoRAXS")
@pytest.mark.parametrize(
    "kind",
    [room.IncreLoRA(R), room.SoRA(R), lrjax.LoRAXS(R, std=0.5), room.StelLA(R, core=0.5)],
    ids=lambda kind: type(kind).__name__,
)
def test_all_with_a_frozen_start_continue(kind, getkey):
    adapters, _ = trained(MODEL, kind, getkey())
    begun = start_here(adapters)
    assert_close(weights(MODEL, begun)["one"], MODEL.one.weight, condition=100)
    assert all_finite(begun)


@pytest.mark.slow
def test_refusals(getkey):
    adapters, state = trained(MODEL, lrjax.LoRA(R), getkey())
    with pytest.raises(ValueError, match="period of at least one step, got 0"):
        lrjax.fold(0, RULES["LoRA"], key=getkey())
    with pytest.raises(TypeError, match="rule"):
        lrjax.fold(3, lrjax.LoRA(R), key=getkey())
    with pytest.raises(TypeError, match="key"):
        lrjax.fold(3, RULES["LoRA"], key=0)
    with pytest.raises(TypeError, match="Restart takes a kind"):
        room.Restart(lrjax.LoRA)
    with pytest.raises(ValueError, match=r"LoRA, which starts from data \(GradientStart\)"):
        room.Restart(lrjax.LoRA(R, init="lora_ga"))
    other = room.Restart(lrjax.LoRA(R + 1))
    with pytest.raises(ValueError, match=r"'one' was a Factors of .* and came back"):
        folded(other, 5, MODEL, adapters, state, getkey())
    params, _ = lrjax.partition(adapters)
    with pytest.raises(ValueError, match="only a part of one"):
        RULES["LoRA"](MODEL, params, state, key=getkey())
    quantized = room.quantize(MODEL, room.Int8(), where=["one"])
    with pytest.raises(ValueError, match="are quantized"):
        RULES["LoRA"](quantized, adapters, state, key=getkey())
    for kind in (lrjax.DoRA(R), room.HiRA(R), room.CapaBoost(R)):
        own = eqx.filter_eval_shape(adapt, MODEL, kind, where=["one"], key=getkey())
        with pytest.raises(ValueError, match=r"'one' is a .* no frozen start"):
            eqx.filter_eval_shape(room.start_here, own)


def test_the_first_factors_of_a_merged_weight_are_its_own(getkey):
    """A start from the weight is one from the merged weight."""
    rule = RULES["a start from the weight"]
    adapters, state = trained(MODEL, rule.kind, getkey())
    merged = np.asarray(weights(MODEL, adapters)["one"], np.float64)
    _, new, _ = folded(rule, 5, MODEL, adapters, state, getkey())
    u, s, v = np.linalg.svd(merged)
    want = (u[:, :R] * s[:R]) @ v[:R]
    got = new["one"].pair.materialize()
    gap = (s[R - 1] - s[R]) / s[0]
    assert_close(got, np.asarray(want, np.float32), rtol=tol(got, condition=10 / gap))

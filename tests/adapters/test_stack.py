"""Many adapters as one: taken out of a stack again, mixed, swapped and trained."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax import adapters as room
from tests.adapters.models import adapt, merge, moved
from tests.helpers import assert_close


MODEL = eqx.filter_jit(lambda key: eqx.nn.MLP(6, 5, 8, 2, key=key))(jr.key(0))
PATHS = ["layers.0", "layers.1", "layers.2"]


stacked, swapped = eqx.filter_jit(room.stack), eqx.filter_jit(room.swap)
plain = jax.jit(jax.vmap(MODEL))


def trained(kind, key, where=None):
    """Adapters with random numbers in the place of what training would leave."""
    params, frozen = lrjax.partition(adapt(MODEL, kind, where=where, key=key))
    return eqx.combine(moved(params, key), frozen)


def normal(key, *shape):
    rng = np.random.default_rng(np.asarray(jr.key_data(key)))
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@eqx.filter_jit
def served(stack, ids, xs):
    """Every example by its own adapter."""

    def one(i, x):
        return lrjax.bind(MODEL, room.select(stack, i))(x)

    return jax.vmap(one)(ids, xs)


@eqx.filter_jit
def alone(adapters, xs):
    return jax.vmap(lrjax.bind(MODEL, adapters))(xs)


def weights(adapters):
    """The adapted weights and biases in float64."""
    merged = merge(MODEL, adapters)
    leaves = jax.tree.leaves(eqx.filter(merged, eqx.is_array))
    return [np.asarray(x, np.float64) for x in leaves]


def first(path, layer):
    return path == "layers.0"


def last_two(path, layer):
    return path != "layers.0"


# Adapters that stand in one stack although they differ: ranks, scales, starts, kinds.
ROWS = {
    "ranks and scales": [(lrjax.LoRA(1, 4), None), (lrjax.LoRA(3, 2), None)],
    "rank-stabilized": [(lrjax.LoRA(2, 4, rank_stabilized=True), None)] * 2
    + [(lrjax.LoRA(3, 4, rank_stabilized=True), None)],
    "two laws of the scale": [
        (lrjax.LoRA(2, 4, rank_stabilized=True), None),
        (lrjax.LoRA(4, 4), None),
    ],
    "layers": [(lrjax.LoRA(2), first), (lrjax.LoRA(1), last_two)],
    "products": [
        (lrjax.LoRA(2, init="pissa"), None),
        (lrjax.VeRA(4), None),
        (lrjax.LoRA(1, dropout=0.5), None),
    ],
    "random zeros": [(room.CapaBoost(1), None), (room.CapaBoost(2), None)],
    "lengths": [(lrjax.DoRA(1), first), (lrjax.DoRA(3), None)],
    "biases": [(room.WithBias(lrjax.LoRA(2)), None), (room.WithBias(lrjax.LoRA(1)), first)],
    "copies": [(room.Full(), first), (room.Full(), None)],
    "trained pools": [(lrjax.TiedLoRA(2), None), (lrjax.TiedLoRA(2), last_two)],
}


@pytest.mark.slow_but("layers")
@pytest.mark.parametrize("name", ROWS)
def test_each_example_gets_its_own(name, getkey):
    row = [trained(kind, getkey(), where) for kind, where in ROWS[name]]
    stack, xs = stacked(row, MODEL, pad_rank=3), normal(getkey(), 7, 6)
    wants = [np.asarray(y) for y in (plain(xs), *(alone(own, xs) for own in row))]
    for ids in (
        np.asarray(jr.randint(getkey(), (7,), 0, len(stack))),
        np.arange(7) % len(stack),
    ):
        want = np.stack([wants[i][k] for k, i in enumerate(ids)])
        assert_close(served(stack, ids, xs), want, condition=100)
    # And the base to the last bit, for nothing is added to it.
    np.testing.assert_array_equal(served(stack, np.zeros(7, int), xs), wants[0])


SEVERAL = {
    "factors": lrjax.LoRA(2, 5, rank_stabilized=True),
    "residual start": lrjax.LoRA(1, init="pissa"),
    "lengths": lrjax.DoRA(2),
    "copies": room.Full(),
    "trained pools": lrjax.TiedLoRA(2),
}


@pytest.mark.slow_but("residual start")
@pytest.mark.parametrize("name", SEVERAL)
def test_several_at_once_are_the_weighted_sum_of_changes(name, getkey):
    row = [trained(SEVERAL[name], getkey()) for _ in range(3)]
    stack, x = stacked(row, MODEL), normal(getkey(), 6)

    @eqx.filter_jit
    def mixed(stack, ids, factors):
        own = room.select(stack, ids, factors)
        merged = lrjax.merge(MODEL, own)
        return merged, lrjax.bind(MODEL, own)(x), merged(x)

    of_base = eqx.filter_jit(lambda stack: lrjax.merge(MODEL, room.select(stack, 0)))
    base = jax.tree.leaves(eqx.filter(of_base(stack), eqx.is_array))
    base = [np.asarray(x, np.float64) for x in base]
    each = [weights(own) for own in row]
    for factors in ([0.5, -1.5], [1.0, 0.0], [0.0, 0.0]):
        merged, bound, after = mixed(stack, np.array([3, 1]), np.array(factors, np.float32))
        got = jax.tree.leaves(eqx.filter(merged, eqx.is_array))
        for b, third, one, new in zip(base, each[2], each[0], got, strict=True):
            want = b + factors[0] * (third - b) + factors[1] * (one - b)
            assert_close(np.asarray(new, np.float64), want, rtol=1e-5)
        assert_close(bound, after, condition=1e3)


@pytest.mark.slow_but("kind1")
@pytest.mark.parametrize("kind", [lrjax.LoRA(2, 3), lrjax.DoRA(2)])
def test_weights_on_layers_of_a_scan(kind, getkey):
    """One weight for a whole adapter, whatever the layers' leading axes."""
    make = eqx.filter_jit(eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 4, key=key)))
    model = make(jr.split(getkey(), 2))
    params, frozen = lrjax.partition(adapt(model, kind, key=getkey()))
    one, two = (eqx.combine(moved(params, getkey()), frozen) for _ in range(2))

    @eqx.filter_jit
    def merged(one, two):
        stack = room.stack([one, two], model)
        rows = (
            room.select(stack, [1, 2], [0.5, 2.0]),
            room.select(stack, 2, 0.25),
            one,
            two,
        )
        return [lrjax.merge(model, own).weight for own in rows]

    both, quarter, first, second = (np.asarray(w, np.float64) for w in merged(one, two))
    base = np.asarray(model.weight, np.float64)
    assert_close(both, base + 0.5 * (first - base) + 2 * (second - base), rtol=1e-5)
    assert_close(quarter, base + 0.25 * (second - base), rtol=1e-5)


LAYER = eqx.nn.Linear(6, 5, key=jr.key(1))


@pytest.mark.slow_but("kind0")
@pytest.mark.parametrize("kind", [lrjax.LoRA(2), lrjax.DoRA(2)])
def test_gradients_of_weights_and_of_what_they_weigh(kind, getkey):
    """The output of one layer is affine in the weights: its slopes are the changes."""
    params, frozen = lrjax.partition(adapt(LAYER, kind, key=getkey()))
    row = [eqx.combine(moved(params, getkey()), frozen) for _ in range(2)]
    stack, x, c = stacked(row, LAYER), normal(getkey(), 6), normal(getkey(), 5)
    params, frozen = eqx.partition(stack, eqx.is_inexact_array)

    @jax.jit
    def slopes(params, factors):
        def output(params, factors):
            own = room.select(eqx.combine(params, frozen), [1, 2, 0], factors)
            return jnp.dot(c, lrjax.bind(LAYER, own)(x))

        return jax.grad(output, (0, 1))(params, factors)

    grads, by_weight = slopes(params, np.array([1.3, 0.0, 2.0], np.float32))
    output = jax.jit(lambda own: lrjax.bind(LAYER, own)(x))
    changes = [
        np.asarray(c) @ (np.asarray(output(own)) - np.asarray(LAYER(x))) for own in row
    ]
    assert_close(by_weight, np.array([*changes, 0.0], np.float32), condition=100)
    trained = lrjax.partition(grads.adapters)[0]
    for g in map(np.asarray, jax.tree.leaves(trained)):
        assert not np.any(g[0]), "the base has a gradient"
        assert not np.any(g[2]), "an adapter of weight zero has a gradient"
        assert np.any(g[1])
    assert not any(map(np.any, jax.tree.leaves(lrjax.partition(grads.adapters)[1])))


@eqx.filter_jit
def losses(adapters, xs, ys):
    outputs = jax.vmap(lrjax.bind(MODEL, adapters))(xs)
    return jnp.mean((outputs - ys) ** 2)


@pytest.mark.slow
def test_training_all_at_once_is_a_loop(getkey):
    """One loss over the stack, one optimizer state with the leading axis."""
    kinds = [lrjax.LoRA(r, 4) for r in (1, 3)]
    row, tx = [trained(kind, getkey()) for kind in kinds], optax.adam(1e-2)
    stack = stacked(row, MODEL)
    xs, ys = normal(getkey(), 2, 4, 6), normal(getkey(), 2, 4, 5)

    @eqx.filter_jit
    def fitted(frozen, params, loss):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: loss(eqx.combine(p, frozen)))(params)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=5)
        return eqx.combine(params, frozen)

    def together(adapters):
        many = room.Stack(adapters, stack.names)
        one = lambda i, x, y: losses(room.select(many, i), x, y)
        return jnp.sum(jax.vmap(one)(jnp.array([1, 2]), xs, ys))

    params, frozen = lrjax.partition(stack.adapters)
    new = room.Stack(fitted(frozen, params, together), stack.names)
    probe = normal(getkey(), 3, 6)
    own = lambda i: np.asarray(served(new, np.full(3, i), probe))
    np.testing.assert_array_equal(own(0), plain(probe))
    for i, one in enumerate(row):
        params, frozen = lrjax.partition(one)
        want = fitted(frozen, params, lambda a, i=i: losses(a, xs[i], ys[i]))
        assert_close(own(i + 1), alone(want, probe), rtol=1e-4)


SWAPS = {
    "narrower": (lrjax.LoRA(4), lrjax.LoRA(2, 3), None),
    "as wide as the padding": (lrjax.LoRA(2), lrjax.LoRA(5, 3), None),
    "of a residual start": (lrjax.LoRA(2), lrjax.LoRA(2, init="pissa"), None),
    "fewer layers": (lrjax.DoRA(3), lrjax.DoRA(1), first),
    "trained pools": (lrjax.TiedLoRA(2), lrjax.TiedLoRA(2), None),
}


@pytest.mark.slow_but("of a residual start")
@pytest.mark.parametrize("name", SWAPS)
def test_swaps_run_in_the_programs_that_are_there(name, getkey):
    old, new, where = SWAPS[name]
    row, own = [trained(old, getkey()) for _ in range(2)], trained(new, getkey(), where)
    stack, programs = stacked(row, MODEL, pad_rank=5), []

    @eqx.filter_jit
    def run(stack, ids, xs):
        programs.append(1)  # once for each trace
        one = lambda i, x: lrjax.bind(MODEL, room.select(stack, i))(x)
        return jax.vmap(one)(ids, xs)

    ids, xs = np.array([2, 0, 1]), normal(getkey(), 3, 6)
    before = np.asarray(run(stack, ids, xs))
    after = np.asarray(run(swapped(stack, "2", own, MODEL), ids, xs))
    assert len(programs) == 1
    assert_close(after[:1], alone(own, xs[:1]), condition=100)
    np.testing.assert_array_equal(after[1:], before[1:])
    empty = np.asarray(run(swapped(stack, 2, room.Adapters({}), MODEL), ids, xs))
    np.testing.assert_array_equal(empty[:2], plain(xs)[:2])
    assert len(programs) == 1


class Attention(eqx.Module):
    """Causal attention as one token sees it; the others are along a named axis."""

    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear

    def __call__(self, x):
        keys, values = (
            jax.lax.all_gather(part(x), "tokens") for part in (self.key, self.value)
        )
        seen = jnp.arange(len(keys)) <= jax.lax.axis_index("tokens")
        scores = jnp.where(seen, keys @ self.query(x), -jnp.inf)
        return jax.nn.softmax(scores) @ values


@pytest.mark.slow
@pytest.mark.parametrize("kind", [lrjax.LoRA(2), lrjax.DoRA(2)])
def test_an_activated_adapter_reads_the_cache_of_the_base(kind, getkey):
    """What it gives for the last tokens, with the base's keys and values before them."""
    model = Attention(*(eqx.nn.Linear(4, 4, key=getkey()) for _ in range(3)))
    params, frozen = lrjax.partition(adapt(model, kind, key=getkey()))
    own = eqx.combine(moved(params, getkey()), frozen)
    stack, xs, start = stacked({"judge": own}, model), normal(getkey(), 5, 4), 3

    @jax.jit
    def run(weights):
        def token(weight, x):
            return lrjax.bind(model, room.select(stack, "judge", weight))(x)

        return jax.vmap(token, axis_name="tokens")(weights, xs)

    switched = (np.arange(5) >= start).astype(np.float32)
    got, base = (np.asarray(run(weights)) for weights in (switched, 0 * switched))
    np.testing.assert_array_equal(got[:start], base[:start])
    merged = merge(model, own)
    xs, of = (
        np.asarray(xs),
        lambda layer, x: x @ np.asarray(layer.weight).T + np.asarray(layer.bias),
    )
    cache = [of(part, xs[:start]) for part in (model.key, model.value)]
    late = [of(part, xs[start:]) for part in (merged.key, merged.value)]
    keys, values = (np.concatenate(pair) for pair in zip(cache, late, strict=True))
    for t in range(start, 5):
        scores = np.exp(keys[: t + 1] @ of(merged.query, xs[t]))
        want = scores @ values[: t + 1] / scores.sum()
        assert_close(got[t], want, condition=100)


def test_numbers_and_names(getkey):
    row = {name: trained(lrjax.LoRA(2), getkey()) for name in ("poet", "coder")}
    stack = room.stack(row, MODEL)
    assert stack.names == ("__base__", "poet", "coder")
    assert len(stack) == 3
    np.testing.assert_array_equal(stack.index(["coder", 0, "poet"]), [2, 0, 1])
    assert stack.index("coder") == stack.index(2) == stack.index(np.int64(2)) == 2
    for wrong in (3, -1, jnp.array([0, 3])):
        with pytest.raises(IndexError, match=r"entries 0 to 2, 0 '__base__', 1 'poet'"):
            stack.index(wrong)
    with pytest.raises(KeyError, match=r"'critic' in the stack: it has 0 '__base__'"):
        room.select(stack, "critic")
    with pytest.raises(TypeError, match="an integer, got float32"):
        room.select(stack, jnp.array(1.0))
    with pytest.raises(ValueError, match=r"ids of shape \(2,\) and weights none"):
        room.select(stack, ["poet", "coder"])
    with pytest.raises(ValueError, match=r"shape \(2,\) and weights of shape \(1,\)"):
        room.select(stack, [1, 2], [1.0])
    # Nothing can be raised for a traced number: it is the base.
    xs = normal(getkey(), 3, 6)
    got = served(stack, np.array([3, -1, 100]), xs)
    np.testing.assert_array_equal(got, served(stack, np.zeros(3, int), xs))


@pytest.mark.slow
def test_refusals(getkey):
    lora, other = trained(lrjax.LoRA(2), getkey()), trained(lrjax.DoRA(2), getkey())
    with pytest.raises(
        ValueError, match=r"at 'layers\.0' .* 'a' has Factors of rank 2, 'b'"
    ):
        room.stack({"a": lora, "b": other}, MODEL)
    with pytest.raises(ValueError, match=r"'__base__' is the name of entry 0"):
        room.stack({"__base__": lora}, MODEL)
    with pytest.raises(ValueError, match="at least one"):
        room.stack([], MODEL)
    small = eqx.nn.MLP(6, 5, 7, 2, key=getkey())
    with pytest.raises(ValueError, match=r"Of the adapters 'a': .*another model"):
        room.stack({"a": lora}, small)
    pools = [trained(lrjax.TiedLoRA(r), getkey()) for r in (1, 2)]
    vera = [trained(lrjax.VeRA(2), jr.key(i)) for i in (1, 2)]
    stack = stacked({"a": lora, "b": trained(lrjax.LoRA(2), getkey(), first)}, MODEL)
    with pytest.raises(ValueError, match=r"rank 3, .* ranks up to 2 .* pad_rank=3"):
        room.swap(stack, "a", trained(lrjax.LoRA(3), getkey()), MODEL)
    with pytest.raises(ValueError, match="Magnitude of rank 2, does not fit"):
        room.swap(stack, "a", other, MODEL)
    with pytest.raises(ValueError, match="Entry 0 of a stack"):
        room.swap(stack, 0, lora, MODEL)
    with pytest.raises(ValueError, match=r"no adapters at \['layers\.1', 'layers\.2'\]"):
        room.swap(stacked([trained(lrjax.LoRA(2), getkey(), first)], MODEL), 1, lora, MODEL)
    # Pools of different widths are no stack, but their products are.
    wide = stacked(pools, MODEL)
    assert not wide.adapters.pools
    assert wide.adapters["layers.0"].pair.rank == 2
    one = stacked(vera[:1], MODEL)
    assert one.shared == ("VeRA",)
    assert one.adapters.pools["VeRA"] is not None
    with pytest.raises(ValueError, match=r"share the pool 'VeRA'"):
        room.swap(one, 1, vera[1], MODEL)

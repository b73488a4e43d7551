"""Adapters that are weighted anew for each input, against dense loops."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import pytest

import lrjax
from lrjax import adapters as room
from tests.adapters.models import everything, moved
from tests.helpers import all_finite, assert_close, relative_error, tol


EXPERTS, LENGTH = 3, 5


class Layers(eqx.Module):
    """One layer for each way in which a weight is met, and two that are scanned."""

    linear: eqx.nn.Linear
    grouped: eqx.nn.Conv1d
    table: eqx.nn.Embedding
    blocks: eqx.nn.Linear

    def __init__(self, key):
        k = jr.split(key, 4)
        self.linear = eqx.nn.Linear(6, 4, key=k[0])
        self.grouped = eqx.nn.Conv1d(4, 6, 2, groups=2, key=k[1])
        self.table = eqx.nn.Embedding(7, 6, key=k[2])
        layer = lambda key: eqx.nn.Linear(6, 6, key=key)
        self.blocks = eqx.filter_vmap(layer)(jr.split(k[3], 2))

    def __call__(self, tokens):
        """Every layer sees other tokens, and none the outputs of another but the blocks."""
        x = INPUTS[tokens]
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        block = lambda x, layer: (jax.vmap(eqx.combine(layer, static))(x), None)
        return {
            "linear": jax.vmap(self.linear)(x),
            "grouped": self.grouped(x[:, :4].T),
            "table": jax.vmap(self.table)(tokens),
            "blocks": jax.lax.scan(block, x, arrays)[0],
        }


INPUTS = jr.normal(jr.key(0), (7, 6))
TOKENS = jnp.arange(LENGTH) + 1
MODEL = eqx.filter_jit(Layers)(jr.key(1))
KINDS = [lrjax.LoRA(rank, 2.0) for rank in (1, 2, 3)]  # of scales and widths of their own


stacked, mix = eqx.filter_jit(room.stack), eqx.filter_jit(room.mix)


@eqx.filter_jit
def starts(kinds, key, where):
    keys = jr.split(key, len(kinds))
    return [
        lrjax.adapt(MODEL, kind, where=where, key=k)
        for kind, k in zip(kinds, keys, strict=True)
    ]


def experts_of(kinds, key, where=everything):
    parts = map(lrjax.partition, starts(tuple(kinds), key, where))
    made = [
        eqx.combine(moved(params, jr.fold_in(key, i)), frozen)
        for i, (params, frozen) in enumerate(parts)
    ]
    return made, stacked(made, MODEL)


def linear_alone(path, layer):
    """For what all layers have in common: one of them, which compiles fast."""
    return path == "linear"


def mixed(stack, gates, key, move=True, ids=None):
    mixture = mix(stack, gates, MODEL, ids=ids, key=key)
    params, frozen = lrjax.partition(mixture)
    return eqx.combine(moved(params, key), frozen) if move else mixture


@eqx.filter_jit
def outputs(mixture):
    return lrjax.bind(MODEL, mixture)(TOKENS)


@eqx.filter_jit
def changed_weights(experts):
    """The weights that each adapter alone gives, as matrices of the sites."""
    merged = [lrjax.merge(MODEL, own) for own in experts]
    return {
        "linear": [m.linear.weight for m in merged],
        "grouped": [m.grouped.weight for m in merged],
        "table": [m.table.weight.T for m in merged],
        "blocks": [m.blocks.weight for m in merged],
    }


def f64(x):
    return np.asarray(x, np.float64)


def dense_loop(experts, gates_of, path, layer=None):
    """Vector by vector: ``W x + b + Σ_k g_k(x) (W_k − W) x`` for weights ``W_k``."""
    take = (lambda w: f64(w)) if layer is None else (lambda w: f64(w[layer]))
    base = getattr(MODEL, path)
    weight = take(base.weight.T if path == "table" else base.weight)
    bias = 0 if path == "table" else take(base.bias)
    weights = [take(w) for w in changed_weights(experts)[path]]

    def call(x):
        gates = gates_of([w - weight for w in weights], x)
        change = sum(g * (w - weight) @ x for g, w in zip(gates, weights, strict=True))
        return weight @ x + bias + change

    return call


def softmax(s):
    e = np.exp(s - s.max())
    return e / e.sum()


def arrow(top_k, temperature):
    """Ostapenko et al. (2024), by the decomposition of dense changes."""

    def gates(deltas, x):
        s = np.array([abs(np.linalg.svd(d)[2][0] @ x) for d in deltas])
        return softmax(np.where(s >= np.sort(s)[-top_k], s, -np.inf) / temperature)

    return gates


def learned(gate, squash=softmax):
    """``V x + u``, or with a hidden layer, for the gate of one matrix."""
    first, v, last, u = map(
        lambda x: None if x is None else f64(x),
        (gate.first, gate.first_bias, gate.last, gate.last_bias),
    )

    def gates(deltas, x):
        del deltas
        s = first.T @ x
        s = s if last is None else last @ np.maximum(s + v, 0)
        return squash((s + u) / float(gate.temperature))

    return gates


def check_linear(got, experts, gates):
    call = dense_loop(experts, gates, "linear")
    want = [call(row) for row in f64(INPUTS[TOKENS])]
    assert relative_error(got["linear"], want) < tol(got["linear"], condition=100)


def check(got, experts, gates_of):
    """All layers that act on vectors, with ``gates_of(path, layer)``."""
    check_linear(got, experts, gates_of("linear"))
    x, bound = f64(INPUTS[TOKENS]), tol(got["linear"], condition=100)
    tokens = np.eye(7)[np.asarray(TOKENS)]
    want = [dense_loop(experts, gates_of("table"), "table")(row) for row in tokens]
    assert relative_error(got["table"], want) < bound
    for layer in range(2):
        call = dense_loop(experts, gates_of("blocks", layer), "blocks", layer)
        x = np.stack([call(row) for row in x])
    assert relative_error(got["blocks"], x) < bound


@pytest.mark.slow
def test_arrow_is_the_dense_loop(getkey):
    experts, stack = experts_of(KINDS, getkey())
    gates = room.Arrow(2, temperature=0.7)
    got = outputs(mixed(stack, gates, getkey()))
    check(got, experts, lambda *_: arrow(2, 0.7))
    # At every position of a convolution, and for every group of its inputs.
    kernels = [f64(w) for w in changed_weights(experts)["grouped"]]
    kernel, x = f64(MODEL.grouped.weight), f64(INPUTS[TOKENS][:, :4].T)
    want = np.zeros((6, LENGTH - 1)) + f64(MODEL.grouped.bias)
    for group in range(2):
        rows, inputs = slice(3 * group, 3 * group + 3), slice(2 * group, 2 * group + 2)
        for t in range(LENGTH - 1):
            patch = x[inputs, t : t + 2].reshape(-1)
            deltas = [(w - kernel).reshape(6, -1) for w in kernels]
            whole = sum(
                g * d for g, d in zip(arrow(2, 0.7)(deltas, patch), deltas, strict=True)
            )
            want[rows, t] += ((kernel.reshape(6, -1) + whole) @ patch)[rows]
    assert relative_error(got["grouped"], want) < tol(got["grouped"], condition=100)


@pytest.mark.slow
def test_learned_gates_are_the_dense_loop(getkey):
    experts, stack = experts_of(KINDS, getkey())
    mixture = mixed(stack, room.LearnedGates(4), getkey())

    def gates_of(path, layer=None):
        at = lambda x: x if layer is None else x[layer]
        return learned(jax.tree.map(at, mixture[path].gate))

    check(outputs(mixture), experts, gates_of)


SETTINGS = {
    "linear gates": (room.LearnedGates(temperature=0.5), softmax),
    "sigmoids": (room.LearnedGates(squash="sigmoid"), lambda s: 1 / (1 + np.exp(-s))),
    "the largest two": (
        room.LearnedGates(top_k=2),
        lambda s: softmax(np.where(s >= np.sort(s)[-2], s, -np.inf)),
    ),
}


@pytest.mark.slow_but("sigmoids", "the largest two")
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_learned_gates(name, getkey):
    kind, squash = SETTINGS[name]
    experts, stack = experts_of(KINDS, getkey(), linear_alone)
    mixture = mixed(stack, kind, getkey())
    check_linear(outputs(mixture), experts, learned(mixture["linear"].gate, squash))


@pytest.mark.slow
def test_at_the_start_it_is_the_mean_and_one_adapter_is_itself(getkey):
    experts, stack = experts_of(KINDS, getkey())
    each = [outputs(own) for own in experts]
    mean = jax.tree.map(lambda *xs: sum(xs) / EXPERTS, *each)
    last = jax.tree.map(np.asarray, each[-1])
    for kind in (
        room.LearnedGates(),
        room.LearnedGates(4),
        room.LearnedGates(squash="sigmoid"),
    ):
        got = outputs(mixed(stack, kind, getkey(), move=False))
        for path in ("linear", "grouped", "table"):
            assert relative_error(got[path], mean[path]) < tol(got[path], condition=100)
    for kind in (room.LearnedGates(), room.Arrow()):
        got = outputs(mixed(stack, kind, getkey(), ids=jnp.array([EXPERTS])))
        assert_close(got, jax.tree.map(jnp.asarray, last), condition=100)


@pytest.mark.slow
def test_all_of_the_largest_are_all_and_signs_do_not_matter(getkey):
    _, stack = experts_of(KINDS, getkey(), linear_alone)
    flip = lambda x: lrjax.LowRank(-x.left, -x.right) if lrjax.is_low_rank(x) else x
    turned = jax.tree.map(flip, stack, is_leaf=lrjax.is_low_rank)
    every = outputs(mixed(stack, room.Arrow(None), getkey()))
    assert_close(outputs(mixed(stack, room.Arrow(EXPERTS), getkey())), every)
    assert_close(outputs(mixed(turned, room.Arrow(9), getkey())), every, condition=10)


@pytest.mark.slow
def test_gates_alone_are_trained_or_adapters_beside(getkey):
    _, stack = experts_of(KINDS, getkey())

    @eqx.filter_jit
    def gradients(stack, gates, key):
        params, frozen = lrjax.partition(mixed(stack, gates, key))
        loss = lambda p: sum(
            jnp.sum(y**2) for y in jax.tree.leaves(outputs(eqx.combine(p, frozen)))
        )
        return params, jax.grad(loss)(params)

    params, grads = gradients(stack, room.LearnedGates(4), getkey())
    sizes = {path: jax.tree.leaves(own) for path, own in params.layers.items()}
    numbers = lambda inputs: 4 * (inputs + 1) + EXPERTS * (4 + 1)
    inputs = {"linear": 6, "grouped": 4, "table": 7, "blocks": 6}
    for path, leaves in sizes.items():
        layers = 2 if path == "blocks" else 1
        assert sum(x.size for x in leaves) == layers * numbers(inputs[path]), path
    assert all_finite(grads)
    assert all(np.any(g) for g in jax.tree.leaves(grads))
    _, few = experts_of(KINDS, getkey(), linear_alone)
    _, grads = gradients(few, room.LearnedGates(top_k=2, train_experts=True), getkey())
    assert all_finite(grads)
    assert np.any(grads["linear"].experts.pair.left)
    arrow = eqx.filter_eval_shape(room.mix, few, room.Arrow(), MODEL)
    assert not jax.tree.leaves(lrjax.partition(arrow)[0])


def test_gradients_of_gates_are_those_of_the_dense_form(getkey):
    experts, stack = experts_of(KINDS, getkey(), linear_alone)
    mixture = mixed(stack, room.LearnedGates(), getkey())
    params, frozen = lrjax.partition(mixture)
    weights = jnp.stack(changed_weights(experts)["linear"])
    x = INPUTS[TOKENS]

    @jax.jit
    def both(params):
        def mine(params):
            bound = lrjax.bind(MODEL, eqx.combine(params, frozen))
            return jnp.sum(jnp.sin(jax.vmap(bound.linear)(x)))

        def dense(params):
            gate, weight = params["linear"].gate, MODEL.linear.weight
            g = jax.nn.softmax(x @ gate.first + gate.last_bias[None])
            whole = weight[None] + jnp.einsum("tk,koi->toi", g, weights - weight[None])
            y = jnp.einsum("toi,ti->to", whole, x) + MODEL.linear.bias[None]
            return jnp.sum(jnp.sin(y))

        return jax.grad(mine)(params)["linear"], jax.grad(dense)(params)["linear"]

    got, want = both(params)
    assert_close(got, want, condition=1000)


@pytest.mark.slow
def test_what_is_no_product_is_mixed_change_by_change(getkey):
    """Magnitudes, with the base as one of the adapters."""
    experts, stack = experts_of([lrjax.DoRA(2)] * EXPERTS, getkey(), linear_alone)
    mixture = mixed(stack, room.LearnedGates(), getkey(), ids=jnp.arange(EXPERTS + 1))
    gates = learned(mixture["linear"].gate)
    check_linear(outputs(mixture), [room.Adapters({}), *experts], gates)


def test_many_mixtures_under_vmap_are_a_loop(getkey):
    _, stack = experts_of(KINDS, getkey(), linear_alone)
    one, two = (mixed(stack, room.LearnedGates(), getkey()) for _ in range(2))
    both = jax.tree.map(lambda *xs: jnp.stack(xs), one, two)
    got = eqx.filter_vmap(outputs)(both)
    for i, own in enumerate((one, two)):
        at = jax.tree.map(lambda x, i=i: x[i], got)
        assert_close(at, outputs(own), condition=100)


@pytest.mark.slow
def test_weights_that_are_not_there_are_refused(getkey):
    _, stack = experts_of(KINDS, getkey())
    mixture = mixed(stack, room.Arrow(), getkey())
    message = "adapter at (linear|grouped|table|blocks) is another one for each input"
    with pytest.raises(ValueError, match=message):
        lrjax.merge(MODEL, mixture)
    bound = lrjax.bind(MODEL, mixture)
    with pytest.raises(ValueError, match="adapter at linear is another one"):
        bound.linear.weight  # noqa: B018
    with pytest.raises(ValueError, match=message):
        room.as_lora(mixture, MODEL, rank=2)
    params = {"kernel": jnp.ones((4, 3))}
    own = room.stack([lrjax.adapt(params, lrjax.LoRA(1), key=getkey())], params)
    with pytest.raises(ValueError, match="kernel is an array that other code reads"):
        room.mix(own, room.Arrow(), params)


@pytest.mark.slow
def test_what_cannot_be_mixed_is_refused(getkey, monkeypatch):
    layer = MODEL.linear
    stack_of = lambda *kinds: room.stack(
        [lrjax.adapt(layer, kind, key=getkey()) for kind in kinds], layer
    )
    lora = stack_of(lrjax.LoRA(1), lrjax.LoRA(1))
    with pytest.raises(ValueError, match="starts from random numbers"):
        room.mix(lora, room.LearnedGates(4), layer)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TypeError, match="mix takes gates such as"):
        room.mix(lora, room.Arrow, layer)
    with pytest.raises(ValueError, match="squash must be one of"):
        room.LearnedGates(squash="tanh")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is none: make factors of each"):
        room.mix(stack_of(room.Full()), room.Arrow(), layer)
    with pytest.raises(ValueError, match="have a bias of their own"):
        room.mix(stack_of(room.IA3()), room.LearnedGates(), layer)
    with pytest.raises(ValueError, match=r"have a pool '.*' each"):
        room.mix(stack_of(lrjax.TiedLoRA(1), lrjax.TiedLoRA(1)), room.Arrow(), layer)
    with pytest.raises(ValueError, match="top_k of at least 1"):
        room.Arrow(0)


def test_dropped_features_are_those_of_the_rate(getkey):
    features, rate = jnp.tile(jnp.array([1.0, 0.0, 2.0]), (4000, 1)), 0.3
    assert np.array_equal(room.feature_weights(features, rate=rate), features)
    key = getkey()
    kept = np.asarray(room.feature_weights(features, rate=rate, key=key))
    scaled = np.asarray(room.feature_weights(features, rate=rate, key=key, scaled=True))
    assert set(np.unique(kept)) == {0.0, 1.0, 2.0}
    assert np.allclose(scaled * (1 - rate), kept)
    # 4,000 draws, six standard errors; and features are dropped apart.
    spread = 6 * np.sqrt(rate * (1 - rate) / 4000)
    assert np.all(np.abs(scaled.mean(axis=0) - features[0]) < 2 * spread / (1 - rate))
    there = kept > 0
    assert abs(np.mean(there[:, 0] & there[:, 2]) - (1 - rate) ** 2) < spread
    with pytest.raises(ValueError, match="rate in"):
        room.feature_weights(features, rate=1.0, key=key)


@pytest.mark.slow
def test_weights_of_scores(getkey):
    scores = jr.normal(getkey(), (6, 4))
    s = f64(scores)
    want = np.stack([softmax(row / 0.5) for row in s])
    assert relative_error(room.softmax_weights(scores, temperature=0.5), want) < tol(scores)
    top = np.asarray(room.softmax_weights(scores, top_k=2))
    assert np.array_equal(top > 0, s >= np.sort(s, axis=1)[:, -2:-1])
    same = room.softmax_weights(jnp.zeros(4), top_k=2)
    assert same.tolist() == [0.5, 0.5, 0.0, 0.0]
    gradient = jax.grad(lambda s: room.softmax_weights(s, top_k=2)[0])(scores[0])
    assert all_finite(gradient)
    with pytest.raises(ValueError, match="at least 1"):
        room.softmax_weights(scores, top_k=0)

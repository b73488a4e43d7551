import operator

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import lrjax
from lrjax.adapters import InputStatistic
from lrjax.continual import InputBases
from tests.helpers import assert_close
from tests.reference import projection as reference


# Each is one program for all memories, models and sums of one layout.
start = eqx.filter_jit(lambda *args, **settings: InputBases.start(*args, **settings))
statistics = eqx.filter_jit(lambda memory, *args, **call: memory.statistics(*args, **call))
project_out = eqx.filter_jit(lambda memory, updates: memory.project_out(updates))


@eqx.filter_jit
def grow_by(memory, sums, rules):
    return memory.grow(sums, **rules)


def grow(memory, sums, **rules):
    """By rules whose numbers are traced."""
    return grow_by(memory, sums, jax.tree.map(jnp.asarray, rules))


def normal(key, *shape):
    rng = np.random.default_rng(np.asarray(jr.key_data(key)))
    return rng.standard_normal(shape).astype(jnp.result_type(float))


def turn_of(key, n):
    """A random orthogonal matrix."""
    return np.linalg.qr(normal(key, n, n))[0]


@eqx.filter_jit
def network(key, *, bias=True):
    """Four inputs, two hidden layers of twelve, three outputs."""
    return eqx.nn.MLP(8, 3, 12, 2, jax.nn.tanh, use_bias=bias, use_final_bias=bias, key=key)


def fed(model, x):
    """What each layer is given, in float64."""
    inputs = {}
    for i, layer in enumerate(model.layers):
        inputs[f"layers.{i}"] = np.asarray(x, np.float64)
        x = x @ np.asarray(layer.weight).T
        x = x if layer.bias is None else x + np.asarray(layer.bias)
        x = x if i == 2 else np.tanh(x)
    return inputs


def sums_of(x):
    """The statistic of inputs ``(samples, in)``."""
    x = np.asarray(x)
    sums = (x.T @ x, x.sum(0), np.sum(x**2), np.asarray(len(x), x.dtype))
    return InputStatistic(*map(jnp.asarray, sums))


def empty(n, k=None, *, bias=False):
    layer = {"a": eqx.nn.Linear(n, 3, use_bias=bias, key=jr.key(0))}
    return start(layer, k)


def spans(basis, want):
    """Whether the columns that are used span what those of another basis do."""
    basis, want = np.asarray(basis, np.float64), np.linalg.qr(want)[0]
    np.testing.assert_allclose(basis @ basis.T, want @ want.T, atol=1e-5)


@pytest.mark.slow
def test_over_three_tasks_it_is_the_algorithm_of_the_paper(getkey, x64):
    model = network(getkey(), bias=False)
    steep = np.logspace(0, -1, 8)
    tasks = [steep * normal(getkey(), 30, 8) @ turn_of(getkey(), 8) for _ in "abc"]
    energies = {"layers.0": 0.8, "layers.1": 0.9, "layers.2": 0.95}
    memory = start(model)
    for x in tasks:
        sums = statistics(memory, model, jnp.asarray(x.reshape(3, 10, 8)))
        memory = grow(memory, sums, energy=energies)
    for path, energy in energies.items():
        inputs = [fed(model, x)[path] for x in tasks]
        want = reference.gradient_projection_memory(inputs, 3 * [energy])
        assert memory.used[path] == want.shape[1] < 12
        spans(memory.bases[path], want)
        kept = np.sum((inputs[2] @ want) ** 2) / np.sum(inputs[2] ** 2)
        np.testing.assert_allclose(memory.kept[path], kept, rtol=1e-8)
        assert not memory.cut[path]


@pytest.mark.slow
def test_a_trained_network_keeps_its_answers_to_an_old_task(getkey):
    """All inputs lie in the spans: the whole function stays, biases included."""
    key = getkey()
    model = network(key)
    old = jnp.asarray(normal(getkey(), 6, 2) @ normal(getkey(), 2, 8))
    new, label = 2 * normal(getkey(), 40, 8), np.arange(40) % 3
    memory = start(model)
    memory = grow(memory, statistics(memory, model, [old]), energy=1 - 1e-6)
    assert memory.bases["layers.1"].shape == (13, 13)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params):
        logits = jax.vmap(eqx.combine(params, static))(new)
        return jnp.mean(
            optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)
        )

    def train(tx):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=30)[0][0]

    adam = optax.adamw(0.03, weight_decay=0.1)
    project = lrjax.project_out(memory)

    @jax.jit
    def results():
        at = lambda p: jax.vmap(eqx.combine(p, static))(old)
        trained = [train(optax.chain(adam, project)), train(optax.chain(project, adam))]
        moved = [jnp.max(jnp.abs(at(p) - at(params))) for p in trained]
        return *moved, loss(trained[0]) / loss(params)

    still, leaking, learnt = results()
    # The energy that is left over is 1e-6 of each layer, so 1e-3 of its outputs.
    assert still < 5e-3
    assert leaking > 0.1
    assert learnt < 0.9


@pytest.mark.slow
def test_an_input_in_the_span_gives_what_it_gave(getkey):
    x = normal(getkey(), 4, 9)
    for bias in (False, True):
        memory = grow(empty(9, bias=bias), {"a": sums_of(x)}, energy=1.0)
        assert memory.used["a"] == 4
        layer = eqx.nn.Linear(9, 3, use_bias=bias, key=getkey())
        updates = {"a": eqx.filter(layer, eqx.is_inexact_array)}
        got = project_out(memory, updates)
        whole = lambda u: np.column_stack(  # [U, u]
            [np.asarray(part) for part in (u["a"].weight, u["a"].bias) if part is not None]
        )
        rows = np.pad(x, ((0, 0), (0, int(bias))), constant_values=1)
        assert np.max(np.abs(rows @ whole(got).T)) < 1e-5
        assert_close(project_out(memory, got), got, condition=10)
        # An input outside of the span, orthogonal with its one, is served as before.
        y = np.linalg.svd(rows)[2][-1]
        np.testing.assert_allclose(whole(got) @ y, whole(updates) @ y, atol=1e-5)


class Small(eqx.Module):
    """A convolution with a bias, and a stack of two layers in a scan."""

    conv: eqx.nn.Conv2d
    blocks: eqx.nn.Linear

    def __init__(self, key):
        a, b = jr.split(key)
        self.conv = eqx.nn.Conv2d(2, 3, 3, padding=1, key=a)
        make = lambda key: eqx.nn.Linear(3, 3, key=key)
        self.blocks = eqx.filter_vmap(make)(jr.split(b, 2))

    def __call__(self, image):
        x = jnp.sum(self.conv(image), axis=(1, 2))
        return jax.lax.scan(lambda x, block: (jnp.tanh(block(x)), x), x, self.blocks)


@pytest.mark.slow
def test_convolutions_and_stacks(getkey):
    model, images = (
        eqx.filter_jit(Small)(getkey()),
        jnp.asarray(normal(getkey(), 3, 2, 4, 4)),
    )
    memory = start(model, 10)
    memory = grow(memory, statistics(memory, model, [images]), energy=0.7)
    assert memory.bases["conv"].shape == (19, 10)
    assert memory.bases["blocks"].shape == (2, 4, 4)
    rows = np.concatenate([reference.patches(np.asarray(x), 3) for x in images])
    rows = np.pad(rows, ((0, 0), (0, 1)), constant_values=1)
    for_inputs = 1 - 0.3 * np.sum(rows[:, :-1] ** 2) / np.sum(rows**2)
    want = reference.gradient_projection_memory([rows], [for_inputs])
    assert memory.used["conv"] == want.shape[1]
    spans(memory.bases["conv"], want)
    hidden = np.asarray(jax.jit(jax.vmap(model))(images)[1], np.float64)
    for i in range(2):
        rows = np.pad(hidden[:, i], ((0, 0), (0, 1)), constant_values=1)
        for_inputs = 1 - 0.3 * np.sum(rows[:, :-1] ** 2) / np.sum(rows**2)
        want = reference.gradient_projection_memory([rows], [for_inputs])
        spans(np.asarray(memory.bases["blocks"])[i], want)
    corner = np.asarray(images)[:1, :, :2, :2]
    whole = start(model)
    whole = grow(whole, statistics(whole, model, [jnp.asarray(corner)]), energy=1.0)
    low = lambda x: x.astype(jnp.bfloat16)
    updates = eqx.filter(model, eqx.is_inexact_array)
    got = project_out(whole, updates)
    patch = reference.patches(corner[0], 3)
    flat = np.asarray(got.conv.weight).reshape(3, -1)
    assert np.max(np.abs(patch @ flat.T + np.ravel(got.conv.bias))) < 1e-4
    rounded = project_out(whole, jax.tree.map(low, updates))
    assert rounded.conv.bias.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.conv.weight, got.conv.weight, atol=1e-2)


@pytest.mark.slow
def test_the_null_space_of_all_tasks_is_left_free(getkey, x64):
    tasks = [np.logspace(1, -1, 6) * normal(getkey(), count, 6) for count in (50, 20)]
    sums = operator.add(*map(sums_of, tasks))
    for factor in (1.0, 30.0, 1e9):
        want = reference.null_space(tasks, factor)
        basis = np.asarray(grow(empty(6), {"a": sums}, smallest=factor).bases["a"])
        free = np.eye(6) - basis @ basis.T
        np.testing.assert_allclose(free, want @ want.T, atol=1e-8)
    # Directions that are there already do not count as those with the least.
    both = grow(empty(6), {"a": sums_of(tasks[0])}, energy=0.9)
    both = grow(both, {"a": sums}, smallest=1.0)
    assert both.used["a"] == 5


@pytest.mark.slow
def test_a_sketch_of_all_clients_is_that_of_their_data(getkey, x64):
    """Summed by hand, by psum on eight devices, and from all at once; the span is that
    of the inputs, and of the published combination of them."""
    key = getkey()
    model = {"a": eqx.nn.Linear(40, 3, use_bias=False, key=key)}
    turn = turn_of(getkey(), 40)
    first = normal(getkey(), 8, 5, 3) @ turn[:3]
    second = first + normal(getkey(), 8, 5, 4) @ turn[3:7] * 0.5
    call = lambda model, x: jax.vmap(model["a"])(x)
    memory = start(model, 10, rank=6, key=getkey())
    of = jax.jit(lambda memory, x: memory.statistics(model, [x], call=call))
    mesh = jax.make_mesh((8,), ("clients",), axis_types=(AxisType.Auto,))

    @jax.jit
    @lambda f: jax.shard_map(
        f, mesh=mesh, in_specs=(P(), P("clients")), out_specs=P(), check_vma=False
    )
    def summed(memory, x):
        return jax.lax.psum(of(memory, x[0]), "clients")

    known = np.zeros((40, 0))
    for x, k in ((first, 3), (second, 7)):
        sums = summed(memory, x)
        by_hand = [of(memory, one) for one in x]
        added = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *by_hand)
        assert_close(sums, added, condition=10)
        assert_close(sums, of(memory, x.reshape(40, 40)), condition=10)
        memory = grow(memory, sums, energy=0.999)
        assert memory.used["a"] == k
        spans(memory.bases["a"], turn[:k].T)
        known = reference.federated_basis(
            list(x.swapaxes(1, 2)), known, 0.999, 20, np.random.default_rng(0)
        )
        spans(memory.bases["a"], known)
        assert memory.kept["a"] >= 0.999
        assert not memory.cut["a"]


@pytest.mark.slow
def test_a_sketch_knows_what_it_does_not_see(getkey, x64):
    """With a bias, its energies are those of the whole moment, and a narrow one says so."""
    x = normal(getkey(), 50, 12) * np.logspace(0, -1, 12)
    x = x @ turn_of(getkey(), 30)[:12] + 0.1
    model = {"a": eqx.nn.Linear(30, 3, key=getkey())}
    call = lambda model, x: jax.vmap(model["a"])(x)
    rows = np.pad(x, ((0, 0), (0, 1)), constant_values=1)
    for rank, cut in ((14, False), (2, True)):
        memory = start(model, 8, rank=rank, key=getkey())
        sums = statistics(memory, model, [jnp.asarray(x)], call=call)
        grown = grow(memory, sums, energy=0.8)
        assert bool(grown.cut["a"]) == cut
        m = np.asarray(grown.bases["a"])
        missing = np.sum((rows - rows @ m @ m.T) ** 2) / np.sum(x**2)
        # Of the energies of a sketch none is more than there is.
        assert grown.kept["a"] <= 1 - missing + 1e-9
        if not cut:
            assert grown.kept["a"] >= 0.8
            np.testing.assert_allclose(grown.kept["a"], 1 - missing, atol=1e-6)
            want = grow(empty(30, 8, bias=True), {"a": sums_of(x)}, energy=0.8)
            spans(m, np.asarray(want.bases["a"])[:, : int(want.used["a"])])


def test_a_full_one_says_what_was_cut(getkey):
    x = normal(getkey(), 20, 6)
    memory = grow(empty(6, 3), {"a": sums_of(x)}, energy=0.99)
    assert memory.used["a"] == 3
    assert memory.cut["a"]
    s = np.linalg.svd(x)[1]
    np.testing.assert_allclose(
        memory.kept["a"], np.sum(s[:3] ** 2) / np.sum(s**2), rtol=1e-4
    )
    bad = grow(memory, {"a": sums_of(x * np.nan)}, energy=0.99)
    assert_close(bad.bases, memory.bases, rtol=0)
    assert np.isnan(bad.kept["a"])


def test_twenty_tasks_leave_it_orthonormal(getkey):
    x = normal(getkey(), 20, 30, 24) * np.logspace(0, -2, 24)
    x = x @ (np.eye(24, dtype=x.dtype) + 0.02 * normal(getkey(), 20, 24, 24))
    memory = empty(24, bias=True)
    for own in x.astype(np.float32):
        memory = grow(memory, {"a": sums_of(own)}, energy=0.999)
    m = np.asarray(memory.bases["a"], np.float64)
    k = int(memory.used["a"])
    assert k > 12
    np.testing.assert_allclose(m[:, :k].T @ m[:, :k], np.eye(k), atol=2e-6)
    assert not np.any(m[:, k:])


ONE = {"a": eqx.nn.Linear(4, 3, key=jr.key(0))}
MEMORY = InputBases.start(ONE)
SUMS = {"a": sums_of(jnp.ones((5, 4)))}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InputBases.start(ONE, 0), "room for a direction, got 0"),
        (lambda: InputBases.start(ONE, rank=3), "from a key: got 3 and no key"),
        (lambda: InputBases.start({"w": jnp.ones((3, 4))}, where=["w"]), "kind 'array'"),
        (lambda: MEMORY.grow(SUMS), r"energy= or smallest=, got none"),
        (lambda: MEMORY.grow({"b": SUMS["a"]}, energy=0.9), r"\['a'\] got .* \['b'\]"),
        (lambda: MEMORY.grow(SUMS, energy={"b": 0.9}), r"paths \['b'\], the layers are"),
        (lambda: MEMORY.statistics({"b": ONE["a"]}, []), r"layers at \['a'\]"),
        (
            lambda: MEMORY.statistics(ONE, [jnp.ones(4)], call=lambda model, x: x),
            r"No inputs were seen at \['a'\]",
        ),
        (
            lambda: lrjax.project_out(MEMORY).init({"b": jnp.ones((3, 4))}),
            "inputs of a and found no update",
        ),
        (
            lambda: lrjax.project_out(MEMORY).init(
                {"a": eqx.tree_at(lambda x: x.bias, ONE["a"], None)}
            ),
            "basis of 5 rows for a, whose updates have 4 inputs and no bias",
        ),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()

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


def network(key, *, bias=True):
    """Four inputs, two hidden layers of twelve, three outputs."""
    return eqx.nn.MLP(8, 3, 12, 2, jax.nn.tanh, use_bias=bias, use_final_bias=bias, key=key)


def fed(model, x):
    """What each layer is given, in float64."""
    inputs = {}
    for i, layer in enumerate(model.layers):
        inputs[f"layers.{i}"] = np.asarray(x, np.float64)
        x = jax.vmap(layer)(x)
        x = x if i == 2 else jnp.tanh(x)
    return inputs


def sums_of(x):
    """The statistic of inputs ``(samples, in)``."""
    x = jnp.asarray(x)
    return InputStatistic(x.T @ x, jnp.sum(x, 0), jnp.sum(x**2), jnp.asarray(len(x) * 1.0))


def empty(n, k=None, *, bias=False):
    layer = {"a": eqx.nn.Linear(n, 3, use_bias=bias, key=jr.key(0))}
    return InputBases.start(layer, k)


def spans(basis, want):
    """Whether the columns that are used span what those of another basis do."""
    basis, want = np.asarray(basis, np.float64), np.linalg.qr(want)[0]
    np.testing.assert_allclose(basis @ basis.T, want @ want.T, atol=1e-5)


def test_over_three_tasks_it_is_the_algorithm_of_the_paper(getkey, x64):
    model = network(getkey(), bias=False)
    steep = jnp.logspace(0, -1, 8)[None]
    tasks = [
        steep * jr.normal(getkey(), (30, 8)) @ jr.orthogonal(getkey(), 8) for _ in "abc"
    ]
    energies = {"layers.0": 0.8, "layers.1": 0.9, "layers.2": 0.95}
    memory = InputBases.start(model)
    grow = jax.jit(lambda memory, sums: memory.grow(sums, energy=energies))
    for x in tasks:
        memory = grow(memory, memory.statistics(model, x.reshape(3, 10, 8)))
    for path, energy in energies.items():
        inputs = [fed(model, x)[path] for x in tasks]
        want = reference.gradient_projection_memory(inputs, 3 * [energy])
        assert memory.used[path] == want.shape[1] < 12
        spans(memory.bases[path], want)
        kept = np.sum((inputs[2] @ want) ** 2) / np.sum(inputs[2] ** 2)
        np.testing.assert_allclose(memory.kept[path], kept, rtol=1e-8)
        assert not memory.cut[path]


def test_a_trained_network_keeps_its_answers_to_an_old_task(getkey):
    """All inputs lie in the spans: the whole function stays, biases included."""
    key = getkey()
    model = network(key)
    plane = jr.normal(jr.fold_in(key, 1), (2, 8))
    old = jr.normal(jr.fold_in(key, 2), (6, 2)) @ plane
    new, label = 2 * jr.normal(jr.fold_in(key, 3), (40, 8)), jnp.arange(40) % 3
    memory = InputBases.start(model)
    memory = memory.grow(memory.statistics(model, [old]), energy=1 - 1e-6)
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


def test_an_input_in_the_span_gives_what_it_gave(getkey):
    x = jr.normal(getkey(), (4, 9))
    for bias in (False, True):
        memory = empty(9, bias=bias).grow({"a": sums_of(x)}, energy=1.0)
        assert memory.used["a"] == 4
        layer = eqx.nn.Linear(9, 3, use_bias=bias, key=getkey())
        updates = {"a": eqx.filter(layer, eqx.is_inexact_array)}
        got = memory.project_out(updates)
        assert jnp.max(jnp.abs(jax.vmap(got["a"])(x))) < 1e-5
        assert_close(memory.project_out(got), got, condition=10)
        # An input outside of the span, orthogonal with its one, is served as before.
        rows = jnp.pad(x, ((0, 0), (0, int(bias))), constant_values=1)
        y = jnp.linalg.svd(rows)[2][-1]
        value = [u["a"].weight @ y[:9] for u in (got, updates)]
        if bias:
            both = zip(value, (got, updates), strict=True)
            value = [v + u["a"].bias * y[9] for v, u in both]
        np.testing.assert_allclose(*value, atol=1e-5)


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


def test_convolutions_and_stacks(getkey):
    model, key = Small(getkey()), getkey()
    images = jr.normal(key, (3, 2, 4, 4))
    memory = InputBases.start(model, 10)
    memory = memory.grow(memory.statistics(model, [images]), energy=0.7)
    assert memory.bases["conv"].shape == (19, 10)
    assert memory.bases["blocks"].shape == (2, 4, 4)
    rows = np.concatenate([reference.patches(np.asarray(x), 3) for x in images])
    rows = np.pad(rows, ((0, 0), (0, 1)), constant_values=1)
    for_inputs = 1 - 0.3 * np.sum(rows[:, :-1] ** 2) / np.sum(rows**2)
    want = reference.gradient_projection_memory([rows], [for_inputs])
    assert memory.used["conv"] == want.shape[1]
    spans(memory.bases["conv"], want)
    hidden = np.asarray(jax.vmap(model)(images)[1], np.float64)
    for i in range(2):
        rows = np.pad(hidden[:, i], ((0, 0), (0, 1)), constant_values=1)
        for_inputs = 1 - 0.3 * np.sum(rows[:, :-1] ** 2) / np.sum(rows**2)
        want = reference.gradient_projection_memory([rows], [for_inputs])
        spans(memory.bases["blocks"][i], want)
    whole = InputBases.start(model)
    whole = whole.grow(whole.statistics(model, [images[:1, :, :2, :2]]), energy=1.0)
    low = lambda x: x.astype(jnp.bfloat16)
    updates = eqx.filter(model, eqx.is_inexact_array)
    got = whole.project_out(updates)
    patch = jnp.asarray(reference.patches(np.asarray(images[0, :, :2, :2]), 3))
    flat = got.conv.weight.reshape(3, -1)
    assert jnp.max(jnp.abs(patch @ flat.T + got.conv.bias.ravel()[None])) < 1e-4
    rounded = whole.project_out(jax.tree.map(low, updates))
    assert rounded.conv.bias.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.conv.weight, got.conv.weight, atol=1e-2)


def test_the_null_space_of_all_tasks_is_left_free(getkey, x64):
    tasks = [
        jnp.logspace(1, -1, 6)[None] * jr.normal(getkey(), (count, 6)) for count in (50, 20)
    ]
    sums = operator.add(*map(sums_of, tasks))
    for factor in (1.0, 30.0, 1e9):
        want = reference.null_space([np.asarray(x) for x in tasks], factor)
        memory = empty(6).grow({"a": sums}, smallest=factor)
        free = np.eye(6) - memory.bases["a"] @ memory.bases["a"].T
        np.testing.assert_allclose(free, want @ want.T, atol=1e-8)
    # Directions that are there already do not count as those with the least.
    both = empty(6).grow({"a": sums_of(tasks[0])}, energy=0.9)
    both = both.grow({"a": sums}, smallest=1.0)
    assert both.used["a"] == 5


def test_a_sketch_of_all_clients_is_that_of_their_data(getkey, x64):
    """Summed by hand, by psum on eight devices, and from all at once; the span is that
    of the inputs, and of the published combination of them."""
    key = getkey()
    model = {"a": eqx.nn.Linear(40, 3, use_bias=False, key=key)}
    turn = jr.orthogonal(getkey(), 40)
    first = jr.normal(getkey(), (8, 5, 3)) @ turn[:3]
    second = first + jr.normal(getkey(), (8, 5, 4)) @ turn[3:7] * 0.5
    call = lambda model, x: jax.vmap(model["a"])(x)
    memory = InputBases.start(model, 10, rank=6, key=getkey())
    statistics = lambda memory, x: memory.statistics(model, [x], call=call)
    mesh = jax.make_mesh((8,), ("clients",), axis_types=(AxisType.Auto,))

    @jax.jit
    @lambda f: jax.shard_map(
        f, mesh=mesh, in_specs=(P(), P("clients")), out_specs=P(), check_vma=False
    )
    def summed(memory, x):
        return jax.lax.psum(statistics(memory, x[0]), "clients")

    known = np.zeros((40, 0))
    for x, k in ((first, 3), (second, 7)):
        sums = summed(memory, x)
        by_hand = [statistics(memory, one) for one in x]
        added = jax.tree.map(lambda *parts: sum(parts), *by_hand)
        assert_close(sums, added, condition=10)
        assert_close(sums, statistics(memory, x.reshape(40, 40)), condition=10)
        memory = memory.grow(sums, energy=0.999)
        assert memory.used["a"] == k
        spans(memory.bases["a"], np.asarray(turn[:k].T))
        known = reference.federated_basis(
            list(np.asarray(x.mT)), known, 0.999, 20, np.random.default_rng(0)
        )
        spans(memory.bases["a"], known)
        assert memory.kept["a"] >= 0.999
        assert not memory.cut["a"]


def test_a_sketch_knows_what_it_does_not_see(getkey, x64):
    """With a bias, its energies are those of the whole moment, and a narrow one says so."""
    x = jr.normal(getkey(), (50, 12)) * jnp.logspace(0, -1, 12)[None]
    x = x @ jr.orthogonal(getkey(), 30)[:12] + 0.1
    model = {"a": eqx.nn.Linear(30, 3, key=getkey())}
    call = lambda model, x: jax.vmap(model["a"])(x)
    rows = np.pad(np.asarray(x), ((0, 0), (0, 1)), constant_values=1)
    for rank, cut in ((14, False), (2, True)):
        memory = InputBases.start(model, 8, rank=rank, key=getkey())
        sums = memory.statistics(model, [x], call=call)
        grown = memory.grow(sums, energy=0.8)
        assert bool(grown.cut["a"]) == cut
        m = np.asarray(grown.bases["a"])
        missing = np.sum((rows - rows @ m @ m.T) ** 2) / np.sum(np.asarray(x) ** 2)
        # Of the energies of a sketch none is more than there is.
        assert grown.kept["a"] <= 1 - missing + 1e-9
        if not cut:
            assert grown.kept["a"] >= 0.8
            np.testing.assert_allclose(grown.kept["a"], 1 - missing, atol=1e-6)
            want = empty(30, 8, bias=True).grow({"a": sums_of(x)}, energy=0.8)
            spans(m, np.asarray(want.bases["a"])[:, : int(want.used["a"])])


def test_a_full_one_says_what_was_cut(getkey):
    x = np.asarray(jr.normal(getkey(), (20, 6)))
    memory = empty(6, 3).grow({"a": sums_of(x)}, energy=0.99)
    assert memory.used["a"] == 3
    assert memory.cut["a"]
    s = np.linalg.svd(x)[1]
    np.testing.assert_allclose(
        memory.kept["a"], np.sum(s[:3] ** 2) / np.sum(s**2), rtol=1e-4
    )
    bad = memory.grow({"a": sums_of(x * np.nan)}, energy=0.99)
    assert_close(bad.bases, memory.bases, rtol=0)
    assert jnp.isnan(bad.kept["a"])


def test_twenty_tasks_leave_it_orthonormal(getkey):
    def task(memory, key):
        x = jr.normal(key, (30, 24)) * jnp.logspace(0, -2, 24)[None]
        turn = jnp.eye(24) + 0.02 * jr.normal(key, (24, 24))
        return memory.grow({"a": sums_of(x @ turn)}, energy=0.999), None

    memory, _ = jax.jit(lambda memory, keys: jax.lax.scan(task, memory, keys))(
        empty(24, bias=True), jr.split(getkey(), 20)
    )
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

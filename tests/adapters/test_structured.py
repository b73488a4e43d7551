"""Changes with a structure of their own: blocks, entrywise products, gains."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import adapters as room
from tests.adapters.models import adapt, merge, moved
from tests.helpers import assert_close, relative_error, tol
from tests.reference import adapters as reference


ALL = ("linear", "grouped", "table")
# Where a kind has ways of its own; elsewhere it meets the layer with a dense weight.
KINDS = {
    "MiSS": (room.MiSS(4), ALL),
    "BAT": (room.BAT(2), ("linear",)),
    "GraLoRA": (room.GraLoRA(4, 6.0, blocks=2), ("linear", "grouped")),
    "HiRA": (room.HiRA(2), ("linear", "table")),
    "LoHa": (room.LoHa(2, 3.0), ("linear", "table")),
    "LoHa of rank one": (room.LoHa(1), ("linear",)),
    "fLoRA": (room.FLoRA(2), ALL),
    "IA3": (room.IA3(), ALL),
    "IA3 of inputs": (room.IA3("inputs"), ALL),
    "LoKr": (room.LoKr(1, 1.5), ("linear", "table")),
    "LoKr of matrices": (room.LoKr(8), ("linear",)),
    "LoKr of pairs": (room.LoKr(1, factor=4, both=True), ("linear", "table")),
    "OFT": (room.OFT(2), ("linear", "table")),
    "OFT by a series": (room.OFT(2, terms=5), ("linear",)),
    "Tucker": (room.Tucker(3), ("linear", "grouped")),
    "DoTA": (room.DoTA(3, cores=2), ("linear",)),
    "SODA": (room.SODA(), ("linear", "table")),
    "RandLoRA": (room.RandLoRA(4, 4.0), ("linear", "table")),
}


class Layers(eqx.Module):
    """One layer for each way in which a weight is met; stacks are in the contract tests."""

    linear: eqx.nn.Linear
    grouped: eqx.nn.Conv1d
    table: eqx.nn.Embedding

    def __init__(self, key):
        k = jr.split(key, 3)
        self.linear = eqx.nn.Linear(10, 6, key=k[0])
        self.grouped = eqx.nn.Conv1d(4, 6, 2, groups=2, key=k[1])
        self.table = eqx.nn.Embedding(8, 6, key=k[2])

    def __call__(self, x, names):
        return {name: getattr(self, name)(part) for name, part in parts(x, names).items()}


def parts(x, names):
    """What each layer is given."""
    all_ = {"linear": x, "grouped": x[:8].reshape(4, 2), "table": jnp.argmax(x[:8])}
    return {name: all_[name] for name in names}


MODEL = eqx.filter_jit(Layers)(jr.key(0))


@eqx.filter_jit
def starts_of_every_kind(key):
    """Adapters as they start, and the model merged with them."""
    make = lambda kind, names: lrjax.adapt(MODEL, kind, where=list(names), key=key)
    starts = {name: make(*setting) for name, setting in KINDS.items()}
    return starts, {name: lrjax.merge(MODEL, own) for name, own in starts.items()}


@eqx.filter_jit
def of_every_kind(adapters, x):
    """Outputs bound and merged, their gradients, the changes alone, merged models."""

    def of(name):
        params, frozen = lrjax.partition(adapters[name])
        names = KINDS[name][1]

        def loss(params, attach):
            after = attach(MODEL, eqx.combine(params, frozen))
            outputs = after(x, names)
            return sum(jnp.sum(jnp.sin(y)) for y in outputs.values()), (outputs, after)

        grad = jax.grad(loss, has_aux=True)
        gradient, (outputs, bound) = grad(params, lrjax.bind)
        same, (wanted, merged) = grad(params, lrjax.merge)
        changes = {}
        for at, part in parts(x, names).items():
            layer = getattr(bound, at)
            changes[at] = layer.ready.change(layer.site, part)
        return merged, (outputs, wanted), (gradient, same), changes

    return {name: of(name) for name in adapters}, MODEL(x, ALL)


@functools.cache
def every_kind(seed):
    """Models merged at the start; adapters that have moved, and what these do."""
    starts, begun = starts_of_every_kind(jr.key(seed))
    move = lambda params, frozen: eqx.combine(moved(params, jr.key(seed + 1)), frozen)
    adapters = {name: move(*lrjax.partition(own)) for name, own in starts.items()}
    x = jnp.asarray(np.random.default_rng(seed).standard_normal(10), jnp.float32)
    return begun, adapters, *of_every_kind(adapters, x)


@pytest.fixture
def kinds(getkey):
    """One draw for all tests of a run."""
    return every_kind(getkey.seed)


@pytest.mark.slow
def test_on_every_layer_bound_is_merged_and_starts_as_the_model(kinds):
    begun, _, models, plain = kinds
    arrays = lambda tree: eqx.filter(tree, eqx.is_array)
    for name, (_, (bound, merged), gradients, changes) in models.items():
        assert_close(arrays(begun[name]), arrays(MODEL))
        for layer, change in changes.items():
            at, y = f"{name}, {layer}", np.asarray(plain[layer])
            assert relative_error(bound[layer], merged[layer]) < tol(y, condition=100), at
            assert np.any(bound[layer] != y), at
            want = np.asarray(merged[layer]) - y - moved_bias(models[name][0], layer)
            assert relative_error(change, want) < tol(y, condition=1000), at
            for a, b in zip(*(jax.tree.leaves(g[layer]) for g in gradients), strict=True):
                assert np.any(a), at
                assert relative_error(a, b) < tol(y, condition=1000), at


def moved_bias(merged, layer):
    """By how much the bias of a layer is another one after merging."""
    after, before = (getattr(getattr(m, layer), "bias", 0.0) for m in (merged, MODEL))
    return np.asarray(after) - np.asarray(before)


def f64(x):
    return np.asarray(x, np.float64)


@eqx.filter_jit
def call(layer, adapters, x):
    return lrjax.bind(layer, adapters)(x)


def moved_adapter(layer, kind, getkey, **settings):
    adapters = adapt(layer, kind, key=getkey(), **settings)
    params, frozen = lrjax.partition(adapters)
    return eqx.combine(moved(params, getkey()), frozen)


def miss(w, a):
    return reference.miss(w, f64(a.blocks))


def bat(w, a):
    return reference.bat(w, f64(a.blocks))


def gralora(w, a):
    return reference.gralora(w, f64(a.blocks.left), f64(a.blocks.right.mT), 1.5)


def hira(w, a):
    return reference.hira(w, f64(a.pair.left), f64(a.pair.right).T)


def flora(w, a):
    return reference.flora(w, f64(a.pair.left), f64(a.pair.right).T)


def loha(w, a):
    pairs = (a.pair, a.other)
    return reference.loha(w, *(f64(x) for p in pairs for x in (p.left, p.right.T)), 1.5)


def lokr(w, a):
    return reference.lokr(w, f64(a.outer), f64(a.inner.materialize()), 1.5)


def oft(w, a):
    return reference.oft(w, f64(a.angles), 2)


def soda(w, a):
    shift = f64(a.spectrum.core) - f64(a.spectrum.start)
    return reference.soda(w, shift, [f64(x) for x in a.angles], (2, 5))


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("MiSS", miss),
        ("BAT", bat),
        ("GraLoRA", gralora),
        ("HiRA", hira),
        ("fLoRA", flora),
        ("LoHa", loha),
        ("LoKr", lokr),
        ("OFT", oft),
        ("SODA", soda),
    ],
)
def test_weight_is_that_of_the_paper(name, formula, kinds):
    _, adapters, found, _ = kinds
    got, layer = found[name][0].linear, MODEL.linear
    want = formula(f64(layer.weight), adapters[name]["linear"])
    assert relative_error(got.weight, want) < tol(got.weight)
    np.testing.assert_array_equal(got.bias, layer.bias)


@pytest.mark.parametrize("side", ["outputs", "inputs"])
def test_ia3_scales_a_side_and_outputs_with_their_bias(side, getkey):
    layer = eqx.nn.Linear(10, 6, key=getkey())
    adapters = moved_adapter(layer, room.IA3(side), getkey)
    pair, own = adapters[""].pair, merge(layer, adapters)
    gains = 1 + f64(pair.left if side == "outputs" else pair.right)[:, 0]
    weight, bias = reference.ia3(f64(layer.weight), f64(layer.bias), gains, side)
    assert relative_error(own.weight, weight) < tol(own.weight)
    assert relative_error(own.bias, bias) < tol(own.bias)
    # The same as HiRA of rank one with ones on the other side, but for the bias.
    hira = room.Hadamard(pair, None, jnp.float32(1), None, "both")
    assert_close(merge(layer, room.Adapters({"": hira})).weight, own.weight)


@pytest.mark.slow
def test_special_cases_of_lora(getkey):
    """MiSS with stacked identities, GraLoRA of one block, LoHa of squared rank."""
    layer = eqx.nn.Linear(10, 6, key=getkey())
    for kind in (room.MiSS(4), room.GraLoRA(3, 6.0, blocks=1), room.LoHa(3, 6.0)):
        adapters = moved_adapter(layer, kind, getkey)
        adapter = adapters[""]
        if isinstance(kind, room.GraLoRA):
            pair, scale = jax.tree.map(lambda x: x[0, 0], adapter.blocks), adapter.scale
        else:
            pair, scale = adapter.factors()
        lora = room.Adapters({"": room.Factors(pair, None, scale, None, "both")})
        assert_close(merge(layer, lora), merge(layer, adapters), condition=10)
        x = jr.normal(getkey(), (10,))
        bound = call(layer, lora, x), call(layer, adapters, x)
        assert_close(*bound, condition=10)


@pytest.mark.slow
def test_ranks_that_the_papers_promise(x64, getkey):
    layer = eqx.nn.Linear(12, 12, key=getkey())

    def rank(kind):
        """How many singular values of the change are above its rounding."""
        merged = f64(merge(layer, moved_adapter(layer, kind, getkey)).weight)
        rounding = tol(merged) * np.linalg.norm(merged)
        return np.linalg.matrix_rank(merged - f64(layer.weight), tol=rounding)

    # In float64: one random change in a thousand has a singular value of 1e-4 or less.
    assert rank(room.MiSS(3)) == 3
    assert rank(room.GraLoRA(4, blocks=2)) == 8
    assert rank(room.LoHa(3)) == 9
    assert rank(room.HiRA(2)) == rank(room.BAT(3)) == 12


def test_no_dense_weight_is_kept_for_the_way_back(getkey):
    layer = eqx.nn.Linear(64, 64, key=getkey())
    for kind in (room.HiRA(2), room.BAT(4)):
        params, frozen = lrjax.partition(lrjax.adapt(layer, kind, key=getkey()))

        def output(params, x, frozen=frozen):
            return lrjax.bind(layer, eqx.combine(params, frozen))(x)

        _, pullback = jax.vjp(output, params, jr.normal(getkey(), (64,)))
        kept = {id(x): x.size for x in jax.tree.leaves(pullback) if hasattr(x, "size")}
        del kept[id(layer.weight)]
        assert max(kept.values()) < 64 * 64


def test_loha_takes_the_way_with_fewer_products(getkey):
    """Thin factors of width r² for a small rank, the dense change for a large one."""
    layer, flops = eqx.nn.Linear(64, 64, key=getkey()), {}
    for rank in (1, 2, 8):
        params, frozen = lrjax.partition(lrjax.adapt(layer, room.LoHa(rank), key=getkey()))

        def loss(params, x, layer, frozen=frozen):
            bound = lrjax.bind(layer, eqx.combine(params, frozen))
            return jnp.sum(jax.vmap(bound)(x) ** 2)

        step = jax.jit(jax.grad(loss)).lower(params, jnp.ones((512, 64)), layer)
        flops[rank] = step.compile().cost_analysis()["flops"] / (2 * 512 * 64 * 64)
    # In products with the whole matrix: one and three thin ones, or two.
    assert flops[1] < flops[2] < 1.6
    assert 2 < flops[8] < 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: room.MiSS(0), "MiSS needs a rank of at least 1"),
        (lambda: room.GraLoRA(4, blocks=3), "blocks must divide its rank"),
        (lambda: room.HiRA(dropout=1.0), "HiRA's dropout must be in"),
        (lambda: room.IA3("rows"), "side"),
        (lambda: room.LoKr(2, factor=0), "LoKr's factor must be at least 1"),
        (lambda: room.SODA(dropout=1.0), "SODA's dropout must be in"),
        (lambda: room.RandLoRA(0), "RandLoRA needs a rank of at least 1"),
        (lambda: room.OFT(1), "OFT's size must be at least 2"),
        (lambda: room.OFT(terms=1), "OFT's terms must be at least 2"),
    ],
)
def test_bad_settings_are_refused(make, message):
    # Of a wrong word the tests' runtime type checker may be the first to complain.
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("kind", [room.BAT(3), room.GraLoRA(4, blocks=4)])
def test_blocks_must_divide_the_sides(kind, getkey):
    with pytest.raises(ValueError, match=r"does not divide those of the root \(6, 10\)"):
        lrjax.adapt(eqx.nn.Linear(10, 6, key=getkey()), kind, key=getkey())


@pytest.mark.parametrize(
    ("factor", "sizes"),
    [
        (None, {256: (16, 16), 128: (8, 16), 127: (1, 127), 12: (3, 4)}),
        (4, {128: (4, 32), 10: (2, 5), 2: (1, 2)}),
        (8, {2: (1, 2), 8: (8, 1)}),
    ],
)
def test_lokr_splits_a_side_near_its_root_or_as_told(factor, sizes, getkey):
    for side, (outer, inner) in sizes.items():
        shape = jax.ShapeDtypeStruct((3, side), jnp.float32)
        kind = room.LoKr(200, factor=factor)
        adapter = jax.eval_shape(
            lambda w, kind=kind: lrjax.adapt(
                {"w": w}, kind, where=["w"], key=jax.random.key(0)
            )["w"],
            shape,
        )
        assert (adapter.outer.shape[-1], adapter.inner.shape[-1]) == (outer, inner)


@pytest.mark.slow
def test_oft_keeps_lengths_and_angles_of_rows(getkey):
    layer = eqx.nn.Linear(12, 6, key=getkey())
    for terms, exact in ((None, True), (12, True), (3, False)):
        kind = room.OFT(4, terms=terms)
        params, frozen = lrjax.partition(adapt(layer, kind, key=getkey()))
        small = jax.tree.map(lambda x: 0.15 * jnp.ones_like(x), params)
        after = f64(merge(layer, eqx.combine(small, frozen)).weight)
        gram = f64(layer.weight) @ f64(layer.weight).T
        assert (relative_error(after @ after.T, gram) < 1e-5) == exact
        assert relative_error(after, layer.weight) > 0.1


def test_soda_has_a_rotation_near_the_cube_root_for_each_axis():
    for side, sizes in {60: (3, 4, 5), 27: (3, 3, 3), 10: (2, 5), 7: (7,), 1: ()}.items():
        shape = jax.ShapeDtypeStruct((4, side), jnp.float32)
        make = lambda w: lrjax.adapt({"w": w}, room.SODA(), where="w", key=jr.key(0))
        params, _ = lrjax.partition(jax.eval_shape(make, shape))
        shapes = [x.shape for x in jax.tree.leaves(params)]
        assert shapes == [(q * (q - 1) // 2,) for q in sizes] + [(min(4, side),)]


@pytest.mark.slow
def test_soda_without_one_of_its_two_parts(getkey):
    """Its rotation alone is that of OFT, its spectrum alone that of SVFit."""
    layer = eqx.nn.Linear(7, 5, key=getkey())
    both = moved_adapter(layer, room.SODA(), getkey)
    own, start = both[""], adapt(layer, room.SODA(), key=getkey())[""]
    merged = lambda adapter: merge(layer, room.Adapters({"": adapter})).weight

    turned = eqx.tree_at(lambda a: a.angles, start, own.angles)
    oft = room.Rotation(own.angles[0][None], None, (5, 7), of_outputs=False)
    assert_close(merged(turned), merged(oft), condition=100)

    values = start.spectrum.start * jnp.linspace(0.5, 1.5, 5)
    scaled = eqx.tree_at(lambda a: a.spectrum.core, start, values)
    svfit = adapt(layer, room.SVFit(5), key=getkey())[""]
    svfit = eqx.tree_at(lambda a: a.core, svfit, values)
    assert_close(merged(scaled), merged(svfit), condition=100)

    # What the cut leaves: a singular value below zero counts as none.
    cut = eqx.tree_at(lambda a: a.spectrum.core, own, values.at[2:].set(-1.0))
    left = np.linalg.svd(f64(merged(cut)), compute_uv=False)
    want = np.sort(np.maximum(f64(cut.spectrum.core), 0))[::-1]
    np.testing.assert_allclose(left, want, atol=1e-5)


def test_soda_of_the_paper_starts_beside_the_model(getkey):
    layer = eqx.nn.Linear(6, 5, key=getkey())
    adapters = adapt(layer, room.SODA(1e-3), key=getkey())
    change = f64(merge(layer, adapters).weight) - f64(layer.weight)
    # All five singular values of the change are δ.
    np.testing.assert_allclose(np.linalg.svd(change)[1], 1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    "kind", [room.SODA(dropout=0.5), room.RandLoRA(2, 2.0, dropout=0.5)]
)
def test_half_precision_and_dropout_of_dense_changes(kind, getkey):
    """A call in bfloat16 is the merged one's, and without a change dropout does nothing."""
    key, x = getkey(), jr.normal(getkey(), (6,), jnp.bfloat16)
    layer = eqx.nn.Linear(6, 4, dtype=jnp.bfloat16, key=getkey())

    @jax.jit
    def outputs(layer, x):
        start = lrjax.adapt(layer, kind, key=key)
        params, frozen = lrjax.partition(start)
        adapters = eqx.combine(moved(params, key), frozen)
        calls = [(adapters, None), (adapters, key), (start, key)]
        bound = [lrjax.bind(layer, own, key=k)(x) for own, k in calls]
        return *bound, lrjax.merge(layer, adapters)(x), layer(x)

    plain, dropped, still, merged, base = outputs(layer, x)
    assert plain.dtype == dropped.dtype == jnp.bfloat16
    size = max(1.0, float(np.abs(f64(merged)).max()))
    assert np.abs(f64(plain) - f64(merged)).max() < tol(plain) * size
    assert_close(still, base)
    assert np.any(dropped != plain)


def randlora(pool, own):
    """What the reference takes beside the weight."""
    parts = (pool.wide, pool.narrow, own.ranks, own.gains)
    return *(f64(x) for x in parts), float(own.scale)


def test_randlora_is_a_sum_over_shared_bases_of_full_rank(getkey):
    model = {
        "tall": eqx.nn.Linear(5, 9, key=getkey()),
        "wide": eqx.nn.Linear(9, 6, key=getkey()),
    }
    adapters = moved_adapter(model, room.RandLoRA(4, 2.0), getkey)
    pool, after = adapters.pools["RandLoRA"], merge(model, adapters)
    assert (pool.wide.shape, pool.narrow.shape) == ((9, 8), (6, 4))
    for name, layer in model.items():
        own, weight = adapters[name], f64(layer.weight)
        want = reference.randlora(weight, *randlora(pool, own))
        assert relative_error(after[name].weight, want) < tol(layer.weight, condition=10)
        assert np.linalg.matrix_rank(want - weight) == min(weight.shape)
        pair, scale = own.factors(pool)
        exported = weight + float(scale) * f64(pair.materialize())
        assert relative_error(exported, want) < tol(layer.weight, condition=10)


def test_randlora_starts_as_its_paper_says(getkey):
    layer = eqx.nn.Linear(80, 96, key=getkey())
    adapters = adapt(layer, room.RandLoRA(32), key=getkey())
    pool, own = adapters.pools["RandLoRA"], adapters[""]
    assert (own.ranks.shape, own.gains.shape) == ((3, 32), (3, 80))
    assert not np.any(own.ranks)
    assert own.scale == 20
    np.testing.assert_allclose(own.gains, 1 / 80)
    for x in (f64(pool.wide), f64(pool.narrow)):
        # At least 2,560 uniform numbers: standard errors of 1/50 and, of the variance, of
        # √(4/5) of that.
        assert abs(x.mean()) < 6 / x.size**0.5
        assert abs(x.var() - 1) < 6 / x.size**0.5
        assert np.abs(x).max() < 3**0.5 * (1 + 2**-8)  # rounded to bfloat16


def test_randlora_with_one_base_is_vera(getkey):
    """Its gains are VeRA's scalings of the outputs, its ranks those of the rank."""
    layer = eqx.nn.Linear(9, 6, key=getkey())
    adapters = moved_adapter(layer, room.RandLoRA(7, 7.0, group="one"), getkey)
    pool, own = adapters.pools["one"], adapters[""]
    pair = lrjax.LowRank(*(x.astype(jnp.float32) for x in (pool.narrow, pool.wide)))
    vectors = (own.gains[0], own.ranks[0], own.scale)
    vera = room.Scaled(*vectors, None, inputs=9, group="one")
    same = room.Adapters({"": vera}, {"one": room.FactorPool(pair, "none")})
    assert own.ranks.shape == (1, 7)
    assert_close(merge(layer, same), merge(layer, adapters), condition=100)


@pytest.mark.slow
def test_tucker_has_a_core_and_a_matrix_for_each_axis(getkey):
    kernel = jr.normal(getkey(), (3, 2, 5, 4))  # height, width, in, out
    spec = lrjax.MatrixSpec(rows=(3,), cols=(2, 0, 1))
    conv = eqx.nn.Conv2d(5, 4, (3, 2), key=getkey())
    conv = eqx.tree_at(lambda c: c.weight, conv, kernel.transpose(3, 2, 0, 1))
    kind = room.Tucker(3, taps=2, scale=1.5)
    adapters = moved_adapter(conv, kind, getkey, where=lambda path, layer: True)
    adapter = adapters[""]
    shapes = [part.shape for part in adapter.parts]
    assert shapes == [(3, 3, 2, 2), (4, 3), (5, 3), (3, 2), (2, 2)]
    core, *factors = map(f64, adapter.parts)
    want = reference.tucker(f64(conv.weight), core, factors, 1.5)
    assert relative_error(merge(conv, adapters).weight, want) < tol(kernel)
    pair, scale = adapter.factors()
    assert pair.rank == 3
    change = float(scale) * f64(pair.materialize())
    assert relative_error(change, (want - f64(conv.weight)).reshape(4, -1)) < 1e-5
    # The same adapter on the kernel as an array with its axes in another order.
    array = room.Adapters({"": adapter}, axes=(("", spec),))
    same = merge(kernel, array)
    assert_close(same, jnp.asarray(want, jnp.float32).transpose(2, 3, 1, 0), condition=10)
    made = adapt(kernel, kind, axes=lambda path, x: spec, where="", key=getkey())
    assert [part.shape for part in made[""].parts] == [
        (3, 3, 3, 2),
        (4, 3),
        (5, 3),
        (3, 3),
        (2, 2),
    ]


def test_dota_trains_a_tensor_train_of_the_weight(getkey):
    layer = eqx.nn.Linear(12, 8, key=getkey())
    adapters = moved_adapter(layer, room.DoTA(2, cores=3), getkey)
    adapter, w = adapters[""], f64(layer.weight)
    assert [x.shape for x in adapter.parts] == [(1, 2, 2, 2), (2, 2, 2, 2), (2, 2, 3, 1)]
    new, old = (
        reference.tensor_train([f64(x) for x in train])
        for train in (adapter.parts, adapter.start)
    )
    assert relative_error(merge(layer, adapters).weight, w + new - old) < tol(layer.weight)
    # Of two cores it is the best sum of Kronecker products (Eckart and Young), of a bond
    # without a bound the weight itself.
    two = adapt(layer, room.DoTA(2, cores=2), key=getkey())[""].start
    tiles = w.reshape(2, 4, 3, 4).transpose(0, 2, 1, 3).reshape(6, 16)
    left = np.linalg.svd(tiles, compute_uv=False)[2:]
    off = w - reference.tensor_train([f64(x) for x in two])
    np.testing.assert_allclose(np.linalg.norm(off), np.linalg.norm(left), rtol=1e-4)
    whole = adapt(layer, room.DoTA(99), key=getkey())[""].start
    assert relative_error(reference.tensor_train([f64(x) for x in whole]), w) < 1e-5
    with pytest.raises(ValueError, match="at least two cores"):
        room.DoTA(cores=1)


@pytest.mark.parametrize("layer", ["table", "head"])
def test_token_rows_changes_the_chosen_rows_alone(layer, getkey):
    make = {
        "table": lambda k: eqx.nn.Embedding(9, 5, key=k),
        "head": lambda k: eqx.nn.Linear(5, 9, key=k),
    }
    model, tokens = make[layer](getkey()), [7, 2]
    everything = lambda path, layer: True
    adapters = moved_adapter(model, room.TokenRows(tokens), getkey, where=everything)
    params, frozen = lrjax.partition(adapters)
    (rows,) = jax.tree.leaves(params)
    assert rows.shape == (5, 2)
    want = f64(model.weight)
    want[tokens] += f64(rows).T
    assert relative_error(merge(model, adapters).weight, want) < tol(rows)

    def loss(params, x):
        return jnp.sum(lrjax.bind(model, eqx.combine(params, frozen))(x) ** 2)

    if layer == "table":
        # A token that is not chosen has no gradient, one that is has that of its row.
        none, own = (
            jax.tree.leaves(jax.grad(loss)(params, jnp.int32(t)))[0] for t in (3, 2)
        )
        assert not np.any(none)
        assert not np.any(own[:, 0])
        assert_close(own[:, 1], 2 * jnp.asarray(want[2], jnp.float32), condition=10)
    for wrong, message in (
        ([9], "has the row 9, and the root has 9 rows"),
        ([1, 1], "once"),
    ):
        with pytest.raises(ValueError, match=message):
            lrjax.adapt(model, room.TokenRows(wrong), where=everything, key=getkey())
    with pytest.raises(ValueError, match="none of them negative"):
        room.TokenRows([-1])


def test_fused_rows_are_parts_with_kinds_of_their_own(getkey):
    """As three layers would be, in value and gradient, and for a stack of them."""
    sizes, ends = (6, 2, 4), (0, 6, 8, 12)
    kinds = (lrjax.DoRA(2), None, room.IA3())
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(5, 12, key=key))
    stack = make(jr.split(getkey(), 2))
    adapters = moved_adapter(stack, room.FusedRows(kinds, sizes), getkey)
    params, frozen = lrjax.partition(adapters)
    x = jr.normal(getkey(), (5,))
    first = lambda tree: jax.tree.map(lambda a: a[1] if eqx.is_array(a) else a, tree)

    def parts(params):
        layer, own = first(stack), first(eqx.combine(params, frozen))
        outputs = []
        for part, kind, a, b in zip(own[""].parts, kinds, ends, ends[1:], strict=False):
            cut = lambda l: (l.weight, l.bias)
            small = eqx.tree_at(cut, layer, (layer.weight[a:b], layer.bias[a:b]))
            if kind is not None:
                small = lrjax.bind(small, room.Adapters({"": part}))
            outputs.append(small.weight @ x + small.bias)
        return jnp.concatenate(outputs)

    def fused(attach):
        return lambda params: first(attach(stack, eqx.combine(params, frozen)))(x)

    @jax.jit
    def all_of(params):
        square = lambda f: jax.value_and_grad(lambda p: jnp.sum(f(p) ** 2))(params)
        return [square(f) for f in (parts, fused(lrjax.bind), fused(lrjax.merge))]

    (want, gradient), *others = all_of(params)
    for value, same in others:
        assert_close(value, want, condition=100)
        assert_close(same, gradient, condition=1000)


@pytest.mark.parametrize(
    ("kinds", "sizes", "message"),
    [
        ([lrjax.LoRA(2)], (4, 2), "1 kinds for sizes"),
        ([None, None], (4, 2), "at least one kind"),
        ([lrjax.VeRA(2), None], (4, 2), "share a pool"),
        ([lrjax.LoRA(2, init="eva"), None], (4, 2), "start from data"),
        ([lrjax.LoRA(2), None], (4, 4), "add up to 8, and the root has 6 outputs"),
    ],
)
def test_fused_rows_must_fit(kinds, sizes, message, getkey):
    layer = eqx.nn.Linear(5, 6, key=getkey())
    with pytest.raises(ValueError, match=message):
        lrjax.adapt(layer, room.FusedRows(kinds, sizes), key=getkey())


def test_a_batch_with_scaled_products_of_its_own_shares_one_product(getkey):
    """fLoRA under vmap is the loop over dense weights, and none of them is formed."""
    layer, (batch, rank) = eqx.nn.Linear(10, 6, key=getkey()), (5, 2)
    make = lambda key: lrjax.adapt(layer, room.FLoRA(rank), key=key)
    many = jax.vmap(make)(jr.split(getkey(), batch))
    params, frozen = lrjax.partition(many)
    params, x = moved(params, getkey()), jr.normal(getkey(), (batch, 10))

    def call(params, x):
        one = lambda p, f, x: lrjax.bind(layer, eqx.combine(p, f))(x)
        return jax.vmap(one)(params, frozen, x)

    got = jax.jit(call)(params, x)
    pair = params[""].pair
    for i in range(batch):
        weight = flora(f64(layer.weight), jax.tree.map(lambda a, i=i: a[i], params[""]))
        want = weight @ f64(x[i]) + f64(layer.bias)
        assert relative_error(got[i], want) < tol(got, condition=10)
    # Its only product with the weight is that of all scaled inputs.
    text = str(jax.make_jaxpr(call)(params, x))
    assert f"f32[{batch},{rank},6] = dot_general" in text
    assert f"f32[{batch},6,10]" not in text
    assert pair.shape == (batch, 6, 10)


def test_flora_of_rank_one_is_ia3_and_its_columns_come_apart(getkey):
    layer = eqx.nn.Linear(10, 6, key=getkey())
    gains, one = jr.normal(getkey(), (6, 1)), jnp.float32(1)
    ones = jnp.ones((10, 1))
    own = room.ScaledProducts(lrjax.LowRank(1 + gains, ones), one, None)
    ia3 = room.Hadamard(lrjax.LowRank(gains, ones), None, one, None, "left")
    weight = lambda adapter: merge(layer, room.Adapters({"": adapter})).weight
    assert_close(weight(own), weight(ia3))

    x, target = jr.normal(getkey(), (10,)), jr.normal(getkey(), (6,))

    @jax.jit
    def gradient(spread, key):
        params, frozen = lrjax.partition(
            lrjax.adapt(layer, room.FLoRA(2, spread=spread), key=key)
        )
        loss = lambda p: jnp.vdot(lrjax.bind(layer, eqx.combine(p, frozen))(x), target)
        return jax.grad(loss)(params)[""].pair.left

    same, apart = gradient(0.0, jr.key(0)), gradient(0.1, jr.key(0))
    assert np.array_equal(same[:, 0], same[:, 1])
    assert relative_error(apart[:, 0], apart[:, 1]) > 1e-2

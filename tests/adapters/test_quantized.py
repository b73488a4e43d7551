"""Quantized weights: what they store, layers that run on them, adapters on top."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import adapters as room
from lrjax.adapters import NF4, Full, Int8, QuantizedArray, dequantize, quantize
from tests.adapters.models import adapt, moved, zoo, zoo_where
from tests.helpers import assert_close, tol
from tests.reference.quantized import blockwise, doubly_quantized, normal_floats


FORMATS = {"int8": Int8(block=6), "NF4": NF4(block=6, double=False), "double": NF4(block=6)}
formats = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


@eqx.filter_jit
def made(format, x):
    weight = format(x)
    return weight, weight.dequantize()


def test_levels_are_quantiles_of_the_normal_distribution():
    levels = made(NF4(), jnp.ones((1, 2)))[0].levels
    np.testing.assert_allclose(levels, normal_floats(), atol=1e-12)
    # As published, in appendix E of the paper.
    published = [-1, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343]
    published += [-0.09105004, 0, 0.0795803, 0.1609302, 0.2461123, 0.33791524]
    published += [0.44070983, 0.562617, 0.72295684, 1]
    np.testing.assert_allclose(levels, published, atol=5e-7)


@formats
def test_dense_reference(format, getkey):
    """A matrix whose last block is not full, and one row of zeros."""
    x = jr.normal(getkey(), (5, 16)).at[2].set(0)
    got = made(format, x)[1]
    levels = np.arange(-127.0, 128) if isinstance(format, Int8) else normal_floats()
    rows, scales = zip(*(blockwise(row, 6, levels) for row in x), strict=True)
    want = np.stack(rows)
    if getattr(format, "double", False):
        flat = np.concatenate(scales)
        ratio = doubly_quantized(flat) / np.where(flat == 0, 1, flat)
        ratio = ratio.reshape(5, 3)
        want = want * np.repeat(ratio, 6, axis=1)[:, :16]
    # A number may lie in the middle of two levels.
    near = np.isclose(got, want, rtol=1e-4, atol=1e-5)
    assert np.count_nonzero(~near) <= 1, (got, want)


def test_error_bounds(getkey):
    """Eight bits: half of a scale. A number that is a level is kept."""
    x = jr.normal(getkey(), (8, 32))
    weight, got = made(Int8(block=8), x)
    largest = jnp.max(jnp.abs(x.reshape(8, 4, 8)), axis=2)
    bound = jnp.repeat(largest / 127 / 2, 8, axis=1)
    assert jnp.all(jnp.abs(got - x) <= bound * (1 + tol(x)))
    assert_close(made(Int8(block=8), got)[1], got)
    again = made(NF4(block=8, double=False), made(NF4(block=8, double=False), x)[1])
    assert_close(again[1], made(NF4(block=8, double=False), x)[1])
    assert weight.shape == x.shape
    assert weight.ndim == 2
    assert weight.dtype == x.dtype


@pytest.mark.parametrize(
    ("format", "bits"), [(Int8(), 8.5), (NF4(), 4.129), (NF4(double=False), 4.5)]
)
def test_bits_of_a_number(format, bits):
    weight = eqx.filter_eval_shape(format, jnp.ones((2, 256, 512)))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weight))
    assert 8 * size / (2 * 256 * 512) == pytest.approx(bits, rel=1e-3)


@pytest.mark.slow_but("NF4")
@formats
def test_stack_is_a_loop_and_rows_are_looked_up(format, getkey):
    x = jr.normal(getkey(), (3, 5, 16))
    stack, whole = made(format, x)
    for i in range(3):
        assert_close(made(format, x[i])[1], whole[i])
    one = jax.tree.map(lambda a: a[1], stack)
    assert_close(one[jnp.array([4, 0])], whole[1][jnp.array([4, 0])])
    v = jr.normal(getkey(), (16, 2))
    assert_close(one @ v, whole[1] @ v, condition=100)
    assert_close(one @ v[:, 0], whole[1] @ v[:, 0], condition=100)
    half = made(type(format)(block=6, dtype=jnp.bfloat16), x)[1]
    assert half.dtype == jnp.bfloat16
    assert_close(half, whole, rtol=2**-8)


class Stacked(eqx.Module):
    """What is quantized, and how it is used: looked up, scanned, called, an own method."""

    table: eqx.nn.Embedding
    blocks: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, key, width=8, depth=3):
        kt, kb, kl = jr.split(key, 3)
        self.table = eqx.nn.Embedding(5, width, key=kt)
        layer = lambda key: eqx.nn.Linear(width, width, key=key)
        self.blocks = eqx.filter_vmap(layer)(jr.split(kb, depth))
        self.last = eqx.nn.Linear(width, 2, key=kl)

    def __call__(self, tokens):
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        step = lambda x, a: (jnp.tanh(jax.vmap(eqx.combine(a, static))(x)), None)
        x, _ = jax.lax.scan(step, jax.vmap(self.table)(tokens), arrays)
        return jax.vmap(self.last)(x) + x @ self.table.weight[0][:, None]


TOKENS = jnp.array([0, 3, 4])
everything = lambda path, layer: True
KINDS = {
    "LoRA": lrjax.LoRA(2),
    "DoRA": lrjax.DoRA(2),
    "VeRA": lrjax.VeRA(3),
    "Full": Full(),
}


@pytest.fixture(scope="module")
def small():
    make = lambda key: quantize(Stacked(key), NF4(block=4), where=everything)
    return eqx.filter_jit(make)(jr.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_works_on_a_quantized_base(name, small, getkey):
    """As on the dense one, in value and gradient, one and many adapters."""
    assert isinstance(small.blocks.weight, QuantizedArray)
    where = lambda path, layer: isinstance(layer, (eqx.nn.Linear, eqx.nn.Embedding))
    params, frozen = lrjax.partition(adapt(small, KINDS[name], where=where, key=getkey()))
    members = [moved(params, getkey()), moved(params, getkey())]
    two = jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs)), *members)

    def loss(params, model, attach):
        return jnp.sum(attach(model, eqx.combine(params, frozen))(TOKENS) ** 2)

    over = lambda attach: jax.jit(
        jax.vmap(jax.value_and_grad(lambda p, m: loss(p, m, attach)), (0, None))
    )
    got, want = (
        over(lrjax.bind)(two, small),
        over(lrjax.merge)(two, eqx.filter_jit(dequantize)(small)),
    )
    assert_close(got, want, condition=1e3)


STRUCTURED = {
    "LoRA-XS": lrjax.LoRAXS(2),
    "HiRA": room.HiRA(2),
    "OFT": room.OFT(2),
    "BAT": room.BAT(2),
    "LoHa": room.LoHa(2),
    "LoKr": room.LoKr(1),
    "GraLoRA": room.GraLoRA(2),
    "MiSS": room.MiSS(2),
    "IA3": room.IA3(),
    "Tucker": room.Tucker(2),
    "DoTA": room.DoTA(2, cores=2),
    "PMSS": room.PMSS(2),
    "SVFit": room.SVFit(2),
    "NoRA": room.NoRA(2, 3),
    "LoLDU": room.LoLDU(2),
    "TinyLoRA": room.TinyLoRA(2, 3),
    "PoLAR": room.PoLAR(2),
    "StelLA": room.StelLA(2),
    "NOLA": room.NOLA(2, 3),
    "BoRA": room.BoRA(2),
}


@pytest.mark.slow
def test_kinds_that_form_the_weight_do_so_from_the_dequantized_one(getkey):
    """All kinds of the contract in one program; stacks where the weight is read."""
    stacks = ("LoRA-XS", "HiRA", "OFT")

    def make(key, name):
        layer = lambda key: eqx.nn.Linear(8, 8, key=key)
        return eqx.filter_vmap(layer)(jr.split(key, 2)) if name in stacks else layer(key)

    @eqx.filter_jit
    def build(key):
        model = {name: make(key, name) for name in STRUCTURED}
        model = quantize(model, NF4(block=4))
        return model, lrjax.adapt(model, lambda path, site: STRUCTURED[path], key=key)

    def outputs(attach, model, params, frozen, x):
        whole = attach(model, eqx.combine(params, frozen))
        call = lambda name: eqx.filter_vmap(lambda layer: layer(x))(whole[name])
        return {n: call(n) if n in stacks else whole[n](x) for n in STRUCTURED}

    small, adapters = build(getkey())
    params, frozen = lrjax.partition(adapters)

    @jax.jit
    def values(params, model, dense, x):
        both = []
        for attach, base in ((lrjax.bind, model), (lrjax.merge, dense)):

            def loss(params, attach=attach, base=base):
                found = outputs(attach, base, params, frozen, x)
                return sum(jnp.sum(y**2) for y in found.values()), found

            both.append(jax.grad(loss, has_aux=True)(params))
        return both

    args = moved(params, getkey()), small, dequantize(small), jr.normal(getkey(), (8,))
    (gradient, got), (same, want) = values(*args)
    for name in STRUCTURED:
        assert_close(got[name], want[name], condition=1e3)
        assert_close(gradient[name], same[name], condition=1e4)


@pytest.mark.slow
def test_layers_that_compute_another_weight_are_refused_by_name(getkey):
    normed = eqx.nn.WeightNorm(eqx.nn.Linear(4, 4, key=getkey()))
    model = {"normed": normed, "last": eqx.nn.Linear(4, 4, key=getkey())}
    words = r"normed\.layer is inside normed, a WeightNorm"
    with pytest.raises(ValueError, match=words):
        quantize(model, NF4())
    inner = quantize(normed.layer, NF4())
    model["normed"] = eqx.tree_at(lambda n: n.layer, normed, inner)
    for where in (["last"], ["normed.layer"]):
        adapters = lrjax.adapt(model, lrjax.LoRA(2), where=where, key=getkey())
        with pytest.raises(ValueError, match=words):
            lrjax.bind(model, adapters)


@pytest.mark.slow
def test_dense_weights_are_no_residuals(small):
    """What the gradient keeps of the forward pass: codes and activations."""
    adapters = lrjax.adapt(small, lrjax.LoRA(2), where=["blocks", "last"], key=jr.key(0))
    params, frozen = lrjax.partition(adapters)

    def kept(model, params):
        loss = lambda p: jnp.sum(lrjax.bind(model, eqx.combine(p, frozen))(TOKENS))
        return jax.vjp(loss, params)[1]

    big = lambda model: {
        (x.shape, str(x.dtype))
        for x in jax.tree.leaves(jax.eval_shape(kept, model, params))
        if x.size >= 3 * 8 * 4
    }
    assert ((3, 8, 8), "float32") not in big(small)
    assert ((3, 8, 2, 2), "uint8") in big(small)
    assert ((3, 8, 8), "float32") in big(dequantize(small))


@pytest.mark.slow
@pytest.mark.parametrize("format", [None, NF4()])
def test_scan_copies_no_weights(format):
    """The gradient through scanned layers needs less memory than their weights have."""
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(64, 64, use_bias=False, key=key))
    blocks = eqx.filter_jit(make)(jr.split(jr.key(0), 16))
    blocks = blocks if format is None else eqx.filter_jit(quantize)(blocks, format)
    params, frozen = lrjax.partition(adapt(blocks, lrjax.LoRA(1), key=jr.key(1)))

    def loss(params, frozen, blocks, x):
        bound = lrjax.bind(blocks, eqx.combine(params, frozen))
        arrays, static = eqx.partition(bound, eqx.is_array)
        step = lambda x, layer: (jnp.tanh(eqx.combine(layer, static)(x)), None)
        return jnp.sum(jax.lax.scan(step, x, arrays)[0])

    args = (params, frozen, blocks, jnp.ones(64))
    memory = jax.jit(jax.grad(loss)).lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 16 * 64 * 64 * 4 / 2


@pytest.mark.slow
def test_a_quantized_model_runs_as_it_is(getkey):
    """Layers, methods that read the weight, cells, stacks, ties: as the dense one does."""
    model = zoo(getkey())
    others = ("grouped", "normed.layer", "query", "experts")
    where = lambda path, layer: zoo_where(path, layer) and path not in others
    small = eqx.filter_jit(lambda m: quantize(m, Int8(block=2), where=where))(model)
    run = eqx.filter_jit(lambda model: model(TOKENS))
    assert_close(run(small), run(dequantize(small)), condition=1e3)
    assert isinstance(small.cell.weight_ih, QuantizedArray)
    assert isinstance(small.shared.pytree[0].weight, QuantizedArray)


def test_no_gradient_reaches_the_scales(small):
    def loss(floats, rest):
        return jnp.sum(eqx.combine(floats, rest)(TOKENS) ** 2)

    floats, rest = eqx.partition(small, eqx.is_inexact_array)
    gradient = eqx.filter_jit(jax.grad(loss))(floats, rest)
    assert not np.any(gradient.last.weight.scale.scale)
    assert not np.any(gradient.blocks.weight.scale.scale)
    assert np.any(gradient.last.bias)


@pytest.mark.slow
def test_arrays_of_other_libraries(getkey):
    """Trees of parameters with quantized leaves: kernels, heads told by a rule."""
    x = jr.normal(getkey(), (4, 2, 6))
    params = {"query": {"kernel": Int8(block=2)(x)}}
    spec = lrjax.MatrixSpec(rows=(1, 2), cols=(0,))
    kind, axes = lrjax.LoRA(2), lambda path, array: spec
    adapters = lrjax.adapt(params, kind, axes=axes, key=getkey())
    start = lrjax.materialize(params, adapters)["query"]["kernel"]
    assert_close(start, params["query"]["kernel"].dequantize())
    assert adapters["query.kernel"].pair.shape == (12, 4)


@pytest.mark.slow
def test_what_is_refused(small, getkey):
    adapters = lrjax.adapt(small, lrjax.LoRA(2), key=getkey())
    with pytest.raises(
        ValueError, match=r"\['blocks', 'last'\] are quantized, which cannot"
    ):
        lrjax.merge(small, adapters)
    with pytest.raises(ValueError, match="blocks is quantized already"):
        quantize(small, NF4())
    with pytest.raises(TypeError, match=r"NF4\(\), got the class NF4: call it"):
        quantize(small, NF4)
    conv = {"conv": eqx.nn.Conv1d(2, 2, 1, key=getkey())}
    with pytest.raises(ValueError, match=r"conv is a Conv1d: eqx\.nn\.Linear"):
        quantize(conv, Int8(), where=everything)
    for format in (Int8, NF4):
        with pytest.raises(ValueError, match="block must be a positive even number, got 3"):
            format(block=3)
    twice = [small.last, small.last]
    with pytest.raises(ValueError, match="in the tree 2 times"):
        lrjax.adapt(twice, lrjax.LoRA(2), key=getkey())

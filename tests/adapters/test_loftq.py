"""Quantizing by turns with low-rank factors, and quantized arrays of qwix."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax.adapters import NF4, Int8, dequantize, loftq, quantize
from tests.helpers import assert_close
from tests.reference import quantized as reference


FORMAT = NF4(block=4, double=False)


def stack(key):
    make = lambda key: eqx.nn.Linear(8, 6, key=key)
    return {"blocks": eqx.filter_vmap(make)(jr.split(key))}


@eqx.filter_jit
def error(model, small, adapters):
    """``‖W − Q − s B A‖`` of each matrix of a stack."""
    merged = lrjax.merge(dequantize(small), adapters)
    rest = model["blocks"].weight - merged["blocks"].weight
    return jnp.linalg.norm(rest, axis=(1, 2))


@pytest.mark.slow_but("factors")
@pytest.mark.parametrize("first", ["weight", "factors"])
def test_dense_reference(first, getkey):
    model = stack(getkey())
    kind = lrjax.LoRA(2, alpha=6)
    run = eqx.filter_jit(
        lambda m, key: loftq(m, kind, FORMAT, first=first, steps=2, key=key)
    )
    small, adapters = run(model, getkey())
    levels = reference.normal_floats()
    codes = lambda row: reference.blockwise(row, 4, levels)[0]
    pair = adapters["blocks"].pair
    changes = 3 * np.asarray(pair.materialize())
    bases = np.asarray(dequantize(small)["blocks"].weight)
    for weight, base, change in zip(model["blocks"].weight, bases, changes, strict=True):
        want = reference.loftq(np.asarray(weight, np.float64), codes, 2, 2, first)
        # A number near the middle of two levels may go the other way, the rest follows.
        assert np.linalg.norm(base - want[0]) < 0.1 * np.linalg.norm(want[0])
        total = np.linalg.norm(weight - want[0] - want[1])
        got = np.linalg.norm(weight - base - change)
        assert abs(got - total) < 0.1 * total
    assert_close(pair.left.mT @ pair.left, pair.right.mT @ pair.right, condition=1e3)


def test_nearer_than_quantized_alone(getkey):
    """One step makes good the best of rank r; where r is all, the whole of it."""
    model, key = stack(getkey()), getkey()
    plain = quantize(model, FORMAT)
    lost = model["blocks"].weight - dequantize(plain)["blocks"].weight
    values = jnp.linalg.svd(lost, compute_uv=False)
    run = eqx.filter_jit(lambda m, kind: loftq(m, kind, FORMAT, steps=1, key=key))
    for rank in (2, 6):
        small, adapters = run(model, lrjax.LoRA(rank))
        assert_close(dequantize(small), dequantize(plain))
        want = jnp.sqrt(jnp.sum(values[:, rank:] ** 2, axis=1))
        got = error(model, small, adapters)
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.max(values)) * 10)


def test_what_is_refused(getkey):
    model, key = stack(getkey()), getkey()
    with pytest.raises(TypeError, match=r"loftq starts lrjax\.LoRA\(rank\), got VeRA"):
        loftq(model, lrjax.VeRA(2), FORMAT, key=key)
    with pytest.raises(ValueError, match="finds the start of the factors itself"):
        loftq(model, lrjax.LoRA(2, init="pissa"), FORMAT, key=key)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        loftq(model, lrjax.LoRA(2), FORMAT, steps=0, key=key)
    with pytest.raises(ValueError, match=r"first must be one of .* got 'base'"):
        loftq(model, lrjax.LoRA(2), FORMAT, first="base", key=key)
    with pytest.raises(ValueError, match="loftq takes 7 singular vectors"):
        loftq(model, lrjax.LoRA(7), Int8(), key=key)


@pytest.mark.slow_but("int4", "nf4")
@pytest.mark.parametrize("qtype", ["int8", "int4", "nf4"])
def test_arrays_of_qwix(qtype, getkey):
    """Quantized kernels of Flax NNX under adapters, dense ones for the call."""
    qwix = pytest.importorskip("qwix", reason="pip install 'lrjax[peers]' brings qwix")
    nnx = pytest.importorskip("flax.nnx", reason="pip install 'lrjax[nnx]' brings flax")
    lrjax.adapters.register_quantized(qwix.QArray, qwix.dequantize)

    graph, state = nnx.split(nnx.Linear(8, 6, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    params["kernel"] = qwix.quantize(
        params["kernel"], qtype, channelwise_axes=(1,), tiled_axes={0: 4}
    )
    adapters = lrjax.adapt(params, lrjax.LoRA(2, train="right"), key=getkey())
    assert list(adapters.layers) == ["kernel"]
    pair = lrjax.LowRank(jnp.ones((6, 2)), jr.normal(getkey(), (8, 2)))
    adapters = eqx.tree_at(lambda a: a["kernel"].pair, adapters, pair)

    @jax.jit
    def output(params, adapters, x):
        dense = dequantize(lrjax.materialize(params, adapters))
        nnx.replace_by_pure_dict(state, dense)
        return nnx.merge(graph, state)(x)

    x = jr.normal(getkey(), (3, 8))
    kernel = qwix.dequantize(params["kernel"])
    want = x @ (kernel + pair.materialize().T) + params["bias"][None]
    assert_close(output(params, adapters, x), want, condition=100)
    with pytest.raises(ValueError, match=r"\['kernel'\] are quantized, which cannot hold"):
        lrjax.merge(params, adapters)

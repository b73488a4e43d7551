"""LoRA in the files of kohya's scripts and of llama.cpp."""

from pathlib import Path

import _exchange_model as small
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lrjax
from lrjax.adapters import load_gguf_lora, load_kohya, save_gguf_lora, save_kohya
from tests.adapters.models import randomized
from tests.helpers import assert_close


FILES = Path(__file__).parent / "files"
MODEL = small.net(load_file(FILES / "base.safetensors"))
STACKED = small.stacked(MODEL)
LINEAR = ["q_proj", "v_proj", "up_proj", "mlp.down_proj"]
Q = "model.layers.0.self_attn.q_proj"


def ranks(path, site):
    """Different ranks and scales."""
    return lrjax.LoRA(3, 6.0) if "q_proj" in path else lrjax.LoRA(2, 1.0)


def made(where, key, model=MODEL, kind=ranks):
    return randomized(lrjax.adapt(model, kind, where=where, key=key), jr.fold_in(key, 1))


@pytest.mark.slow
def test_kohya_round_trip(tmp_path, getkey):
    path = tmp_path / "style.safetensors"
    adapters = made(["q_proj", "conv"], getkey())
    save_kohya(path, MODEL, adapters)
    tensors = load_file(path)
    key = "lora_unet_model_layers_0_self_attn_q_proj"
    assert tensors[f"{key}.lora_down.weight"].shape == (3, 8)
    assert tensors[f"{key}.lora_up.weight"].shape == (8, 3)
    assert tensors[f"{key}.alpha"] == 6
    assert tensors["lora_unet_model_conv.lora_down.weight"].shape == (2, 2, 3, 2)
    assert tensors["lora_unet_model_conv.lora_up.weight"].shape == (4, 2, 1, 1)
    assert eqx.tree_equal(load_kohya(path, MODEL), adapters)
    again = load_kohya(path, STACKED)
    assert_close(lrjax.merge(STACKED, again), small.stacked(lrjax.merge(MODEL, adapters)))


def test_kohya_keeps_parts_of_a_pipeline_apart(tmp_path, getkey):
    path = tmp_path / "both.safetensors"
    adapters = made(["q_proj"], getkey())
    save_kohya(path, MODEL, adapters, prefix="lora_te")
    other = {"lora_unet_elsewhere.lora_up.weight": np.ones((2, 2), np.float32)}
    without = {k: x for k, x in load_file(path).items() if not k.endswith("alpha")}
    save_file(other | without, path)
    loaded = load_kohya(path, MODEL, prefix="lora_te")
    assert float(loaded[Q].scale) == 1  # without an alpha
    with pytest.raises(ValueError, match="lora_unet_elsewhere"):
        load_kohya(path, MODEL)
    with pytest.raises(ValueError, match="no module"):
        load_kohya(path, MODEL, prefix="lora_te2")
    two = {"a": {"b": MODEL.lm_head}, "a_b": MODEL.lm_head}
    with pytest.raises(ValueError, match="underscores"):
        load_kohya(path, two)


@pytest.mark.parametrize(
    ("kind", "where", "word"),
    [
        (lrjax.DoRA(2), ["q_proj"], "Magnitude"),
        (lrjax.adapters.WithBias(lrjax.LoRA(2)), ["q_proj"], "Biased"),
        (lrjax.adapters.HiRA(2), ["q_proj"], "Hadamard"),
        (lrjax.adapters.Full(), ["lm_head"], "FullCopy"),
        (lrjax.LoRA(2), ["gate_up_proj"], "experts"),
        (lrjax.LoRA(2), ["embed_tokens"], "embeddings"),
    ],
)
def test_what_is_no_product_is_refused(kind, where, word, tmp_path):
    adapters = lrjax.adapt(MODEL, kind, where=where, axes=small.axes, key=jr.key(0))
    with pytest.raises(ValueError, match=word):
        save_kohya(tmp_path / "a.safetensors", MODEL, adapters)
    if word == "embeddings":
        return
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match=word):
        save_gguf_lora(tmp_path / "a.gguf", MODEL, adapters, architecture="llama")


def adjacent(rows, heads):
    """Rows as GGUF has them: the halves of a head by turns."""
    index = np.arange(len(rows)).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    return rows[index]


@pytest.mark.slow
def test_gguf_is_what_llama_cpp_reads(tmp_path, getkey):
    """``W + (alpha / r) B A`` under its names, rows of queries in its order."""
    gguf = pytest.importorskip("gguf", reason="pip install 'lrjax[peft]' brings gguf")
    path = tmp_path / "style.gguf"
    adapters = made([*LINEAR, "embed_tokens"], getkey())
    save_gguf_lora(path, MODEL, adapters, architecture="llama", heads=(2, 1))
    reader = gguf.GGUFReader(path)
    field = lambda name: reader.fields[name].contents()
    assert field("general.type") == "adapter"
    assert field("general.architecture") == "llama"
    assert field("adapter.type") == "lora"
    alpha = field("adapter.lora.alpha")
    assert alpha == 1  # that of most layers
    tensors = {t.name: np.array(t.data).reshape(t.shape[::-1]) for t in reader.tensors}
    names = {
        "blk.1.attn_v": "model.layers.1.self_attn.v_proj",
        "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
        "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
        "blk.0.attn_q": Q,
    }
    for own, name in names.items():
        a, b = (tensors[f"{own}.weight.lora_{x}"] for x in "ab")
        pair, scale = adapters[name].factors()
        want = scale * np.asarray(pair.left) @ np.asarray(pair.right).T
        want = adjacent(want, 2) if "attn_q" in own else want
        assert_close(alpha / a.shape[0] * b @ a, want)
    # The table is looked up by the rows of A.
    a, b = (tensors[f"token_embd.weight.lora_{x}"] for x in "ab")
    pair, scale = adapters["model.embed_tokens"].factors()
    assert a.shape == (small.TOKENS, 2)
    assert_close(
        alpha / 2 * a @ b.T, scale * np.asarray(pair.right) @ np.asarray(pair.left).T
    )

    again = load_gguf_lora(path, MODEL, heads=(2, 1))
    assert_close(lrjax.merge(MODEL, again), lrjax.merge(MODEL, adapters))
    joined = load_gguf_lora(path, STACKED, heads=(2, 1))
    assert_close(lrjax.merge(STACKED, joined), small.stacked(lrjax.merge(MODEL, adapters)))


def test_gguf_names_are_left_in_their_order(tmp_path, getkey):
    """A model that was read from GGUF, and the architecture of others."""
    pytest.importorskip("gguf")
    path = tmp_path / "style.gguf"
    native = lambda path: path.replace("model.layers", "blk").replace(
        "self_attn.q_proj", "attn_q"
    )
    adapters = made(["q_proj"], getkey(), kind=lrjax.LoRA(2, 5.0, dtype=jnp.bfloat16))
    save_gguf_lora(path, MODEL, adapters, architecture="llama", rename=native)
    again = load_gguf_lora(path, MODEL, rename=native)
    assert_close(lrjax.merge(MODEL, again), lrjax.merge(MODEL, adapters))
    save_gguf_lora(path, MODEL, adapters, architecture="qwen2")
    assert_close(
        lrjax.merge(MODEL, load_gguf_lora(path, MODEL)), lrjax.merge(MODEL, adapters)
    )


def test_gguf_refuses(tmp_path, getkey):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "style.gguf"
    adapters = made(["q_proj"], getkey())
    with pytest.raises(ValueError, match="heads="):
        save_gguf_lora(path, MODEL, adapters, architecture="llama")
    with pytest.raises(ValueError, match="no architecture"):
        save_gguf_lora(path, MODEL, adapters, architecture="lama")
    conv = made(["conv"], getkey())
    with pytest.raises(ValueError, match="counterpart"):
        save_gguf_lora(path, MODEL, conv, architecture="llama")
    save_gguf_lora(path, MODEL, adapters, architecture="llama", heads=(2, 1))
    with pytest.raises(ValueError, match="belong to nothing"):
        load_gguf_lora(path, MODEL, heads=(2, 1), rename=lambda path: f"x.{path}")
    with pytest.raises(ValueError, match="heads="):
        load_gguf_lora(path, MODEL)
    other = {"blk": [{"attn_q": eqx.nn.Linear(3, 8, key=getkey())}]}
    with pytest.raises(ValueError, match="do not fit"):
        load_gguf_lora(path, other)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="no whole GGUF"):
        load_gguf_lora(cut, MODEL)
    writer = gguf.GGUFWriter(cut, "llama")
    writer.add_tensor("a", np.ones((2, 2), np.float32))
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    with pytest.raises(ValueError, match="no LoRA adapter"):
        load_gguf_lora(cut, MODEL)

"""Directories that PEFT 0.21.2 wrote (benchmarks/peft_exchange.py), and those for it."""

import functools
import json
from pathlib import Path

import _exchange_model as small
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from safetensors.numpy import load_file

import lrjax
from lrjax.adapters import WithBias
from lrjax.adapters.interop._tensors import open_tensors
from tests.adapters.models import adapt, randomized
from tests.helpers import assert_close


FILES = Path(__file__).parent / "files"
CASES = sorted(path.name for path in FILES.iterdir() if path.is_dir())
MODEL = small.net(load_file(FILES / "base.safetensors"))
TWO = ["v_proj", "mlp.down_proj"]


@functools.cache
def loaded(case):
    return lrjax.load_peft(FILES / case, MODEL, axes=small.axes)


@functools.cache
def merged(case):
    return small.arrays_of(lrjax.merge(MODEL, loaded(case)))


def tensors(directory):
    """In the dtypes of the file, which load_file does not know all of."""
    with open_tensors(Path(directory, "adapter_model.safetensors")) as file:
        return {name: file.read(name) for name in file.shapes}


def config(directory):
    return json.loads(Path(directory, "adapter_config.json").read_text())


@pytest.mark.slow_but("adalora", "adalora_conv", "bias_all")
@pytest.mark.parametrize("case", CASES)
def test_is_what_peft_makes_of_its_file(case):
    """Weights merged and layers called, to the accuracy that was promised."""
    want = load_file(FILES / case / "want.safetensors")
    limit = 2e-2 if case == "bfloat16" else 2e-5
    bound = lrjax.bind(MODEL, loaded(case))
    for key, x in want.items():
        kind, _, name = key.partition("/")
        if kind == "merged":
            got = merged(case)[name]
        elif case in CALLED:
            got = small.outputs(MODEL, bound, name)
        else:
            continue
        assert np.abs(got - x).max() <= limit, key


# Where a call is more than the product with the merged weight, and one of the others.
CALLED = ("lora_bias", "bfloat16", "dora_embedding", "conv")
# PEFT takes pieces off the base anew; what it wrote so is written in another form.
REWRITTEN = {"pissa", "olora", "vera_seed", "lora_bias", "bias_all", "miss_mini", "tokens"}
REWRITTEN |= {"randlora"}  # which has the bases once for every module


@pytest.mark.slow_but("lora", "embedding", "conv")
@pytest.mark.parametrize("case", CASES)
def test_round_trip(case, tmp_path):
    lrjax.save_peft(tmp_path, MODEL, loaded(case))
    again = lrjax.load_peft(tmp_path, MODEL, axes=small.axes)
    old, new = tensors(FILES / case), tensors(tmp_path)
    if case not in REWRITTEN:
        # Of an embedding PEFT writes the base as well.
        assert {k: x.shape for k, x in old.items() if "base_layer.weight" not in k} == {
            k: x.shape for k, x in new.items()
        }
        assert all(
            np.array_equal(old[k], x) and old[k].dtype == x.dtype for k, x in new.items()
        )
        assert eqx.tree_equal(again, loaded(case))
    elif case != "lora_bias":
        other = small.arrays_of(lrjax.merge(MODEL, again))
        for name, x in merged(case).items():
            assert_close(other[name], x, condition=10)
    settings = config(tmp_path)
    assert settings["peft_type"] == config(FILES / case)["peft_type"]
    assert settings.get("init_lora_weights", True) is True


def test_residual_inits_are_on_the_base_as_it_is():
    for case in ("pissa", "olora"):
        adapter = loaded(case)["model.layers.0.self_attn.q_proj"]
        assert adapter.start is not None
        assert adapter.pair.rank == 2


def test_scales_come_from_the_rank_of_the_tensors():
    """rsLoRA, and the first pattern that fits in the order of the file."""
    adapters = loaded("rslora_patterns")
    scale = lambda path: float(adapters[f"model.layers.{path}"].scale)
    assert scale("0.self_attn.q_proj") == pytest.approx(3 / 2**0.5)
    assert scale("1.self_attn.q_proj") == pytest.approx(3)  # rank 1
    assert scale("1.self_attn.v_proj") == pytest.approx(7 / 2**0.5)
    assert scale("0.mlp.down_proj") == pytest.approx(3 / 3**0.5)
    assert scale("1.mlp.down_proj") == pytest.approx(5 / 3**0.5)


STACKED = small.stacked(MODEL)


@pytest.mark.slow_but("vera")
@pytest.mark.parametrize(
    "case", ["rslora_patterns", "dora", "vera", "bias_only", "regex", "adalora", "loha"]
)
def test_stacked_layers_are_joined_and_split(case, tmp_path):
    """Of different ranks too, and where some layers have no adapter."""
    adapters = lrjax.load_peft(FILES / case, STACKED, axes=small.axes)
    got = lrjax.merge(STACKED, adapters)
    want = small.stacked(lrjax.merge(MODEL, loaded(case)))
    assert_close(got, want)
    lrjax.save_peft(tmp_path, STACKED, adapters)
    back = lrjax.load_peft(tmp_path, MODEL, axes=small.axes)
    assert_close(lrjax.merge(MODEL, back), lrjax.merge(MODEL, loaded(case)))


@pytest.mark.slow
def test_trees_of_parameters_and_other_names(tmp_path):
    """A flat dict of torch's names; a tree in which all is called otherwise."""
    base = load_file(FILES / "base.safetensors")
    flat = {name: jnp.asarray(x) for name, x in base.items()}
    got = lrjax.merge(flat, lrjax.load_peft(FILES / "dora", flat))
    assert all(np.allclose(got[name], x, atol=1e-6) for name, x in merged("dora").items())
    table = lrjax.merge(flat, lrjax.load_peft(FILES / "embedding", flat))
    name = "model.embed_tokens.weight"
    assert_close(table[name], merged("embedding")[name])

    tree = {
        "blocks": {"q": jnp.stack([flat[f"{p}.self_attn.q_proj.weight"] for p in PLACES])}
    }
    axes = lambda path, x: lrjax.MatrixSpec()
    rename = lambda path: "model.layers.{}.self_attn.q_proj" if path == "blocks.q" else path
    adapters = lrjax.adapt(tree, lrjax.LoRA(2), where=["q"], axes=axes, key=jr.key(0))
    lrjax.save_peft(tmp_path, tree, adapters, rename=rename)
    names = {name.split(".lora")[0] for name in tensors(tmp_path)}
    assert names == {f"base_model.model.{place}.self_attn.q_proj" for place in PLACES}
    assert eqx.tree_equal(
        lrjax.load_peft(tmp_path, tree, rename=rename, axes=axes), adapters
    )
    listed = lambda path: [f"{place}.self_attn.q_proj" for place in PLACES]
    lrjax.save_peft(tmp_path, tree, adapters, rename=listed)
    assert {name.split(".lora")[0] for name in tensors(tmp_path)} == names


PLACES = ("model.layers.0", "model.layers.1")
# Those with files of PEFT's own have their round trip there.
KINDS = {
    "LoRA-FA": (lrjax.LoRA(2, 3.0, train="left", dropout=0.1), "LORA"),
    "PiSSA": (lrjax.LoRA(2, 3.0, init="pissa"), "LORA"),
    "DoRA": (lrjax.DoRA(2), "LORA"),
    "EDoRA": (lrjax.adapters.WithMagnitude(lrjax.LoRAXS(2)), "LORA"),
    "VeRA": (lrjax.VeRA(5), "VERA"),
    "RandLoRA": (lrjax.adapters.RandLoRA(3, 3.0), "RANDLORA"),
    "Tied-LoRA": (lrjax.TiedLoRA(2), "LORA"),
    "AdaLoRA": (lrjax.adapters.AdaLoRA(2), "ADALORA"),
    "NLS": (lrjax.adapters.NLS((2, 1)), "LORA"),
    "biases": (WithBias(lrjax.LoRA(2)), "LORA"),
    "IA3": (lrjax.adapters.IA3("inputs"), "IA3"),
    "LoKr": (lrjax.adapters.LoKr(1, 3.0), "LOKR"),
}


@pytest.mark.slow_but("LoRA-FA")
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_with_a_counterpart_can_be_written(name, tmp_path, getkey):
    kind, peft_type = KINDS[name]
    adapters = randomized(adapt(STACKED, kind, where=TWO, key=getkey()), getkey())
    lrjax.save_peft(tmp_path, STACKED, adapters, config={"task_type": "CAUSAL_LM"})
    again = lrjax.load_peft(tmp_path, STACKED)
    assert_close(lrjax.merge(STACKED, again), lrjax.merge(STACKED, adapters), condition=10)
    assert config(tmp_path)["peft_type"] == peft_type
    assert config(tmp_path)["task_type"] == "CAUSAL_LM"
    rates = [x for name, x in config(tmp_path).items() if name.endswith("_dropout")]
    assert rates == ([] if peft_type in ("IA3", "LOKR") else rates[:1])
    assert not rates or rates[0] == (pytest.approx(0.1) if name == "LoRA-FA" else 0)


def test_rows_of_a_table_are_kept_themselves(tmp_path, getkey):
    """The rows, not their change; alone they are LoRA on the table."""
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    some = lambda path, site: (
        lrjax.adapters.TokenRows([7, 1]) if "embed" in path else lrjax.LoRA(2)
    )
    where = ["q_proj", "embed_tokens"]
    adapters = randomized(adapt(MODEL, some, where=where, key=getkey()), getkey())
    lrjax.save_peft(tmp_path / "both", MODEL, adapters)
    assert config(tmp_path / "both")["trainable_token_indices"] == {
        "model.embed_tokens": [7, 1]
    }
    table = lrjax.merge(MODEL, adapters).model.embed_tokens.weight
    assert_close(tensors(tmp_path / "both")[key], np.asarray(table)[[7, 1]])
    again = lrjax.load_peft(tmp_path / "both", MODEL)
    assert_close(lrjax.merge(MODEL, again), lrjax.merge(MODEL, adapters))
    alone = lrjax.adapters.Adapters({"model.embed_tokens": adapters["model.embed_tokens"]})
    lrjax.save_peft(tmp_path / "alone", MODEL, alone)
    assert config(tmp_path / "alone")["target_modules"] == ["model.embed_tokens"]
    again = lrjax.load_peft(tmp_path / "alone", MODEL)
    assert_close(lrjax.merge(MODEL, again), lrjax.merge(MODEL, alone))


def test_whole_modules_take_their_other_arrays_along(tmp_path, getkey):
    some = lambda path, site: (
        lrjax.adapters.Full() if path in ("lm_head", "model.norm.weight") else lrjax.LoRA(2)
    )
    where = ["q_proj", "lm_head", "norm.weight"]
    adapters = randomized(lrjax.adapt(MODEL, some, where=where, key=getkey()), getkey())
    lrjax.save_peft(tmp_path, MODEL, adapters)
    assert config(tmp_path)["modules_to_save"] == ["lm_head", "model.norm"]
    assert "base_model.model.model.norm.bias" in tensors(tmp_path)
    again = lrjax.load_peft(tmp_path, MODEL)
    assert_close(lrjax.merge(MODEL, again), lrjax.merge(MODEL, adapters))

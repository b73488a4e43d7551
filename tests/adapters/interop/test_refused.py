"""Files that are broken, hostile, or of another model: refused with a sentence."""

import json
import pickle
import re
import resource
import shutil
import struct
from pathlib import Path

import _exchange_model as small
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lrjax


FILES = Path(__file__).parent / "files"
MODEL = small.net(load_file(FILES / "base.safetensors"))
BODY = (FILES / "lora" / "adapter_model.safetensors").read_bytes()
SIZE = struct.unpack("<Q", BODY[:8])[0]
HEADER = json.loads(BODY[8 : 8 + SIZE])
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def case(tmp_path):
    """A copy of a case: its settings changed, its tensors changed."""

    def make(name="lora", tensors=None, **settings):
        place = tmp_path / name
        shutil.copytree(FILES / name, place, dirs_exist_ok=True)
        path = place / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        if tensors:
            path = place / "adapter_model.safetensors"
            save_file(tensors(load_file(path)), path)
        return place

    return make


def refused(directory, *words, model=MODEL, **arguments):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        lrjax.load_peft(directory, model, axes=small.axes, **arguments)
    for word in words:
        assert word in str(error.value), str(error.value)


def with_header(change, body=BODY[8 + SIZE :]):
    header = json.dumps(change(json.loads(json.dumps(HEADER)))).encode()
    return struct.pack("<Q", len(header)) + header + body


def one(**entry):
    return lambda header: {**header, Q: {**header[Q], **entry}}


HOSTILE = {
    "empty": b"",
    "cut in the length": BODY[:5],
    "cut in the header": BODY[: SIZE // 2],
    "cut in the numbers": BODY[:-10],
    "longer than it says": BODY + b"more",
    "a header of exabytes": struct.pack("<Q", 2**62) + BODY[8:],
    "a header of gigabytes": struct.pack("<Q", 2**33) + BODY[8:],
    "no JSON": struct.pack("<Q", 16) + b"import os;os.x()",
    "a JSON of many brackets": struct.pack("<Q", 10**5) + b"[" * 10**5,
    "a shape of terabytes": with_header(one(shape=[2**40, 8])),
    "a shape that overflows": with_header(one(shape=[2**63, 4])),
    "a negative shape": with_header(one(shape=[-2, -8])),
    "offsets outside": with_header(one(data_offsets=[0, 2**40])),
    "offsets that turn back": with_header(one(data_offsets=[64, 0])),
    "two in one place": with_header(lambda h: {**h, "other": h[Q]}),
    "an unknown dtype": with_header(one(dtype="OBJECT")),
    "a pickle": pickle.dumps(print),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_neither_allocate_nor_run(name, case):
    place = case()
    (place / "adapter_model.safetensors").write_bytes(HOSTILE[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(place, "no whole safetensors file")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_pickles_are_refused_by_name(case):
    place = case()
    (place / "adapter_model.safetensors").rename(place / "adapter_model.bin")
    refused(place, "adapter_model.bin", "pickle")


def test_what_is_not_there(case, tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        lrjax.load_peft(tmp_path / "nothing", MODEL)
    case("several")
    with pytest.raises(FileNotFoundError, match="several"):
        lrjax.load_peft(tmp_path, MODEL)
    place = case()
    (place / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model"):
        lrjax.load_peft(place, MODEL)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "PROMPT_TUNING"}, ["PROMPT_TUNING", "LORA"]),
        ({"peft_type": None}, ["peft_type"]),
        ({"init_lora_weights": "corda"}, ["corda", "covariance"]),
        ({"init_lora_weights": "lora_ga"}, ["lora_ga", "gradient"]),
        ({"init_lora_weights": "loftq"}, ["loftq", "quantized"]),
        ({"init_lora_weights": "pissa_niter_16"}, ["pissa_niter_16"]),
        ({"init_lora_weights": "olora", "fan_in_fan_out": True}, ["fan_in_fan_out"]),
        ({"alora_invocation_tokens": [3]}, ["alora_invocation_tokens"]),
        ({"use_qalora": True}, ["use_qalora"]),
        ({"lora_alpha": "8"}, ["lora_alpha", "number"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha"]),
        ({"alpha_pattern": [1]}, ["alpha_pattern"]),
        ({"alpha_pattern": {"q_proj": None}}, []),
        ({"use_dora": True}, ["use_dora", "lora_magnitude_vector"]),
        ({"target_modules": ["v_proj"]}, ["q_proj", "target_modules"]),
        ({"target_modules": r".*v_proj"}, ["q_proj", "target_modules"]),
        ({"layers_to_transform": [0]}, ["layers.1", "layers_to_transform"]),
        ({"exclude_modules": ["v_proj"]}, ["v_proj", "exclude_modules"]),
        ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, ["lm_head", "no tensors"]),
    ],
)
def test_configs_that_cannot_be_followed(settings, words, case):
    if settings == {"alpha_pattern": {"q_proj": None}}:
        lrjax.load_peft(case(**settings), MODEL)  # None stands for what is usual
        return
    refused(case(**settings), *words)


def test_unknown_settings_are_told_of(case):
    with pytest.warns(UserWarning, match="a_new_method"):
        lrjax.load_peft(case(a_new_method=True), MODEL)


def test_tensors_that_belong_nowhere_are_named(case):
    other = Q.replace("layers.0", "layers.7")
    refused(case(tensors=lambda t: {**t, other: t[Q]}), "layers.7", "leave them out")
    refused(case(), "rename=", rename=lambda path: f"other.{path}")
    stacked = small.stacked(MODEL)
    unnamed = lambda path: path.replace("model.layers", "model.{}.{}")
    refused(case(), "Stacks without names", model=stacked, rename=unnamed)


def test_nothing_loads_into_another_layer(case):
    """q and v never into q and k, whatever their shapes."""
    change = {"q_proj": "v_proj", "v_proj": "q_proj"}
    swap = lambda path: ".".join(change.get(part, part) for part in path.split("."))
    refused(case(), "do not fit", rename=swap)
    refused(case(tensors=lambda t: {k: x for k, x in t.items() if k != Q}), "not both of")
    cut = lambda t: {k: x for k, x in t.items() if "layers.1" not in k}
    refused(case(tensors=cut), "no tensors", "layers.1")


def test_another_base_embedding_is_told_of(case):
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    table = np.asarray(MODEL.model.embed_tokens.weight)
    place = case("embedding", tensors=lambda t: {**t, key: table})
    lrjax.load_peft(place, MODEL)
    place = case("embedding", tensors=lambda t: {**t, key: table + 1})
    refused(place, "another base weight", "embed_tokens")


@pytest.mark.parametrize(
    ("indices", "words"),
    [(None, "does not tell which"), ({"embed_tokens": [1, 2]}, "do not fit")]
    + [({"embed_tokens": [1, 2, k]}, "do not fit") for k in (-1, 2, 10**9)],
)
def test_tokens_are_those_of_the_table(indices, words, case):
    refused(case("tokens", trainable_token_indices=indices), words)


def test_a_rank_in_the_config_allocates_nothing(case):
    """The projection that is made anew has the rank of the vectors."""
    adapters = lrjax.load_peft(case("vera_seed", r=2**40), MODEL)
    assert adapters.pools["VeRA"].pair.rank == 5


def test_bases_are_in_the_file_and_long_enough(case):
    """A seed is not followed: PEFT's draws are of its platform's precision."""
    a, b = (f"base_model.randlora_{x}" for x in "AB")
    gains = Q.replace("lora_A.weight", "randlora_gamma")
    for change, word in (
        (lambda t: {k: x for k, x in t.items() if "randlora_A" not in k}, "save_proj"),
        (lambda t: t | {b: t[b][:7]}, "or longer ones"),
        (lambda t: t | {a: t[a][..., :7]}, "or longer ones"),
        (lambda t: t | {gains: t[gains][:, :7]}, "do not fit"),
    ):
        refused(case("randlora", tensors=change), word)


def mixed(path, site):
    return lrjax.VeRA(4) if path.endswith("q_proj") else lrjax.adapters.HiRA(2)


def sides(path, site):
    """Kronecker products that no rule of PEFT makes of one rule."""
    factor = 4 if "layers.0" in path else 2
    return lrjax.adapters.LoKr(8, factor=factor)


@pytest.mark.parametrize(
    ("kind", "where", "words"),
    [
        (lrjax.adapters.Full(), ["lm_head"], ["beside adapters.Full"]),
        (lrjax.VeRA(4), ["gate_up_proj"], ["experts", "VERA"]),
        (lrjax.DoRA(2), ["gate_up_proj"], ["DoRA"]),
        (lrjax.adapters.OFT(4), ["embed_tokens"], ["Rotation", "as_lora"]),
        (lrjax.adapters.SODA(), ["q_proj"], ["Rotation", "as_lora"]),
        (lrjax.adapters.GraLoRA(2, 2), ["up_proj"], ["Block", "as_lora"]),
        (lrjax.adapters.HiRA(2, dropout=0.1), ["gate_up_proj"], ["experts", "HIRA"]),
        (lrjax.adapters.LoHa(2, dropout=0.1), ["q_proj"], ["LOHA", "rate"]),
        (mixed, ["q_proj", "v_proj"], ["several", "VERA", "HIRA"]),
        (sides, ["up_proj"], ["factor=", "both="]),
    ],
)
def test_what_peft_has_no_place_for(kind, where, words, tmp_path):
    adapters = lrjax.adapt(MODEL, kind, where=where, axes=small.axes, key=jr.key(0))
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        lrjax.save_peft(tmp_path / "new", MODEL, adapters)
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "new").exists()


def test_convolutions_that_peft_adapts_otherwise(tmp_path):
    for more in ({"groups": 2}, {"dilation": 2}):
        model = {"conv": eqx.nn.Conv1d(4, 4, 3, **more, key=jr.key(0))}
        adapters = lrjax.adapt(model, lrjax.LoRA(2), where=["conv"], key=jr.key(0))
        with pytest.raises(ValueError, match="groups="):
            lrjax.save_peft(tmp_path, model, adapters)


def test_settings_that_the_adapters_tell(tmp_path):
    adapters = lrjax.adapt(MODEL, lrjax.LoRA(2), where=["q_proj"], key=jr.key(0))
    with pytest.raises(ValueError, match="lora_alpha"):
        lrjax.save_peft(tmp_path, MODEL, adapters, config={"lora_alpha": 4})
    half, _ = lrjax.partition(adapters)
    with pytest.raises(ValueError, match=r"eqx\.combine"):
        lrjax.save_peft(tmp_path, MODEL, half)
    with pytest.raises(ValueError, match="no layer at"):
        lrjax.save_peft(tmp_path, {"other": MODEL.lm_head}, adapters)
    single = lrjax.adapt(MODEL.lm_head, lrjax.LoRA(2), key=jr.key(0))
    with pytest.raises(ValueError, match="no name"):
        lrjax.save_peft(tmp_path, MODEL.lm_head, single)


def test_rates_of_dropout_are_one(tmp_path):
    rates = lambda path, site: lrjax.LoRA(2, dropout=0.1 if "layers.0" in path else 0.2)
    adapters = lrjax.adapt(MODEL, rates, where=["q_proj"], key=jr.key(0))
    with pytest.raises(ValueError, match="one rate of dropout"):
        lrjax.save_peft(tmp_path, MODEL, adapters)


def test_stacks_without_names(tmp_path):
    tree = {"q": jnp.zeros((2, 3, 4))}
    axes = lambda path, x: lrjax.MatrixSpec()
    adapters = lrjax.adapt(tree, lrjax.LoRA(2), where=["q"], axes=axes, key=jr.key(0))
    with pytest.raises(ValueError, match="one for each matrix"):
        lrjax.save_peft(tmp_path, tree, adapters, rename=lambda path: ["one"])
    linear = eqx.filter_vmap(lambda k: eqx.nn.Linear(3, 4, key=k))(jr.split(jr.key(0), 2))
    adapters = lrjax.adapt({"q": linear}, lrjax.LoRA(2), key=jr.key(0))
    with pytest.raises(ValueError, match="rename="):
        lrjax.save_peft(tmp_path, {"q": linear}, adapters)
    same = lambda path: "one"
    with pytest.raises(ValueError, match="both called"):
        lrjax.load_peft(FILES / "lora", MODEL, rename=same)

"""Does PEFT load what lrjax saves, and lrjax what PEFT saves?

``--fixtures`` writes the files that the tests read as well. Needs torch, transformers and
peft, the extra ``peers``.
"""

import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import _exchange_model as ours
import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import peft
import torch
from _harness import bound, write_results
from safetensors.numpy import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import lrjax


FIXTURES = Path(__file__).parents[1] / "tests" / "adapters" / "interop" / "files"
LAYERS = [f"model.layers.{k}" for k in (0, 1)]


class Experts(nn.Module):
    """Two parameters that hold a matrix for each expert."""

    def __init__(self):
        super().__init__()
        size = (ours.EXPERTS, 10, ours.WIDTH)
        self.gate_up_proj = nn.Parameter(torch.randn(size))
        self.down_proj = nn.Parameter(torch.randn(ours.EXPERTS, ours.WIDTH, 5))


class Net(nn.Module):
    """The parts of the model in ``_exchange_model``."""

    def __init__(self):
        super().__init__()
        w = ours.WIDTH

        def block():
            attention = {"q_proj": nn.Linear(w, w), "v_proj": nn.Linear(w, 4, bias=False)}
            mlp = {"up_proj": nn.Linear(w, 12), "down_proj": nn.Linear(12, w)}
            parts = {"self_attn": nn.ModuleDict(attention), "mlp": nn.ModuleDict(mlp)}
            return nn.ModuleDict(parts)

        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(ours.TOKENS, w),
                "layers": nn.ModuleList([block(), block()]),
                "experts": Experts(),
                "conv": nn.Conv2d(2, 4, (3, 2), stride=2, padding=1),
                "c_attn": Conv1D(3 * w, w),
                "norm": nn.LayerNorm(w),
            }
        )
        self.lm_head = nn.Linear(w, ours.TOKENS, bias=False)

    def forward(self, x):
        return x


def theirs() -> Net:
    """The base model, always with the same weights."""
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


BASE = {name: x.numpy() for name, x in theirs().state_dict().items()}
MODEL = ours.net(BASE)
QV = ["q_proj", "v_proj"]
ALL = [*QV, "up_proj", "down_proj"]
LINEAR = [*QV, "up_proj", "mlp.down_proj"]


def _some_whole(path, site):
    whole = path in ("lm_head", "model.norm.weight")
    return lrjax.adapters.Full() if whole else lrjax.LoRA(RANK)


def _some_rows(path, site):
    own = path.endswith("embed_tokens")
    return lrjax.adapters.TokenRows([7, 1]) if own else lrjax.LoRA(RANK)


def _some_inputs(path, site):
    return lrjax.adapters.IA3("inputs" if path.endswith("up_proj") else "outputs")


def lora(targets=QV, r=2, **settings):
    return peft.LoraConfig(r=r, lora_alpha=3, target_modules=targets, **settings)


def _adalora(pruned, targets=LINEAR):
    config = peft.AdaLoraConfig(
        init_r=3, total_step=9, lora_alpha=5, target_modules=targets
    )
    config.rank_pattern = pruned
    return config


# name: the config. What PEFT writes, and lrjax has to read.
THEIRS = {
    "lora": lambda: lora(),
    "rslora_patterns": lambda: lora(
        ALL,
        use_rslora=True,
        rank_pattern={"down_proj": 3, "layers.1.self_attn.q_proj": 1},
        alpha_pattern={"^model.layers.1.mlp.down_proj": 5, "v_proj": 7},
    ),
    "regex": lambda: lora(r".*layers\.1\..*(q|up)_proj"),
    "layers_to_transform": lambda: lora(ALL, layers_to_transform=[1]),
    "exclude_modules": lambda: lora(ALL, exclude_modules=["layers.0.self_attn.q_proj"]),
    "conv1d": lambda: lora(["c_attn"], fan_in_fan_out=True),
    "conv": lambda: lora(["conv"]),
    "embedding": lambda: lora(["embed_tokens"]),
    "dora": lambda: lora(ALL, use_dora=True),
    "dora_conv": lambda: lora(["conv"], use_dora=True),
    "dora_embedding": lambda: lora(["embed_tokens"], use_dora=True),
    "modules_to_save": lambda: lora(modules_to_save=["lm_head", "norm"]),
    "bias_only": lambda: lora(ALL, bias="lora_only"),
    "bias_all": lambda: lora(ALL, bias="all"),
    "lora_bias": lambda: lora(ALL, lora_bias=True),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "pissa_converted": lambda: lora(init_lora_weights="pissa"),
    "bfloat16": lambda: lora(),
    "several": lambda: lora(),
    "tokens": lambda: lora(trainable_token_indices={"embed_tokens": [9, 2, 5]}),
    "experts": lambda: lora(
        [], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    ),
    "adalora": lambda: _adalora({"model.layers.0.mlp.up_proj.lora_E": [True, False, True]}),
    "adalora_conv": lambda: _adalora(None, ["conv"]),
    "hira": lambda: peft.HiraConfig(r=2, target_modules=ALL, rank_pattern={"up_proj": 3}),
    "hira_conv": lambda: peft.HiraConfig(r=2, target_modules=["conv"]),
    "hira_embedding": lambda: peft.HiraConfig(r=2, target_modules=["embed_tokens"]),
    "loha": lambda: peft.LoHaConfig(
        r=2, alpha=3, target_modules=[*ALL, "conv"], alpha_pattern={"up_proj": 5}
    ),
    "ia3": lambda: peft.IA3Config(target_modules=ALL, feedforward_modules=["down_proj"]),
    "ia3_conv": lambda: peft.IA3Config(target_modules=["conv"], feedforward_modules=[]),
    "ia3_conv_inputs": lambda: peft.IA3Config(
        target_modules=["conv"], feedforward_modules=["conv"]
    ),
    "lokr": lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=[*ALL, "conv"]),
    "lokr_both": lambda: peft.LoKrConfig(
        r=1, decompose_both=True, decompose_factor=4, target_modules=ALL
    ),
    "lokr_whole": lambda: peft.LoKrConfig(
        r=8, target_modules=ALL, rank_pattern={"up_proj": 1}, alpha_pattern={"v_proj": 2}
    ),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=ALL),
    "oft_exact": lambda: peft.OFTConfig(
        oft_block_size=4, target_modules=ALL, use_cayley_neumann=False
    ),
    "miss": lambda: peft.MissConfig(r=3, target_modules=ALL),
    "miss_mini": lambda: peft.MissConfig(
        r=3, mini_r=2, init_weights="mini", target_modules=ALL
    ),
    "miss_bat": lambda: peft.MissConfig(r=4, init_weights="bat", target_modules=LINEAR),
    "vera": lambda: peft.VeraConfig(r=5, target_modules=ALL, projection_prng_key=3),
    "vera_seed": lambda: peft.VeraConfig(
        r=5, target_modules=ALL, projection_prng_key=7, save_projection=False
    ),
    "randlora": lambda: peft.RandLoraConfig(r=3, randlora_alpha=4, target_modules=ALL),
}
RANK = 2
# name: the kind and where. What lrjax writes, and PEFT has to read.
OURS = {
    "LoRA": (lrjax.LoRA(RANK, 3.0), LINEAR),
    "rsLoRA": (lrjax.LoRA(RANK, 3.0, rank_stabilized=True), LINEAR),
    "LoRA-FA": (lrjax.LoRA(RANK, train="left"), LINEAR),
    "PiSSA": (lrjax.LoRA(RANK, 3.0, init="pissa"), LINEAR),
    "LoRA on a convolution": (lrjax.LoRA(RANK), ["conv"]),
    "LoRA on an embedding": (lrjax.LoRA(RANK), ["embed_tokens"]),
    "Tied-LoRA on experts": (lrjax.adapters.TiedLoRA(RANK), ["gate_up_proj"]),
    "LoRA on experts": (lrjax.LoRA(RANK), ["gate_up_proj", "experts.down_proj"]),
    "DoRA": (lrjax.DoRA(RANK), [*LINEAR, "embed_tokens", "conv"]),
    "AdaLoRA": (lrjax.adapters.AdaLoRA(RANK), LINEAR),
    "SoRA": (lrjax.adapters.SoRA(RANK), LINEAR),
    "DyLoRA": (lrjax.adapters.DyLoRA(RANK), LINEAR),
    "NLS": (lrjax.adapters.NLS((RANK, 1)), LINEAR),
    "CapaBoost": (lrjax.adapters.CapaBoost(RANK), LINEAR),
    "HiRA": (lrjax.adapters.HiRA(RANK), [*LINEAR, "embed_tokens", "conv"]),
    "LoHa": (lrjax.adapters.LoHa(RANK, 3.0), [*LINEAR, "conv"]),
    "IA3": (_some_inputs, [*LINEAR, "conv"]),
    "MiSS": (lrjax.adapters.MiSS(3), LINEAR),
    "BAT": (lrjax.adapters.BAT(4), LINEAR),
    "LoKr": (lrjax.adapters.LoKr(1, 3.0), [*LINEAR, "conv"]),
    "LoKr of both": (lrjax.adapters.LoKr(1, factor=4, both=True), LINEAR),
    "OFT": (lrjax.adapters.OFT(4), LINEAR),
    "OFT by a series": (lrjax.adapters.OFT(4, terms=5), LINEAR),
    "VeRA": (lrjax.VeRA(5), LINEAR),
    "RandLoRA": (lrjax.adapters.RandLoRA(3, 4.0), LINEAR),
    "Tied-LoRA": (lrjax.TiedLoRA(RANK), LINEAR),
    "LoRA-XS": (lrjax.LoRAXS(RANK), LINEAR),
    "TinyLoRA": (lrjax.adapters.TinyLoRA(RANK), LINEAR),
    "SVFit": (lrjax.adapters.SVFit(RANK), LINEAR),
    "LoLDU": (lrjax.adapters.LoLDU(RANK), LINEAR),
    "PMSS": (lrjax.adapters.PMSS(RANK), LINEAR),
    "NoRA": (lrjax.adapters.NoRA(1, outer=3), LINEAR),
    "EDoRA": (lrjax.adapters.WithMagnitude(lrjax.LoRAXS(RANK)), LINEAR),
    "biases": (lrjax.adapters.WithBias(lrjax.LoRA(RANK)), LINEAR),
    "token rows": (_some_rows, [*LINEAR, "embed_tokens"]),
    "whole modules": (_some_whole, [*LINEAR, "lm_head", "norm.weight"]),
}


def moved(model, seed=1):
    """Every trained number of a PEFT model moved, so that the adapters act."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


def written_by_peft(name, directory):
    """Save the adapter of a case as its user would."""
    model = peft.get_peft_model(theirs(), THEIRS[name]())
    settings = {}
    if name == "pissa_converted":
        model.peft_config["default"].init_lora_weights = True
        start = Path(directory).with_name("start")
        model.save_pretrained(start)
        model.peft_config["default"].init_lora_weights = "pissa"
        settings["path_initial_model_for_weight_conversion"] = str(start)
    model = moved(model)
    if name == "several":
        model.add_adapter("other", lora(["up_proj"]))
        model.set_adapter("other")
        moved(model, 2)
    if name == "bfloat16":
        for key, parameter in model.named_parameters():
            parameter.data = parameter.data.bfloat16() if "lora_" in key else parameter.data
    model.save_pretrained(directory, **settings)
    for readme in Path(directory).glob("**/README.md"):
        readme.unlink()


def merged_by_peft(directory, model=None):
    """The merged arrays of the base, and what its adapted layers give."""
    loaded = peft.PeftModel.from_pretrained(theirs(), directory)
    found = {}
    for name, module in loaded.base_model.model.named_modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            if type(module).__name__ == "ParamWrapper":
                continue
            layer = ours.part(MODEL, name) if _is_ours(name) else None
            if layer is not None and not isinstance(layer, ours.Experts):
                x = torch.from_numpy(ours.inputs(layer))
                found[f"output/{name}"] = module(x).detach().numpy()
    try:
        plain = loaded.merge_and_unload()
    except RuntimeError:  # a bias that has no place
        return found
    for name, x in plain.state_dict().items():
        if not np.array_equal(x.numpy(), BASE[name]):
            found[f"merged/{name}"] = x.numpy()
    return found


def _is_ours(name):
    return f"{name}.weight" in BASE


def merged_by_lrjax(adapters, want):
    """The same numbers of lrjax."""
    bound_model, found = lrjax.bind(MODEL, adapters), {}
    merged = None
    for key in want:
        kind, _, name = key.partition("/")
        if kind == "output":
            found[key] = np.asarray(ours.outputs(MODEL, bound_model, name))
        else:
            merged = merged or ours.arrays_of(lrjax.merge(MODEL, adapters))
            found[key] = merged[name]
    return found


def difference(got, want):
    """The largest difference of two sets of arrays."""
    assert want, "nothing is compared"
    return max(float(np.abs(got[key] - want[key]).max()) for key in want)


def fixture(name, directory, want):
    """What a test needs of a case, in a few kilobytes."""
    place = FIXTURES / name
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(directory, place)
    for path in place.glob("**/adapter_config.json"):  # PEFT writes sets, in any order
        config = json.loads(path.read_text())
        ordered = {k: sorted(x) if isinstance(x, list) else x for k, x in config.items()}
        path.write_text(json.dumps(ordered, indent=2) + "\n")
    save_file(
        {k: np.ascontiguousarray(x) for k, x in want.items()}, place / "want.safetensors"
    )


def from_peft(name):
    with tempfile.TemporaryDirectory() as above:
        directory = Path(above, "adapter")
        written_by_peft(name, directory)
        want = merged_by_peft(directory)
        if "--fixtures" in sys.argv:
            fixture(name, directory, want)
        adapters = lrjax.load_peft(directory, MODEL, axes=ours.axes)
        forth = difference(merged_by_lrjax(adapters, want), want)
    with tempfile.TemporaryDirectory() as directory:
        lrjax.save_peft(directory, MODEL, adapters)
        back = difference(merged_by_peft(directory), want)
    return {"case": name, "lrjax reads": forth, "PEFT reads it again": back}


def from_lrjax(name):
    kind, where = OURS[name]
    adapters = lrjax.adapt(MODEL, kind, where=where, axes=ours.axes, key=jr.key(0))
    params, frozen = lrjax.partition(adapters)
    leaves, tree = jax.tree.flatten(params)
    keys = jr.split(jr.key(1), len(leaves))
    new = [x + 0.3 * jr.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    adapters = eqx.combine(jax.tree.unflatten(tree, new), frozen)
    with tempfile.TemporaryDirectory() as directory:
        lrjax.save_peft(directory, MODEL, adapters)
        want = merged_by_peft(directory)
        again = lrjax.load_peft(directory, MODEL, axes=ours.axes)
    return {
        "case": name,
        "PEFT reads": difference(merged_by_lrjax(adapters, want), want),
        "lrjax reads it again": difference(merged_by_lrjax(again, want), want),
    }


def main():
    warnings.simplefilter("ignore")
    if "--fixtures" in sys.argv:
        FIXTURES.mkdir(parents=True, exist_ok=True)
        save_file(BASE, FIXTURES / "base.safetensors")
    read = [from_peft(name) for name in THEIRS]
    written = [from_lrjax(name) for name in OURS]
    worst = lambda rows: max(
        max(x for x in r.values() if not isinstance(x, str)) for r in rows
    )
    exact = [row for row in read if row["case"] != "bfloat16"]
    bounds = [
        bound("PEFT's files in lrjax, and back", worst(exact), at_most=2e-5),
        bound(
            "the same in bfloat16", worst([r for r in read if r not in exact]), at_most=2e-2
        ),
        bound("files of lrjax in PEFT", worst(written), at_most=2e-5),
        bound("methods and settings of PEFT that were read", len(read), at_least=40),
        bound("kinds that were written", len(written), at_least=30),
    ]
    write_results("peft_exchange", read + written, bounds, "peft", "torch", "transformers")


if __name__ == "__main__":
    main()

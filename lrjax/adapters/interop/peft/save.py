from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from ...._matrices import is_norm_or_bias
from ...kinds.around import Biased
from ...kinds.full import FullCopy
from ...protocol import Adapters
from .._config import one_value, write_config
from .._names import Module, Rename, expert_keys
from .._stacks import taken_apart
from .._tensors import write_tensors
from ..methods import FORMATS, PREFIX, TENSOR_FILE, Format, Lora, Part
from ._stored import as_stored, base_bias
from ._tokens import SUFFIX, rows_of


Numbers = dict[str, np.ndarray]


def save_peft(
    directory: str | Path,
    model: PyTree,
    adapters: Adapters,
    *,
    rename: Rename | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write adapters as PEFT does, so that it, or what reads its files, can load them.

    ``adapter_config.json`` and ``adapter_model.safetensors``, for the module names of the
    torch model: the path ``model.layers.0.self_attn.q_proj`` of
    ``.model.layers[0].self_attn.q_proj`` is the name. Stacked layers are written one by
    one: the number stands behind ``layers``, ``blocks`` or ``h``.

    - LoRA, DoRA, VeRA, AdaLoRA, HiRA, LoHa, LoKr, IA3, MiSS, BAT, OFT and RandLoRA keep
      their form; factors with a gate are written as AdaLoRA. Every other adapter whose
      change is a product of factors (:meth:`Adapter.factors`), LoRA-XS and Tied-LoRA say,
      is written as plain LoRA with the same function. Residual inits (PiSSA) are written
      as the pair of twice the rank that needs no other base.
    - Of masked columns (:func:`lrjax.adapters.with_ranks`) nothing is written: every layer
      of a stack has its own ``r`` and alpha in the file, and one of rank zero is not there.
    - ``adapters.Full`` is written as ``modules_to_save``, ``adapters.WithBias`` as
      ``bias="lora_only"``, ``adapters.TokenRows`` beside LoRA as
      ``trainable_token_indices``; an array that stacks experts as ``target_parameters``.

    Args:
        directory: is made if it is not there.
        model: what :func:`lrjax.adapt` saw.
        adapters: all of them (``eqx.combine(params, frozen)`` after ``partition``).
        rename: the name of the module from the path of a layer, or of an array without a
            last ``weight``, ``kernel`` or ``embedding``. ``{}`` in it stands for each
            number of a stack, ``"model.layers.{}.mlp.up_proj"``; a list names all.
        config: more settings for the file, as ``base_model_name_or_path`` or
            ``task_type``.

    Raises:
        ValueError: for adapters that PEFT has no counterpart of, alone or together, for
            stacks whose layers have no names, for adapters of another model.

    Example:
        >>> import equinox as eqx, jax, lrjax, tempfile
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.LoRA(rank=2), key=jax.random.key(1))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     lrjax.save_peft(directory, model, adapters)
        ...     same = lrjax.load_peft(directory, model)
        >>> eqx.tree_equal(same, adapters)
        Array(True, dtype=bool)
    """
    modules, parts = taken_apart(model, adapters, rename)
    full = [part for part in parts if isinstance(part.adapter, FullCopy)]
    low, biases = _without_biases([p for p in parts if not isinstance(p.adapter, FullCopy)])
    low, rows = _without_rows(low)
    form = _format_of(low)
    places = _places(part.module for part in low)
    tensors, facts = {}, {}
    for part in low:
        form.check(part.module)
        name = part.module.name
        own, facts[name] = form.write(part)
        tensors |= {f"{places[name]}.{key}": np.asarray(x) for key, x in own.items()}
    lone = _lone_biases(full)
    biases |= {name: lone.pop(name) for name in facts if name in lone}
    whole = _whole([p for p in full if _bias_owner(p) not in biases | lone], modules)
    more, told = _written_biases(form, low, biases, modules, facts)
    more |= {f"{name}.bias": x for name, x in lone.items()}
    told |= {"bias": "all"} if lone else {}
    more |= {f"{name}.{SUFFIX}": x for name, (_, x) in rows.items()}
    tokens = {name: own for name, (own, _) in rows.items()}
    told |= {"trainable_token_indices": tokens} if rows else {}
    shared = form.write_shared(low)
    settings = form.config(facts) | _targets(low, whole) | told | _rate(form, low)
    if taken := sorted(settings.keys() & (config or {}).keys()):
        raise ValueError(f"config= must not have {taken}: the adapters say what they are.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    named = {f"{PREFIX}{key}": x for key, x in (tensors | whole | more).items()}
    named |= {f"base_model.{key}": x for key, x in shared.items()}
    write_tensors(directory / TENSOR_FILE, named)
    free = {"base_model_name_or_path": None, "inference_mode": True, "task_type": None}
    kind = {"peft_type": form.name}
    write_config(directory, free | dict(config or {}) | settings | kind)


def _without_biases(parts: list[Part]) -> tuple[list[Part], Numbers]:
    """The adapters of the weights alone, and the biases by module."""
    biases = {
        part.module.name: np.asarray(part.adapter.own).reshape(-1)
        for part in parts
        if isinstance(part.adapter, Biased)
    }
    bare = lambda a: a.inner if isinstance(a, Biased) else a
    return [part._replace(adapter=bare(part.adapter)) for part in parts], biases


def _without_rows(
    parts: list[Part],
) -> tuple[list[Part], dict[str, tuple[list[int], np.ndarray]]]:
    """The adapters of whole weights, and rows of tables that are trained beside LoRA."""
    found = {part.module.name: rows_of(part) for part in parts}
    rest = [part for part in parts if found[part.module.name] is None]
    rows = {name: own for name, own in found.items() if own is not None}
    beside = bool(rest) and isinstance(_format_of(rest), Lora)
    return (rest, rows) if beside else (parts, {})


def _format_of(parts: list[Part]) -> Format:
    """The method that can write all of them."""
    if not parts:
        raise ValueError("PEFT needs an adapter beside adapters.Full, and here is none.")
    for form in FORMATS:
        if all(form.accepts(part) for part in parts):
            return form
    takes = lambda part: {f.name for f in FORMATS if f.accepts(part)}
    unknown = sorted({type(p.adapter).__name__ for p in parts if not takes(p)})
    if unknown:
        raise ValueError(
            f"PEFT has no counterpart of {unknown}, whose change is no product of factors: "
            "save the nearest plain LoRA, lrjax.adapters.as_lora, or merge them into the "
            "weights with lrjax.merge."
        )
    each = {part.module.name: sorted(takes(part)) for part in parts}
    raise ValueError(
        f"One directory of PEFT has one method, these adapters are of several: {each}. "
        "Save each by itself."
    )


def _places(modules: Iterable[Module]) -> dict[str, str]:
    """Where the tensors of each module are, by name."""
    modules = list(modules)
    own = {module.name: module.name for module in modules if not module.experts}
    return own | expert_keys(module for module in modules if module.experts)


def _targets(parts: list[Part], whole: Numbers) -> dict[str, Any]:
    experts = [part.module.name for part in parts if part.module.experts]
    names = [part.module.name for part in parts if not part.module.experts]
    saved = {key.rpartition(".")[0] for key in whole}
    told = {"target_modules": sorted(names)}
    told |= {"target_parameters": sorted(experts)} if experts else {}
    return told | ({"modules_to_save": sorted(saved)} if saved else {})


def _rate(form: Format, parts: list[Part]) -> dict[str, float]:
    """The one rate of dropout."""
    rates = [part.adapter.dropout_rate() for part in parts]
    numbers = [0.0 if rate is None else float(np.max(rate)) for rate in rates]
    fix = "set adapter.rate of all to one, or to None."
    rate = one_value("rate of dropout", numbers, fix)
    if form.dropout is None and rate:
        raise ValueError(
            f"PEFT's {form.name} drops no inputs, and the adapters do with rate {rate}: "
            "set adapter.rate of all to None (eqx.tree_at)."
        )
    return {} if form.dropout is None else {form.dropout: rate}


def _bias_owner(part: Part) -> str:
    """The module of which this copy changes the bias alone, or none."""
    module, adapter, _ = part
    if module.site.kind == "vector":
        return module.name.removesuffix(".bias") if module.name.endswith(".bias") else ""
    same = adapter.bias is not None and np.array_equal(adapter.matrix, module.matrix())
    return module.name if same else ""


def _lone_biases(parts: list[Part]) -> Numbers:
    """The biases that are trained without the weight beside them, by module."""
    whole = {part.module.name.rpartition(".")[0] for part in parts if not _bias_owner(part)}
    biases = {}
    for part in parts:
        owner, adapter = _bias_owner(part), part.adapter
        if owner and owner not in whole:
            bias = adapter.matrix if part.module.site.kind == "vector" else adapter.bias
            biases[owner] = np.asarray(bias).reshape(-1)
    return biases


def _whole(parts: list[Part], modules: dict[str, Module]) -> Numbers:
    """Whole weights with all that is in the same module, which PEFT saves as one."""
    found: Numbers = {}
    for module, adapter, _ in parts:
        if module.site.kind == "array" and is_norm_or_bias(module.site.path):
            raise ValueError(
                f"{module.site.path!r} stacks vectors, which PEFT keeps one by one: make "
                "it one array for each layer, or leave it in the model."
            )
        arrays = {"weight": as_stored(module, np.asarray(adapter.matrix))}
        if adapter.bias is not None:
            arrays["bias"] = np.asarray(adapter.bias).reshape(-1)
        found |= {key: arrays[role] for key, role in module.parameters.items()}
    saved = {key.rpartition(".")[0] for key in found}
    for module in modules.values():
        if module.site.kind not in ("array", "vector"):
            continue
        for key in module.parameters:
            if key.rpartition(".")[0] in saved and key not in found:
                found[key] = as_stored(module, module.matrix())
    return found


def _written_biases(
    form: Format,
    parts: list[Part],
    biases: Numbers,
    modules: dict[str, Module],
    facts: Mapping[str, Any],
) -> tuple[Numbers, dict[str, Any]]:
    """The trained biases: those of the layers, or of the factors where a layer has none."""
    if not biases:
        return {}, {}
    if not isinstance(form, Lora):
        raise ValueError(f"PEFT's {form.name} trains no biases, here are {sorted(biases)}.")
    base = {p.module.name: base_bias(p.module, modules) for p in parts}
    if all(base[name] is not None for name in biases):
        whole = {name: biases.get(name, old) for name, old in base.items()}
        keys = {f"{k}.base_layer.bias": x for k, x in whole.items() if x is not None}
        return keys, {"bias": "lora_only"}
    tensors = {}
    for name, old in base.items():
        fact = facts[name]
        old = np.zeros(modules[name].site.shape[0], np.float32) if old is None else old
        change = biases.get(name, old) - old
        if fact.has_magnitude or modules[name].experts or modules[name].is_embedding:
            raise ValueError(f"PEFT cannot add a bias to {name!r}, which has none.")
        tensors[f"{name}.lora_B.bias"] = change * np.float32(1 / fact.scale)
    return tensors, {"lora_bias": True}

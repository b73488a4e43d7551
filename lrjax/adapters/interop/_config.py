"""The adapter_config.json of PEFT: what it means for a module, and how one is written."""

import collections
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ._names import Module


CONFIG_FILE = "adapter_config.json"

# What changes the function that an adapter computes, and is not known here.
_REFUSED = {
    "alora_invocation_tokens": "it acts after its invocation tokens alone",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it changes the base weights by a decomposition of its own",
    "monteclora_config": "it draws its factors at random",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "it averages groups of inputs",
    "coft": "its rotations are cut back in every call",
    "block_share": "its blocks are shared",
    "use_effective_conv2d": "its factors are those of a kernel of more axes",
}
_KNOWN = {
    *("auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "revision"),
    *("task_type", "inference_mode", "target_modules", "exclude_modules", "bias", "r"),
    *("modules_to_save", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("init_lora_weights", "init_weights", "lora_alpha", "lora_dropout", "lora_bias"),
    *("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "ensure_weight_tying", "qalora"),
    *("corda_config", "eva_config", "lora_ga_config", "loftq_config", "velora_config"),
    *("megatron_config", "megatron_core", "qalora_group_size", "runtime_config"),
}


def read_config(directory: Path, known: Iterable[str] = ()) -> dict[str, Any]:
    """The checked config of a directory.

    Raises:
        FileNotFoundError: if there is none; the message names those further down.
        ValueError: if it is no JSON object, or asks for what cannot be done.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        below = sorted(str(p.parent) for p in directory.glob(f"*/{CONFIG_FILE}"))
        more = f"; there are several adapters below it, load one: {below}" if below else ""
        raise FileNotFoundError(f"There is no {CONFIG_FILE} in {directory}{more}.")
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ValueError(f"{path} is no config of PEFT: it names no peft_type.")
    _check_config(path, config, {*_KNOWN, *known})
    return config


def _check_config(path: Path, config: dict[str, Any], known: set[str]) -> None:
    for name, why in _REFUSED.items():
        if config.get(name):
            raise ValueError(f"{path} says {name}={config[name]!r}, not supported: {why}.")
    more = {k for k, v in config.items() if v and k not in known | _REFUSED.keys()}
    if more:
        warnings.warn(
            f"{path} has settings that are not known here, and are ignored: {sorted(more)}",
            stacklevel=4,
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise ValueError(f"{name} of {path} must be an object, is {config[name]!r}.")


def number(config: Mapping[str, Any], name: str, default: int | float) -> int | float:
    """A finite number of the config."""
    value = config.get(name, default)
    value = default if value is None else value
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not ok or not math.isfinite(value):
        raise ValueError(f"{name} of {CONFIG_FILE} must be a number, is {value!r}.")
    return value


def by_pattern(
    config: Mapping[str, Any], patterns: str, name: str, default: int | float
) -> int | float:
    """What the first pattern that fits says, in the order of the file, as PEFT reads it."""
    given = config.get(patterns) or {}
    for pattern in given:
        if re.match(rf"(.*\.)?({pattern})$", name):
            return number(given, pattern, default)
    return default


def is_targeted(config: Mapping[str, Any], module: Module) -> bool | None:
    """Whether PEFT adapts the module; ``None`` where the file does not say so."""
    name, targets = module.name, config.get("target_modules")
    parameters = config.get("target_parameters") or ()
    if module.experts:
        return is_called(name, parameters)
    if _is_excluded(config, name):
        return False
    if targets is None or is_called(f"{name}.weight", parameters):
        return is_called(f"{name}.weight", parameters) if parameters else None
    if isinstance(targets, str):
        if targets == "all-linear":
            return None
        return re.fullmatch(targets, name) is not None
    return is_called(name, targets) and _is_transformed(config, name)


def is_called(name: str, names: Iterable[str]) -> bool:
    """Whether a module has one of the names: its own, or the end of it."""
    return any(name == own or name.endswith(f".{own}") for own in names)


def _is_excluded(config: Mapping[str, Any], name: str) -> bool:
    excluded = config.get("exclude_modules") or ()
    if isinstance(excluded, str):
        if re.fullmatch(excluded, name):
            return True
    elif is_called(name, excluded):
        return True
    saved = config.get("modules_to_save") or ()
    return any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in saved)


def _is_transformed(config: Mapping[str, Any], name: str) -> bool:
    """Whether the number of the layer is among those of ``layers_to_transform``."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    anywhere = r".*?\." if config.get("layers_pattern") is None else r"(?:^|.*?\.)"
    for pattern in patterns:
        found = re.match(rf"{anywhere}{pattern}\.(?P<index>\d+)\.", name)
        if found:
            return int(found["index"]) in ([layers] if isinstance(layers, int) else layers)
    return False


def alpha_of(scale: int | float, rank: int | float) -> int | float:
    """The numerator of a scale, a whole number where that gives the same in float32."""
    alpha = float(scale) * rank
    whole = round(alpha)
    same = abs(whole - alpha) <= 4 * np.finfo(np.float32).eps * abs(alpha)
    return whole if same else alpha


def patterns_of(
    values: Mapping[str, int | float],
) -> tuple[int | float, dict[str, int | float]]:
    """The most frequent value, and a pattern for each module that has another.

    A pattern is a whole name, so that no two fit one module: PEFT takes the first that
    fits, in an order that is lost when the file is written.
    """
    (usual, _), *_ = collections.Counter(values.values()).most_common(1)
    others = {f"^{re.escape(k)}": v for k, v in values.items() if v != usual}
    return usual, others


def one_value(what: str, values: Iterable[Any], fix: str) -> Any:
    """The one value that all have, for which PEFT has one setting."""
    different = sorted(set(values))
    if len(different) > 1:
        raise ValueError(
            f"PEFT has one {what} for all modules, here are {different}: {fix}"
        )
    return different[0] if different else None


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Write the config, sorted as PEFT does."""
    path = directory / CONFIG_FILE
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ...._sites import Axes, find_sites
from ...kinds.around import Biased
from ...kinds.full import FullCopy
from ...protocol import Adapter, Adapters
from .._config import is_targeted, read_config
from .._names import Module, Rename, expert_keys, find_modules
from .._stacks import as_adapters
from .._tensors import Tensors, open_tensors
from ..methods import FORMATS, PREFIX, TENSOR_FILE, Format, expert_shapes_fit, misfit
from ._stored import as_matrix, base_bias
from ._tokens import SUFFIX, read_rows


def load_peft(
    directory: str | Path,
    model: PyTree,
    *,
    rename: Rename | None = None,
    axes: Axes | None = None,
) -> Adapters:
    """Read adapters that PEFT wrote, or :func:`save_peft`.

    The names of the tensors say where they belong: ``model.layers.0.self_attn.q_proj`` is
    the layer ``.model.layers[0].self_attn.q_proj``. Layers that the model stacks are
    stacked; of different ranks, they are filled up with zeros under a mask. Arrays keep the
    dtype of the file. Neither PEFT nor torch is needed, and nothing of the file is
    executed.

    What PEFT leaves out without a word is an error here: tensors of modules that the model
    does not have or the config does not target, targeted modules without tensors. A config
    whose init took a part off the base, ``"pissa"`` or ``"olora"``, gives a residual
    adapter on the base as it is, as PEFT does by decomposing it again; where that needs
    data it is refused.

    Args:
        directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: the base model, or its tree of parameters.
        rename: the name of the module from the path of a layer, or of an array without a
            last ``weight``, ``kernel`` or ``embedding``. ``{}`` in it stands for each
            number of a stack, ``"model.layers.{}.mlp.up_proj"``; a list names all.
        axes: which axes of an array are the matrix, as for :func:`lrjax.adapt`.

    Returns:
        ``Adapters`` to bind, train, merge and save.

    Raises:
        FileNotFoundError: if the files are not there.
        ValueError: if a file is broken, does not fit the model, or is of a kind that is not
            known here.

    Example:
        >>> import equinox as eqx, jax, lrjax, tempfile
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.DoRA(rank=2), key=jax.random.key(1))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     lrjax.save_peft(directory, model, adapters)
        ...     same = lrjax.load_peft(directory, model)
        >>> eqx.tree_equal(lrjax.merge(model, same), lrjax.merge(model, adapters))
        Array(True, dtype=bool)
    """
    directory = Path(directory)
    every = [name for form in FORMATS for name in form.settings]
    config = read_config(directory, every)
    form = _format_of(config)
    sites = find_sites(model, axes)
    modules, nameless = find_modules(sites.values(), rename)
    with open_tensors(_tensor_file(directory)) as file:
        keys = _sorted_keys(file, form, modules, nameless, config)
        _check_targets(config, keys, modules)
        _check_tables(file, keys, modules)
        low = {
            name: _read(file, form, modules, name, own, config)
            for name, own in keys.adapters.items()
        }
        rows = {
            name: read_rows(modules[name], file.read(key), config)
            for name, key in keys.tokens.items()
        }
        pools = form.read_pools(file, [modules[name] for name in low], low, config)
        biases = {name: file.read(key) for name, key in keys.biases.items()}
        whole = {
            name: _read_whole(file, modules[name], own, modules)
            for name, own in keys.whole.items()
        }
    for name, bias in biases.items():
        _put_bias(modules, name, bias, low, whole)
    return as_adapters(low | whole | rows, modules, pools)


_BESIDE = {"base_layer.bias": "biases", "base_layer.weight": "tables", SUFFIX: "tokens"}


@dataclasses.dataclass
class _Keys:
    """The names of the tensors, by module and by what they are."""

    adapters: dict[str, dict[str, str]]
    whole: dict[str, dict[str, str]]
    biases: dict[str, str]
    tables: dict[str, str]
    tokens: dict[str, str]


def _format_of(config: Mapping[str, Any]) -> Format:
    for form in FORMATS:
        if form.name == config["peft_type"]:
            return form
    raise ValueError(
        f"peft_type {config['peft_type']!r} is not read; {[f.name for f in FORMATS]} are."
    )


def _tensor_file(directory: Path) -> Path:
    path = directory / TENSOR_FILE
    if path.is_file():
        return path
    pickled = directory / "adapter_model.bin"
    if pickled.is_file():
        raise ValueError(
            f"{pickled} is a pickle, which can run any code as it is read, so it is not. "
            "Have whoever made it save it again with PEFT, as safetensors."
        )
    raise FileNotFoundError(f"There is no {TENSOR_FILE} in {directory}.")


def _sorted_keys(
    file: Tensors,
    form: Format,
    modules: dict[str, Module],
    nameless: list[str],
    config: Mapping[str, Any],
) -> _Keys:
    """What belongs where.

    Raises:
        ValueError: if anything belongs nowhere.
    """
    keys, unknown = _Keys({}, {}, {}, {}, {}), []
    owners = {
        key: (m.name, role) for m in modules.values() for key, role in m.parameters.items()
    }
    bare = {name.removeprefix(PREFIX): name for name in file.shapes}
    places = _expert_places(file, form, bare, modules, config)
    for key, name in bare.items():
        if key.rpartition(".")[2] in form.shared:  # or a copy that PEFT wrote of it
            continue
        module, suffix = _taken_apart(key, form.suffixes)
        module = places.get(module, module)
        if suffix and module in modules:
            keys.adapters.setdefault(module, {})[suffix] = name
        elif (beside := _taken_apart(key, tuple(_BESIDE)))[1] and beside[0] in modules:
            getattr(keys, _BESIDE[beside[1]])[beside[0]] = name
        elif key in owners:
            owner, role = owners[key]
            keys.whole.setdefault(owner, {})[role] = name
        else:
            unknown.append(name)
    if unknown:
        stacks = (
            f" Stacks without names, for want of rename=: {nameless}." if nameless else ""
        )
        raise ValueError(
            f"{file.path} has {len(unknown)} tensors that belong to nothing in the model, "
            f"or not as {form.name}; PEFT would leave them out: {sorted(unknown)[:8]}. The "
            f"model has {sorted(modules)[:20]}; rename= tells what its layers are called "
            f"there.{stacks}"
        )
    more = keys.whole | keys.tokens
    if both := sorted(keys.adapters.keys() & more.keys()):
        raise ValueError(f"{file.path} has an adapter and a whole weight for {both}.")
    if not keys.adapters:
        raise ValueError(f"{file.path} has no tensors of {form.name}.")
    return keys


def _taken_apart(key: str, suffixes: tuple[str, ...]) -> tuple[str, str]:
    for suffix in suffixes:
        if key.endswith(f".{suffix}"):
            return key.removesuffix(f".{suffix}"), suffix
    return key, ""


def _expert_places(
    file: Tensors,
    form: Format,
    bare: dict[str, str],
    modules: dict[str, Module],
    config: Mapping[str, Any],
) -> dict[str, str]:
    """The names of the parameters of experts, by where their tensors are."""
    if not config.get("target_parameters"):
        return {}
    parameters = [m for m in modules.values() if m.experts and is_targeted(config, m)]
    shapes = lambda place: {
        suffix: file.shapes[bare[f"{place}.{suffix}"]]
        for suffix in form.suffixes
        if f"{place}.{suffix}" in bare
    }
    fits = lambda module, place: expert_shapes_fit(module, shapes(place))
    return {place: name for name, place in expert_keys(parameters, fits).items()}


def _check_targets(
    config: Mapping[str, Any], keys: _Keys, modules: dict[str, Module]
) -> None:
    """Refuse a config and tensors that do not speak of the same modules."""
    there = {n for n in keys.adapters if is_targeted(config, modules[n]) is False}
    if there:
        raise ValueError(
            f"The file has tensors of {sorted(there)}, which target_modules="
            f"{config.get('target_modules')!r} of its config do not take (see also "
            "exclude_modules and layers_to_transform): PEFT would leave them out."
        )
    missing = {
        name
        for name, module in modules.items()
        if name not in keys.adapters
        and module.site.kind != "vector"
        and "bias" not in name.rpartition(".")[2]
        and is_targeted(config, module)
    }
    if missing:
        raise ValueError(
            f"The config targets {sorted(missing)}, and the file has no tensors of them: "
            "it was cut, or rename= gives layers the names of others."
        )


def _check_tables(file: Tensors, keys: _Keys, modules: dict[str, Module]) -> None:
    """Refuse another base embedding than the model has; PEFT writes it beside LoRA."""
    for name, key in keys.tables.items():
        module, stored = modules[name], file.read(key)
        have = module.matrix().astype(np.float32)
        want = as_matrix(module, stored).astype(np.float32)
        close = 2.0**-7 if stored.dtype.itemsize < 4 else 1e-6
        if have.shape != want.shape or not np.allclose(have, want, rtol=close, atol=1e-6):
            raise ValueError(
                f"{key!r} is another base weight than the model has at "
                f"{module.site.path!r}: put it into the model first (its vocabulary was "
                "resized, or it was trained), the adapter belongs to it."
            )


def _read(
    file: Tensors,
    form: Format,
    modules: dict[str, Module],
    name: str,
    keys: dict[str, str],
    config: Mapping[str, Any],
) -> Adapter:
    module = modules[name]
    form.check(module)
    module.site.check()
    tensors = {suffix: file.read(key) for suffix, key in keys.items()}
    shift = tensors.pop("lora_B.bias", None)
    adapter: Any = form.read(module, tensors, config)
    if shift is None:
        return adapter
    base = base_bias(module, modules)
    change = np.asarray(adapter.scale) * shift
    own = jnp.asarray(change if base is None else base + change)
    return Biased(own=own, inner=adapter)


def _read_whole(
    file: Tensors, module: Module, keys: dict[str, str], modules: dict[str, Module]
) -> FullCopy:
    """A whole weight and bias, that of the model for one which is not in the file."""
    bias = file.read(keys["bias"]) if "bias" in keys else None
    if bias is None and module.site.bias is not None:
        bias = base_bias(module, modules)
    if "weight" in keys:
        stored = file.read(keys["weight"])
        matrix = as_matrix(module, stored)
        lead = module.site.stack[len(module.index) :]
        if matrix.shape != (*lead, *module.site.shape):
            raise misfit(module, {"weight": stored})
    else:
        matrix = module.matrix()
    return FullCopy(jnp.asarray(matrix), None if bias is None else jnp.asarray(bias))


def _put_bias(
    modules: dict[str, Module],
    name: str,
    bias: np.ndarray,
    low: dict[str, Adapter],
    whole: dict[str, FullCopy],
) -> None:
    """A trained bias beside the adapter, or in place of an array of its own."""
    module, beside = modules[name], modules.get(f"{name}.bias")
    if module.site.bias is None and beside is not None:
        whole[beside.name] = FullCopy(jnp.asarray(bias)[:, None], None)
    elif name not in low:
        raise ValueError(f"The file has a bias for {name!r}, and no adapter.")
    elif base_bias(module, modules) is None:
        raise ValueError(f"The file has a bias for {name!r}, and the model has none there.")
    else:
        low[name] = Biased(own=jnp.asarray(bias), inner=low[name])

"""Files of kohya-ss/sd-scripts: LoRA of diffusion models, one file for several of them."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import PyTree

from ..._sites import Axes, find_sites
from ..protocol import Adapters
from ._factors import factors_by_module
from ._names import Rename, find_modules
from ._stacks import as_adapters
from ._tensors import open_tensors, write_tensors
from .methods import Names, as_factors, check_convolution, pair_as_stored, read_pair


_NAMES = Names(("lora_down.weight", "lora_up.weight"), ("", ""))


def save_kohya(
    path: str | os.PathLike[str],
    model: PyTree,
    adapters: Adapters,
    *,
    prefix: str = "lora_unet",
    rename: Rename | None = None,
) -> None:
    """Write adapters in the format of kohya's scripts, which web interfaces read.

    One safetensors file with ``<prefix>_<module>`` and ``.lora_down.weight`` (A),
    ``.lora_up.weight`` (B) and ``.alpha``, the scale times the rank; dots in the name of a
    module are underscores.

    Args:
        path: of the file.
        model: what :func:`lrjax.adapt` saw.
        adapters: whose change is a product of factors, all of them.
        prefix: which part of a pipeline the model is: ``"lora_unet"``, ``"lora_te"``.
        rename: the name of the module, with dots, from the path, as for
            :func:`lrjax.save_peft`.

    Raises:
        ValueError: for adapters that are no such product, embeddings, and convolutions with
            groups or dilation.

    Example:
        >>> import equinox as eqx, jax, lrjax, os, tempfile
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.LoRA(rank=2), key=jax.random.key(1))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = os.path.join(directory, "style.safetensors")
        ...     lrjax.adapters.save_kohya(path, model, adapters)
        ...     same = lrjax.adapters.load_kohya(path, model)
        >>> eqx.tree_equal(same, adapters)
        Array(True, dtype=bool)
    """
    found = factors_by_module("A file of kohya", model, adapters, rename)
    tensors = {}
    for name, (module, (left, right, scale)) in found.items():
        if module.is_embedding:
            raise ValueError(f"kohya's format has no embeddings, and {name!r} is one.")
        check_convolution(module)
        key = _key(prefix, name)
        pair = pair_as_stored(module, left, right, _NAMES)
        tensors |= {f"{key}.{suffix}": x for suffix, x in pair.items()}
        tensors[f"{key}.alpha"] = np.asarray(scale * left.shape[1], np.float32)
    write_tensors(Path(path), tensors)


def load_kohya(
    path: str | os.PathLike[str],
    model: PyTree,
    *,
    prefix: str = "lora_unet",
    rename: Rename | None = None,
    axes: Axes | None = None,
) -> Adapters:
    """Read adapters of one model from a file of kohya's scripts.

    Args:
        path: of the file.
        model: the base model.
        prefix: which part of the file is of this model; other parts are left alone.
        rename: the name of the module, with dots, from the path.
        axes: which axes of an array are the matrix, as for :func:`lrjax.adapt`.

    Returns:
        ``Adapters``; without an alpha in the file the scale is one.

    Raises:
        ValueError: if the file is broken, has nothing of this prefix, or has tensors of it
            that belong to no module, or do not fit.

    Example:
        >>> import lrjax
        >>> def style(path, unet):
        ...     return lrjax.merge(unet, lrjax.adapters.load_kohya(path, unet))
    """
    modules, _ = find_modules(find_sites(model, axes).values(), rename)
    keys: dict[str, str] = {}
    for name in modules:
        if (other := keys.setdefault(_key(prefix, name), name)) != name:
            raise ValueError(f"{name!r} and {other!r} are the same with underscores.")
    with open_tensors(Path(path)) as file:
        own = [name for name in file.shapes if name.startswith(f"{prefix}_")]
        groups: dict[str, dict[str, str]] = {}
        for name in own:
            key, _, suffix = name.partition(".")
            groups.setdefault(key, {})[suffix] = name
        known = {*_NAMES.linear, "alpha"}
        strange = [k for k, group in groups.items() if k not in keys or set(group) - known]
        if strange or not own:
            parts = sorted({name.partition(".")[0] for name in file.shapes})
            raise ValueError(
                f"{path} has tensors of {sorted(strange)[:8] or 'no module'} for "
                f"prefix={prefix!r} that are no LoRA of a module of the model; it has "
                f"{parts[:8]}. rename= tells what the model's layers are called there."
            )
        adapters = {}
        for key, group in groups.items():
            module = modules[keys[key]]
            check_convolution(module)
            tensors = {suffix: file.read(name) for suffix, name in group.items()}
            alpha = tensors.pop("alpha", None)
            pair = read_pair(module, tensors, _NAMES)
            scale = 1.0 if alpha is None else float(alpha.reshape(())) / pair.rank
            adapters[module.name] = as_factors(pair, scale)
    return as_adapters(adapters, modules, {})


def _key(prefix: str, name: str) -> str:
    return f"{prefix}_{name.replace('.', '_')}"

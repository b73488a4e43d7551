"""LoRA adapters of llama.cpp: GGUF files of factors under its names of tensors."""

import collections
import os
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..._extras import load
from ..._sites import Axes, find_sites
from ...lowrank import LowRank
from ..kinds.factors import Factors
from ..protocol import Adapters
from ._factors import factors_by_module
from ._names import Module, Rename, find_modules
from ._stacks import as_adapters
from .methods import as_factors, misfit


_NATIVE = re.compile(r"blk\.\d+\..*|token_embd|output")


def save_gguf_lora(
    path: str | os.PathLike[str],
    model: PyTree,
    adapters: Adapters,
    *,
    architecture: str,
    heads: tuple[int, int] | None = None,
    rename: Rename | None = None,
) -> None:
    """Write adapters as llama.cpp reads them, ``llama-cli --lora``.

    ``<tensor>.lora_a (r, in)`` and ``<tensor>.lora_b (out, r)``, and one
    ``adapter.lora.alpha`` for all: what a scale is more or less than ``alpha / r`` goes
    into B.

    Args:
        path: of the file.
        model: what :func:`lrjax.adapt` saw.
        adapters: whose change is a product of factors, all of them.
        architecture: ``general.architecture`` of the base's GGUF file, ``"llama"`` say.
        heads: of queries and of keys. GGUF files of the llama architecture keep the rows of
            both in another order, so B needs the same; give it for others that do so, too.
        rename: the name that the layer has in Hugging Face's model, or in GGUF (then
            nothing is reordered), from the path.

    Raises:
        ImportError: without the package ``gguf``, which ``lrjax[peft]`` brings.
        ValueError: for adapters that are no such product, convolutions, layers without a
            tensor in GGUF, or if ``heads`` is needed.

    Example:
        >>> import lrjax
        >>> def export(model, adapters):
        ...     lrjax.adapters.save_gguf_lora(
        ...         "style.gguf", model, adapters, architecture="llama", heads=(9, 3))
    """
    package = load("gguf", "peft", "Writing GGUF files")
    found = factors_by_module("A LoRA of llama.cpp", model, adapters, rename)
    names = _gguf_names(package, architecture, list(found))
    alphas = [s * left.shape[1] for _, (left, _, s) in found.values()]
    (alpha, _), *_ = collections.Counter(alphas).most_common(1)
    alpha = alpha or 1.0
    writer = package.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, (module, (left, right, scale)) in found.items():
        if module.kernel or name not in names:
            raise ValueError(
                f"{name!r} has no counterpart in GGUF's {architecture!r} for a LoRA: leave "
                "it out, or rename= tells it wrongly."
            )
        gain = np.float32(scale * left.shape[1] / alpha)
        left = left if gain == 1 else gain * left
        a, b = right.T, left
        if module.is_embedding:  # looked up by rows
            a, b = (left, right) if module.is_transposed else (right, left)
        elif (count := _reordered(architecture, name, names[name], heads)) is not None:
            b = b.reshape(count, 2, -1, b.shape[-1]).swapaxes(1, 2).reshape(b.shape)
        for suffix, x in (("lora_a", a), ("lora_b", b)):
            writer.add_tensor(f"{names[name]}.weight.{suffix}", _plain(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_gguf_lora(
    path: str | os.PathLike[str],
    model: PyTree,
    *,
    heads: tuple[int, int] | None = None,
    rename: Rename | None = None,
    axes: Axes | None = None,
) -> Adapters:
    """Read a LoRA adapter of llama.cpp.

    Args:
        path: of the file.
        model: the base model.
        heads: of queries and of keys, where the model has their rows in the order of
            Hugging Face and the file is of the llama architecture.
        rename: the name that the layer has in Hugging Face's model, or in GGUF, from the
            path.
        axes: which axes of an array are the matrix, as for :func:`lrjax.adapt`.

    Returns:
        ``Adapters`` with the scale ``alpha / r``.

    Raises:
        ImportError: without the package ``gguf``, which ``lrjax[peft]`` brings.
        ValueError: if the file is no such adapter, has tensors that belong to no layer or
            do not fit, or if ``heads`` is needed.

    Example:
        >>> import lrjax
        >>> def tuned(path, model):
        ...     adapters = lrjax.adapters.load_gguf_lora(path, model, heads=(9, 3))
        ...     return lrjax.merge(model, adapters)
    """
    package = load("gguf", "peft", "Reading GGUF files")
    try:
        reader = package.GGUFReader(path)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no whole GGUF file: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if (fields.get("general.type"), fields.get("adapter.type")) != ("adapter", "lora"):
        raise ValueError(f"{path} is no LoRA adapter: read_gguf reads weights of models.")
    architecture, alpha = fields["general.architecture"], fields["adapter.lora.alpha"]
    modules, _ = find_modules(find_sites(model, axes).values(), rename)
    names = _gguf_names(package, architecture, list(modules))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    adapters = {}
    for name, own in names.items():
        both = [tensors.pop(f"{own}.weight.{part}", None) for part in ("lora_a", "lora_b")]
        if both == [None, None]:
            continue
        if None in both:
            raise ValueError(f"{path} has one factor alone for {own!r}.")
        a, b = (_array(package, tensor) for tensor in both)
        module = modules[name]
        if module.is_embedding:
            left, right = (a, b) if module.is_transposed else (b, a)
        else:
            left, right = b, a.T
            count = _reordered(architecture, name, own, heads)
            if count is not None:
                left = left.reshape(count, -1, 2, left.shape[-1]).swapaxes(1, 2)
                left = left.reshape(b.shape)
        adapters[name] = _adapter(module, left, right, alpha)
    if tensors:
        raise ValueError(
            f"{path} has tensors that belong to nothing in the model: "
            f"{sorted(tensors)[:8]}; rename= tells what its layers are called."
        )
    return as_adapters(adapters, modules, {})


def _gguf_names(package: Any, architecture: str, names: list[str]) -> dict[str, str]:
    """What GGUF calls modules, by the name in Hugging Face's model or its own."""
    known = {name: key for key, name in package.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ValueError(
            f"GGUF has no architecture {architecture!r}; {sorted(known)[:20]}…"
        )
    blocks = [int(number) for name in names for number in re.findall(r"\.(\d+)\.", name)]
    mapping = package.get_tensor_name_map(known[architecture], max(blocks, default=0) + 1)
    found = {}
    for name in names:
        own = name if _NATIVE.fullmatch(name) else mapping.get_name(name)
        if own is not None:
            found[name] = own
    return found


def _reordered(
    architecture: str, name: str, own: str, heads: tuple[int, int] | None
) -> int | None:
    """The number of heads whose rows GGUF keeps in another order than the model."""
    part = own.rpartition(".")[2]
    if part not in ("attn_q", "attn_k") or _NATIVE.fullmatch(name):
        return None
    if heads is None and architecture == "llama":
        raise ValueError(
            f"GGUF files of the llama architecture keep the rows of {name!r} in another "
            "order: pass heads=(of queries, of keys). If the model has them in the order "
            "of GGUF, use its names, as 'blk.0.attn_q' (rename=)."
        )
    return None if heads is None else heads[part == "attn_k"]


def _plain(x: np.ndarray) -> np.ndarray:
    """In a dtype that GGUF's writer knows."""
    return np.ascontiguousarray(x if x.dtype == np.float16 else x.astype(np.float32))


def _array(package: Any, tensor: Any) -> np.ndarray:
    shape = tuple(reversed(tensor.shape.tolist()))
    if tensor.tensor_type.name in ("F16", "F32"):
        return np.array(tensor.data).reshape(shape)
    return package.dequantize(tensor.data, tensor.tensor_type).reshape(shape)


def _adapter(module: Module, left: np.ndarray, right: np.ndarray, alpha: float) -> Factors:
    (m, n), rank = module.site.shape, left.shape[-1]
    if (left.shape, right.shape) != ((m, rank), (n, rank)) or not rank or module.kernel:
        raise misfit(module, {"lora_b": left, "lora_a": right.T})
    return as_factors(LowRank(jnp.asarray(left), jnp.asarray(right)), alpha / rank)

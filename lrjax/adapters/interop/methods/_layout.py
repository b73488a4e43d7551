"""How torch lays out the two factors of a change, for each class of layers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ....lowrank import LowRank
from .._names import Module
from ._format import misfit


class Names(NamedTuple):
    """The suffixes of A and B, and those of an embedding."""

    linear: tuple[str, str]
    embedding: tuple[str, str]


def pair_as_stored(
    module: Module, left: np.ndarray, right: np.ndarray, names: Names
) -> dict[str, Any]:
    """The factors ``(out, r)`` and ``(in, r)`` as tensors, by suffix."""
    if module.experts:
        experts, _, rank = left.shape
        a = np.swapaxes(right, 1, 2).reshape(experts * rank, -1)
        b = np.moveaxis(left, 0, 2).reshape(-1, rank * experts)  # experts run fastest
        return dict(zip(names.linear, (a, b), strict=True))
    if module.is_embedding:
        pair = (left.T, right) if module.is_transposed else (right.T, left)
        return dict(zip(names.embedding, pair, strict=True))
    a, b, kernel = right.T, left, module.kernel
    if kernel:
        a, b = a.reshape(-1, *kernel), b.reshape(*b.shape, *(1,) * (len(kernel) - 1))
    return dict(zip(names.linear, (a, b), strict=True))


def read_pair(module: Module, tensors: Mapping[str, np.ndarray], names: Names) -> LowRank:
    """The factors of one module, their shapes checked against it."""
    is_table = names.embedding[0] in tensors
    both = names.embedding if is_table else names.linear
    if any(name not in tensors for name in both):
        raise ValueError(
            f"The file has {sorted(tensors)} for {module.name!r}, not both of {both}."
        )
    a, b = (tensors[name] for name in both)
    (m, n), kernel = module.site.shape, module.kernel
    if module.experts:
        left, right = _expert_pair(module, a, b)
    elif is_table and module.is_transposed:
        left, right = a.T, b
    else:
        left, right = b.reshape(len(b), -1), a.reshape(len(a), -1).T
    fits = left.shape[-2:] == (m, right.shape[-1]) and right.shape[-2] == n
    if not fits or not left.size or (a.ndim > 2 and a.shape[1:] != kernel):
        raise misfit(module, tensors)
    return LowRank(jnp.asarray(left), jnp.asarray(right))


def _expert_pair(module: Module, a: np.ndarray, b: np.ndarray):
    """``A (experts · r, in)`` and ``B (out, r · experts)``, or the other way about.

    A is along the inputs of a parameter that says it is transposed, and along the last
    axis of another one.
    """
    experts = module.experts
    assert experts is not None  # the caller
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or len(a) % experts:
        raise misfit(module, {"A": a, "B": b})
    right = np.swapaxes(a.reshape(experts, -1, a.shape[1]), 1, 2)
    left = np.moveaxis(b.reshape(len(b), -1, experts), 2, 0)
    same = (left.shape[1], right.shape[1]) == module.site.shape
    return (left, right) if same else (right, left)


def check_convolution(module: Module) -> None:
    """Refuse convolutions that PEFT adapts otherwise, or not at all."""
    if module.site.kind != "conv":
        return
    layer = module.site.layer
    if layer.groups > 1 or any(np.ravel(layer.dilation) != 1):
        raise ValueError(
            f"{module.site.path!r} is a convolution of groups={layer.groups}, "
            f"dilation={layer.dilation}: in PEFT an adapter of a grouped one mixes the "
            "groups, and one of a dilated one does not run. Merge it with lrjax.merge."
        )

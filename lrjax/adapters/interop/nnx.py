"""Models of Flax NNX: ``nnx.LoRA`` around their linear layers, and back."""

from types import ModuleType
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from ..._extras import load
from ...lowrank import LowRank
from ...transforms import Pair, pairs_by_name
from ..kinds import Factors
from ..protocol import Adapters
from ._factors import factors_by_path


def pairs(path: str) -> Pair | None:
    """The rule for :func:`lrjax.on_pairs` that finds the factors of ``nnx.LoRA``.

    ``W (in, out)`` has the change ``lora_a @ lora_b``: the left factor is ``lora_bᵀ (out,
    r)``, the right one ``lora_a (in, r)``. The names of qwix end alike.

    Args:
        path: of a leaf of ``nnx.state(model, nnx.LoRAParam)``.

    Example:
        >>> import lrjax, optax
        >>> lrjax.adapters.nnx.pairs("layer.lora_a")
        Pair(name='layer.*', side='right', transpose=False)
        >>> tx = lrjax.on_pairs(lrjax.scaled_adamw(1e-3), lrjax.adapters.nnx.pairs)
    """
    return _PAIRS(path)


_PAIRS = pairs_by_name("lora_b", "lora_a", transpose_left=True, transpose_right=False)


def pack(model: Any, adapters: Adapters) -> Any:
    """A model with ``nnx.LoRA`` around every adapted ``nnx.Linear``.

    ``x W + (x A) B`` with ``A = right (in, r)`` and ``B = s · leftᵀ (r, out)``: the scale,
    which ``nnx.LoRA`` has not, goes into B, and dropout, which it has not either, is left
    behind. The factors are ``nnx.LoRAParam``, to be trained by ``nnx.DiffState`` and an
    optimizer of ``nnx``, with :func:`lrjax.adapters.nnx.pairs` by those of lrjax.

    Args:
        model: an NNX module; it is not changed.
        adapters: from ``lrjax.adapt(nnx.state(model, nnx.Param), …)``, for kernels of
            ``nnx.Linear``, whose change is a product of two factors.

    Returns:
        A copy of the model.

    Raises:
        ValueError: by path, for another layer, and for a change that is no such product.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> from flax import nnx
        >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> params = nnx.state(model, nnx.Param)
        >>> adapters = lrjax.adapt(params, lrjax.LoRA(2), key=jax.random.key(1))
        >>> adapted = lrjax.adapters.nnx.pack(model, adapters)
        >>> adapted.lora_a.shape, adapted.lora_b.shape
        ((4, 2), (2, 3))
        >>> base, same = lrjax.adapters.nnx.unpack(adapted)
        >>> same["kernel"].pair.shape
        (3, 4)
    """
    nnx = _nnx("lrjax.adapters.nnx.pack")
    params, model = nnx.state(model, nnx.Param), nnx.clone(model)
    modules = {_name(path): module for path, module in nnx.iter_modules(model)}
    found = factors_by_path("nnx.LoRA", params, adapters)
    for path, (_, pair, scale) in found.items():
        at, _, last = path.rpartition(".")
        linear = modules.get(at)
        if last != "kernel" or type(linear) is not nnx.Linear:
            raise ValueError(
                f"nnx.LoRA goes around an nnx.Linear, and {path} is {last or 'an array'} "
                f"of {type(linear).__name__}: leave it out of the adapters with where=, or "
                "use lrjax.materialize(nnx.state(model, nnx.Param), adapters)."
            )
        _check_single(path, pair.left)
        model = _put(model, at, _around(nnx, linear, pair, scale))
    return model


def unpack(model: Any) -> tuple[Any, Adapters]:
    """A model with ``nnx.LoRA`` taken apart into the plain one and adapters.

    Both ``nnx.LoRA(…, base_module=nnx.Linear(…))`` and ``nnx.LoRALinear`` are found. What
    they become can be merged, combined, served, and written for PEFT.

    Args:
        model: an NNX module; it is not changed.

    Returns:
        A copy of the model with ``nnx.Linear`` instead, and ``Adapters`` of its kernels,
        for ``nnx.state(model, nnx.Param)``, with the scale 1.

    Raises:
        ValueError: if there is none, and by path for one around another layer.

    Example:
        >>> import lrjax
        >>> from flax import nnx
        >>> layer = nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0))
        >>> plain, adapters = lrjax.adapters.nnx.unpack(layer)
        >>> merged = lrjax.merge(nnx.state(plain, nnx.Param), adapters)
        >>> merged["kernel"].shape
        (4, 3)
    """
    nnx = _nnx("lrjax.adapters.nnx.unpack")
    model, layers = nnx.clone(model), {}
    for path, module in list(nnx.iter_modules(model)):
        name = _name(path)
        if isinstance(module, nnx.LoRALinear):
            lora, linear = module.lora, _plain(nnx, module)
        elif isinstance(module, nnx.LoRA) and module.base_module is not None:
            lora, linear = module, module.base_module
        else:
            continue
        if type(linear) is not nnx.Linear:
            raise ValueError(
                f"The nnx.LoRA at {name or 'the root'} is around {type(linear).__name__}; "
                "only around nnx.Linear can it be taken apart."
            )
        _check_single(name, lora.lora_a[...])
        layers[f"{name}.kernel" if name else "kernel"] = Factors(
            LowRank(jnp.matrix_transpose(lora.lora_b[...]), lora.lora_a[...]),
            None,
            jnp.ones((), lora.lora_a[...].dtype),
            None,
            "both",
        )
        model = _put(model, name, linear)
    if not layers:
        raise ValueError(
            "There is no nnx.LoRA with a base_module and no nnx.LoRALinear in the model."
        )
    return model, Adapters(layers)


def _nnx(purpose: str) -> ModuleType:
    return load("flax.nnx", "nnx", purpose)


def _name(path: tuple) -> str:
    return ".".join(map(str, path))


def _check_single(path: str, factor: Array) -> None:
    if factor.ndim != 2:
        raise ValueError(
            f"{path or 'the root'} is a stack {factor.shape[:-2]} of layers, and nnx.LoRA "
            "is packed and unpacked for one: use lrjax.materialize(params, adapters)."
        )


def _around(nnx: ModuleType, linear: Any, pair: LowRank, scale: Any) -> Any:
    """``nnx.LoRA`` with these factors."""
    (m, n), dtype = pair.shape, pair.dtype
    lora = nnx.LoRA(
        n,
        pair.rank,
        m,
        base_module=linear,
        dtype=linear.dtype,
        param_dtype=dtype,
        rngs=nnx.Rngs(0),
    )
    lora.lora_a[...] = pair.right
    lora.lora_b[...] = (scale * jnp.matrix_transpose(pair.left)).astype(dtype)
    return lora


def _plain(nnx: ModuleType, layer: Any) -> Any:
    """The ``nnx.Linear`` that an ``nnx.LoRALinear`` is without its factors."""
    linear = nnx.Linear(
        layer.in_features,
        layer.out_features,
        use_bias=layer.use_bias,
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
        precision=layer.precision,
        promote_dtype=layer.promote_dtype,
        dot_general=layer.dot_general,
        rngs=nnx.Rngs(0),
    )
    linear.kernel, linear.bias = layer.kernel, layer.bias
    return linear


def _put(model: Any, path: str, layer: Any) -> Any:
    """The model with a layer at a path; the root is the layer itself."""
    if not path:
        return layer
    *parents, last = path.split(".")
    node = model
    for part in parents:
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    if last.isdigit():
        node[int(last)] = layer
    else:
        setattr(node, last, layer)
    return model

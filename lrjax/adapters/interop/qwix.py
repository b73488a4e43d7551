"""Parameters of models that qwix put LoRA into: factors beside the kernels, and back."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..._matrices import matrix_axes, named_leaves
from ..._sites import Axes, Site, find_sites
from ...lowrank import LowRank
from ..kinds import Factors
from ..protocol import Adapters
from ._factors import factors_by_path


_A, _B = "_lora_a", "_lora_b"


def unpack(
    params: PyTree, *, alpha: float, axes: Axes | None = None
) -> tuple[PyTree, Adapters]:
    """Parameters that ``qwix.apply_lora_to_model`` made, as plain ones and adapters.

    Beside a ``kernel`` stand ``kernel_lora_a`` and ``kernel_lora_b``; the layer has the
    change ``alpha / r · a b``. The factors of a product, of an einsum and of a convolution
    are laid out each in its own way, and all are read.

    Args:
        params: of Linen, or ``nnx.state(model, nnx.Param)``.
        alpha: that of the ``qwix.LoraRule``, which the parameters do not hold.
        axes: for kernels of more than two axes, :func:`lrjax.adapters.axes_of` of the model
            without LoRA.

    Returns:
        The parameters without those of LoRA, and ``Adapters`` for them.

    Raises:
        ValueError: if there are none, one of a pair is missing, or a shape does not fit.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> params = {"kernel": jnp.ones((4, 3)), "kernel_lora_a": jnp.ones((4, 2)),
        ...           "kernel_lora_b": jnp.ones((2, 3))}
        >>> plain, adapters = lrjax.adapters.qwix.unpack(params, alpha=1.0)
        >>> lrjax.merge(plain, adapters)["kernel"][0].tolist()
        [2.0, 2.0, 2.0]
    """
    leaves = dict(named_leaves(params)[0])
    found = {path.removesuffix(_A) for path in leaves if path.endswith(_A)}
    found |= {path.removesuffix(_B) for path in leaves if path.endswith(_B)}
    if not found:
        raise ValueError("There is no parameter whose name ends in _lora_a or _lora_b.")
    plain = _without_factors(params)
    sites, layers, told = find_sites(plain, axes), {}, []
    for path in sorted(found):
        missing = [p for p in (path, path + _A, path + _B) if p not in leaves]
        if missing:
            raise ValueError(f"qwix keeps {path} with its two factors; missing: {missing}.")
        site = sites[path]
        pair = _read(site, leaves[path + _A], leaves[path + _B])
        scale = jnp.full(site.stack, alpha / pair.rank, pair.dtype)
        layers[path] = Factors(pair, None, scale, None, "both")
        spec = getattr(site, "told", None)
        told += [(path, spec)] if spec is not None else []
    return plain, Adapters(layers, {}, tuple(told))


def pack(params: PyTree, adapters: Adapters, *, alpha: float) -> PyTree:
    """Adapters put into the parameters of a model that qwix put LoRA into.

    The model runs them as its own, thin, in Linen and NNX alike. Layers that no adapter is
    for change nothing; an adapter of a lower rank is filled up with zeros.

    Args:
        params: from ``qwix.apply_lora_to_model``, with the rank of its rule.
        adapters: for the parameters without LoRA, whose change is a product of factors.
        alpha: that of the ``qwix.LoraRule``.

    Returns:
        Parameters of the same structure.

    Raises:
        ValueError: by path, for an adapter where the model has no LoRA or a lower rank, or
            whose change is no product; where one factor of the model serves several
            matrices, as in a batched einsum.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> params = {"kernel": jnp.ones((4, 3)), "kernel_lora_a": jnp.ones((4, 2)),
        ...           "kernel_lora_b": jnp.ones((2, 3))}
        >>> plain, adapters = lrjax.adapters.qwix.unpack(params, alpha=8.0)
        >>> same = lrjax.adapters.qwix.pack(params, adapters, alpha=8.0)
        >>> same["kernel_lora_a"].tolist() == params["kernel_lora_a"].tolist()
        True
    """
    leaves, treedef = named_leaves(params)
    own = dict(leaves)
    new = {path: jnp.zeros_like(x) for path, x in leaves if path.endswith(_B)}
    found = factors_by_path("qwix", _without_factors(params), adapters)
    for path, (site, pair, scale) in found.items():
        if path + _A not in own or path + _B not in own:
            raise ValueError(
                f"qwix put no LoRA at {path}: widen module_path= of its rule, or leave the "
                "layer out of the adapters."
            )
        times = (scale * own[path + _A].shape[-1] / alpha)[..., None, None]
        pair = LowRank(times * pair.left, pair.right)
        like = own[path + _A], own[path + _B]
        new[path + _A], new[path + _B] = _written(site, pair, *like)
    return treedef.unflatten([new.get(path, x) for path, x in leaves])


def _without_factors(tree: PyTree) -> PyTree:
    """The tree without the leaves of LoRA; mappings keep their class."""
    like: Any = type(tree)
    if isinstance(tree, (list, tuple)):
        return like(map(_without_factors, tree))
    if not isinstance(tree, Mapping):
        return tree
    kept = {k: v for k, v in tree.items() if not str(k).endswith((_A, _B))}
    return like({k: _without_factors(v) for k, v in kept.items()})


def _layouts(site: Site) -> tuple[tuple[int, ...], tuple[int, ...], list[int]]:
    """The leading shape of a beside a product, and beside an einsum or convolution.

    And what brings the axes of the latter into the order (stack, inputs).
    """
    site.check()
    spec, shape = getattr(site, "spec", None), jnp.shape(site.layer)
    if spec is None or spec.blocks > 1:
        raise ValueError(f"{site.path} is no kernel that qwix puts LoRA beside.")
    batch, rows, cols = matrix_axes(len(shape), spec)
    apart = [axis for axis in range(len(shape)) if axis not in rows]
    order = [apart.index(axis) for axis in (*batch, *cols)]
    joined = (*site.stack, math.prod(shape[axis] for axis in cols))
    return joined, tuple(shape[axis] for axis in apart), order


def _read(site: Site, a: Array, b: Array) -> LowRank:
    joined, apart, order = _layouts(site)
    rank, (m, n), stack = a.shape[-1], site.shape, site.stack
    is_shared = b.shape != (*stack, rank, m)  # by the matrices of a batched einsum
    if a.shape[:-1] not in (joined, apart) or (is_shared and b.size != rank * m):
        raise ValueError(
            f"The factors {a.shape} and {b.shape} beside {site.path} of shape "
            f"{jnp.shape(site.layer)} do not fit it: {joined} or {apart}, and the rank, "
            "are those of the first. Are axes= those of this model?"
        )
    if a.shape[:-1] != joined:
        a = a.transpose(*order, a.ndim - 1)
    left = jnp.matrix_transpose(b.reshape(*(() if is_shared else stack), rank, m))
    left = jnp.broadcast_to(left, (*stack, m, rank))
    return LowRank(left, a.reshape(*stack, n, rank))


def _written(site: Site, pair: LowRank, a: Array, b: Array) -> tuple[Array, Array]:
    joined, apart, order = _layouts(site)
    rank, stack = a.shape[-1], site.stack
    if pair.rank > rank:
        raise ValueError(
            f"The adapter at {site.path} has the rank {pair.rank}, and qwix put LoRA of "
            f"rank {rank} there: apply its rule with rank={pair.rank}."
        )
    if stack and b.shape[: len(stack)] != stack:
        raise ValueError(
            f"The second factor of qwix at {site.path}, {b.shape}, is one for all matrices "
            f"of the stack {stack}, where adapters have one for each."
        )
    wide = [(0, 0)] * (pair.left.ndim - 1) + [(0, rank - pair.rank)]
    left, right = jnp.pad(pair.left, wide), jnp.pad(pair.right, wide)
    if a.shape[:-1] != joined:
        # The axes of the kernel, in the order that they have here, put back into its own.
        sizes = [apart[i] for i in order]
        right = right.reshape(*sizes, rank)
        right = right.transpose(
            *(order.index(i) for i in range(len(order))), right.ndim - 1
        )
    new_b = jnp.matrix_transpose(left).reshape(b.shape)
    return right.reshape(a.shape).astype(a.dtype), new_b.astype(b.dtype)

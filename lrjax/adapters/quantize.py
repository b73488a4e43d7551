import dataclasses
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from .._sites import (
    ArraySite,
    LinearSite,
    LookupSite,
    QuantizedArray,
    Site,
    Where,
    check_reweighted,
    dense_array,
    encoded,
    find_sites,
    flat_leaves,
    in_blocks,
    in_factors,
    is_quantized,
    pick,
    reweighted,
)


def _normal_float_levels() -> tuple[float, ...]:
    """Quantiles of the normal distribution: seven below zero, zero, eight above.

    Evenly spaced in probability, to ``1 − (1/32 + 1/30)/2`` from ``½``, and scaled to ±1.
    """
    end, quantile = 1 - (1 / 32 + 1 / 30) / 2, NormalDist().inv_cdf
    tail = lambda count: [
        quantile(0.5 + (end - 0.5) * k / count) / quantile(end) for k in range(1, count + 1)
    ]
    return (*(-x for x in reversed(tail(7))), 0.0, *tail(8))


_NORMAL_FLOATS = _normal_float_levels()
_BYTES = range(-127, 128)


@dataclasses.dataclass(frozen=True)
class Int8:
    """Eight bits a number, evenly spaced: ``scale · code`` with codes from −127 to 127.

    The scale of a block is its largest magnitude over 127, so a number is off by at most
    ``scale / 2``. In blocks of 64 a number takes 8.5 bits.

    Args:
        block: numbers of the last axis that share a scale.
        dtype: of the dequantized weight, in which the product is taken then; by default
            that of the weight.

    Raises:
        ValueError: for a block that is odd or not positive.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> weight = lrjax.adapters.Int8()(jnp.array([[1.0, -0.5, 0.25, 1e-4]]))
        >>> print(weight.dequantize().round(3))
        [[ 1.    -0.504  0.252  0.   ]]

    Reference:
        T. Dettmers, M. Lewis, S. Shleifer, L. Zettlemoyer, "8-bit optimizers via block-wise
        quantization" (2021), arXiv:2110.02861 (with evenly spaced levels).
    """

    block: int = 64
    dtype: DTypeLike | None = None

    def __post_init__(self):
        _check_block("Int8", self.block)

    def __call__(self, weight: Float[Array, "*b n"]) -> QuantizedArray:
        """The weight, quantized."""
        blocks = in_blocks(weight, self.block)
        return encoded(blocks, _BYTES, weight.shape[-1], self.dtype or weight.dtype)


@dataclasses.dataclass(frozen=True)
class NF4:
    """Four bits a number, at quantiles of the normal distribution: the base of QLoRA.

    ``scale · level[code]`` with sixteen levels in [−1, 1] that normal weights use equally
    often, and the largest magnitude of each block for its scale. The scales are quantized
    again: in blocks of 256 of one matrix, less their mean, at eight bits evenly spaced
    (QLoRA has 8-bit floats there). In blocks of 64 a number takes 4.13 bits, 4.5 without.

    Args:
        block: numbers of the last axis that share a scale.
        double: whether the scales are quantized.
        dtype: of the dequantized weight, in which the product is taken then; by default
            that of the weight.

    Raises:
        ValueError: for a block that is odd or not positive.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> weight = lrjax.adapters.NF4()(jnp.array([[1.0, -0.5, 0.25, 1e-4]]))
        >>> print(weight.dequantize().round(3))
        [[ 1.    -0.525  0.246  0.   ]]

    Reference:
        T. Dettmers, A. Pagnoni, A. Holtzman, L. Zettlemoyer, "QLoRA: efficient finetuning
        of quantized LLMs" (2023), arXiv:2305.14314.
    """

    block: int = 64
    double: bool = True
    dtype: DTypeLike | None = None

    def __post_init__(self):
        _check_block("NF4", self.block)

    def __call__(self, weight: Float[Array, "*b m n"]) -> QuantizedArray:
        """The weight, quantized."""
        blocks = in_blocks(weight, self.block, even=True)
        dtype = self.dtype or weight.dtype
        codes = encoded(blocks, _NORMAL_FLOATS, weight.shape[-1], dtype)
        if not self.double:
            return codes
        scale = dense_array(codes.scale)
        flat = scale.reshape(*scale.shape[:-2], -1)
        rows = in_blocks(flat, 256)
        mean = jnp.mean(rows, axis=-1)
        nested = encoded(rows, _BYTES, flat.shape[-1], scale.dtype, offset=mean)
        return eqx.tree_at(lambda w: w.scale, codes, nested)


def _check_block(name: str, block: int) -> None:
    if block < 2 or block % 2:
        raise ValueError(f"{name}'s block must be a positive even number, got {block!r}.")


def quantize(
    model: PyTree,
    format: Callable[[Float[Array, "*b m n"]], QuantizedArray],
    *,
    where: Where = None,
) -> PyTree:
    """The model with the weights of chosen layers quantized.

    The layers stay what they are, ``eqx.nn.Linear`` with a :class:`QuantizedArray` weight,
    and dequantize it when they are called: the model runs as it did, in a quarter or an
    eighth of the memory. Adapters of every kind go on top, as in QLoRA; no gradient reaches
    the quantized weights, and dense ones are not kept for the gradient.

    Weights of ``eqx.nn.Linear`` and ``Embedding`` and arrays of two axes or more are
    quantized, in blocks along their last axis, stacked layers as well; those of
    ``lrjax.nn`` stay as they are. An array that is no
    layer's has to be used by ``weight @ x`` or ``weight[i]``, or dequantized where it is
    used.

    Args:
        model: a module or a tree of parameters.
        format: ``lrjax.adapters.NF4()`` or ``Int8()``, or a function from a weight to a
            :class:`QuantizedArray`.
        where: as of :func:`lrjax.adapt`; by default every Linear but heads, embeddings and
            routers.

    Returns:
        A model of the same classes.

    Raises:
        ValueError: if nothing is picked, or what is picked is a convolution, a layer of an
            own class, inside ``eqx.nn.WeightNorm`` or ``SpectralNorm``, or quantized
            already.
        TypeError: if ``format`` is a class in place of an instance of it.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> model = eqx.nn.MLP(64, 3, 64, 2, key=jax.random.key(0))
        >>> small = lrjax.adapters.quantize(model, lrjax.adapters.NF4())
        >>> adapters = lrjax.adapt(small, lrjax.LoRA(rank=2), key=jax.random.key(1))
        >>> lrjax.bind(small, adapters)(jnp.ones(64)).shape
        (3,)

    Reference:
        T. Dettmers, A. Pagnoni, A. Holtzman, L. Zettlemoyer, "QLoRA: efficient finetuning
        of quantized LLMs" (2023), arXiv:2305.14314.
    """
    if isinstance(format, type):
        raise TypeError(
            f"quantize takes a format such as lrjax.adapters.NF4(), got the class "
            f"{format.__name__}: call it."
        )
    sites = find_sites(model).items()
    sites = {p: s for p, s in sites if s.kind != "vector" and not in_factors(s)}
    picked = pick(sites, where)
    check_reweighted(reweighted(model), picked)
    leaves, treedef = flat_leaves(model)
    return treedef.unflatten(
        [quantized_layer(picked[p], format) if p in picked else leaf for p, leaf in leaves]
    )


def quantized_layer(site: Site, format: Callable[[Array], QuantizedArray]) -> Any:
    """The layer, or array, of a site with its weight quantized."""
    site.check()
    if site.is_quantized:
        raise ValueError(f"{site.path or 'the root'} is quantized already.")
    if isinstance(site, ArraySite):
        return format(site.layer)
    if type(site) not in (LinearSite, LookupSite):
        raise ValueError(
            f"{site.path or 'the root'} is a {type(site.layer).__name__}: eqx.nn.Linear, "
            "eqx.nn.Embedding and plain arrays are quantized. Leave it out with where=."
        )
    return eqx.tree_at(lambda x: x.weight, site.layer, format(site.layer.weight))


def dequantize(model: PyTree) -> PyTree:
    """The model with dense weights in place of quantized ones.

    Args:
        model: a module or tree with :class:`QuantizedArray` weights, or those of a class
            known by :func:`register_quantized`.

    Returns:
        A model of the same classes; what is not quantized is left as it is.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> from lrjax.adapters import Int8, dequantize, quantize
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> small = quantize(model, Int8())
        >>> adapters = lrjax.adapt(small, lrjax.LoRA(rank=2), key=jax.random.key(1))
        >>> merged = lrjax.merge(dequantize(small), adapters)
        >>> jax.tree.structure(merged) == jax.tree.structure(model)
        True
    """
    return jax.tree.map(dense_array, model, is_leaf=is_quantized)

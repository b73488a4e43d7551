import itertools
from collections.abc import Callable
from typing import Any, Union

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from .._dense import frozen_dense


Levels = range | tuple[float, ...]


class QuantizedArray(eqx.Module):
    """A frozen weight at few bits a number, in blocks along its last axis.

    A number is ``levels[code] · scale + offset``, with one scale (and offset) for a block.
    It stands where the array stood: ``weight @ x`` and ``weight[i]`` dequantize when they
    are called, so ``eqx.nn.Linear`` and ``eqx.nn.Embedding`` run on it, stacked for
    ``lax.scan`` as well. The dense matrix is no residual of ``weight @ x``: the gradient
    dequantizes once more. No gradient reaches the weight.

    Attributes:
        codes: ``(*b, m, blocks, k)``; of at most sixteen levels two are in a byte,
            ``(*b, m, blocks, k/2)``, the first half of a block in the low bits, the second
            one in the high bits, as GGUF has them.
        scale: ``(*b, m, blocks)``, or these numbers in one row ``(*b, m·blocks)`` that is
            quantized itself.
        offset: ``(*b, m, blocks)``, or ``None`` for zero.
        levels: what the codes stand for, in their order.
        columns: the length of the last axis; what is beyond it in the last block is not
            used.
        dtype: of the dense numbers.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> layer = eqx.nn.Linear(64, 32, key=jax.random.key(0))
        >>> weight = lrjax.adapters.NF4()(layer.weight)
        >>> weight.shape, weight.codes.shape, weight.dequantize().shape
        ((32, 64), (32, 1, 32), (32, 64))
        >>> small = eqx.tree_at(lambda layer: layer.weight, layer, weight)
        >>> small(jax.numpy.ones(64)).shape
        (32,)
    """

    codes: UInt8[Array, "*b blocks k"]
    scale: Union[Float[Array, "*b blocks"], "QuantizedArray"]
    offset: Float[Array, "*b blocks"] | None
    levels: Levels = eqx.field(static=True)
    columns: int = eqx.field(static=True)
    dtype: DTypeLike = eqx.field(static=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the dense numbers."""
        return (*self.codes.shape[:-2], self.columns)

    @property
    def ndim(self) -> int:
        """The number of axes of the dense numbers."""
        return self.codes.ndim - 1

    def dequantize(self) -> Float[Array, "*b columns"]:
        """The dense numbers, through which no gradient flows."""
        codes = self.codes
        if len(self.levels) <= 16:
            codes = jnp.concatenate([codes & 15, codes >> 4], axis=-1)
        x = _decoded(codes, self.levels) * self._scales[..., None]
        if self.offset is not None:
            x = x + self.offset.astype(jnp.float32)[..., None]
        x = x.reshape(*x.shape[:-2], -1)[..., : self.columns]
        return lax.stop_gradient(x.astype(self.dtype))

    @property
    def _scales(self) -> Float[Array, "*b blocks"]:
        scale = dense_array(self.scale)
        return scale.astype(jnp.float32).reshape(self.codes.shape[:-1])

    def __matmul__(self, x: Float[Array, "columns ..."]) -> Float[Array, "..."]:
        # As x Wᵀ: XLA on CPU is slow on the gradient of the other order under vmap.
        y = _times(self, x if x.ndim == 1 else x.T)
        return y if x.ndim == 1 else y.T

    def __getitem__(self, index: Any) -> Array:
        offset = None if self.offset is None else self.offset[index]
        codes, scales = self.codes[index], self._scales[index]
        part = QuantizedArray(codes, scales, offset, self.levels, self.columns, self.dtype)
        return part.dequantize()


@jax.checkpoint
def _times(weight: QuantizedArray, x: Array) -> Array:
    return frozen_dense(x, weight.dequantize())


def _decoded(codes: UInt8[Array, "*b"], levels: Levels) -> Float[Array, "*b"]:
    if isinstance(levels, range):
        return codes.astype(jnp.float32) + levels.start
    table = jnp.asarray(levels, jnp.float32)
    return table.at[codes].get(mode="promise_in_bounds")


def encoded(
    blocks: Float[Array, "*b blocks k"],
    levels: Levels,
    columns: int,
    dtype: DTypeLike,
    *,
    offset: Float[Array, "*b blocks"] | None = None,
) -> QuantizedArray:
    """Numbers in blocks, each rounded to the nearest level.

    The scale takes the largest magnitude of a block to the largest level.
    """
    blocks = blocks.astype(jnp.float32)
    if offset is not None:
        blocks = blocks - offset[..., None]
    scale = jnp.max(jnp.abs(blocks), axis=-1) / levels[-1]
    unit = blocks / jnp.where(scale == 0, 1, scale)[..., None]
    codes = _nearest(unit, levels).astype(jnp.uint8)
    if len(levels) <= 16:
        first, second = jnp.split(codes, 2, axis=-1)
        codes = first | (second << 4)
    return QuantizedArray(codes, scale, offset, levels, columns, jnp.dtype(dtype))


def _nearest(x: Float[Array, "*b"], levels: Levels) -> Int[Array, "*b"]:
    if isinstance(levels, range):
        return jnp.clip(jnp.round(x) - levels.start, 0, len(levels) - 1).astype(int)
    middles = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
    return jnp.searchsorted(jnp.asarray(middles), x, method="compare_all")


def in_blocks(
    x: Float[Array, "*b n"], block: int, *, even: bool = False
) -> Float[Array, "*b blocks k"]:
    """The last axis in blocks, perhaps of even length; its last number fills up."""
    size = x.shape[-1]
    block = min(block, size + size % 2 if even else size)
    missing = [(0, 0)] * (x.ndim - 1) + [(0, -size % block)]
    return jnp.pad(x, missing, mode="edge").reshape(*x.shape[:-1], -1, block)


_REGISTERED: dict[type, Callable[[Any], Array]] = {
    QuantizedArray: QuantizedArray.dequantize
}


def register_quantized(cls: type, dequantize: Callable[[Any], Array]) -> None:
    """Teach the adapters a class of quantized arrays of another library.

    Arrays of this class are then weights like any other: in trees of parameters they are
    adapted as arrays, and :func:`lrjax.materialize` puts dense adapted ones in their place.

    Args:
        cls: a pytree node class with ``shape``, ``ndim`` and ``dtype`` of the dense array.
        dequantize: gives the dense array.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> class Rounded(eqx.Module):
        ...     codes: jax.Array
        ...     dtype = jnp.dtype("float32")
        ...     shape = property(lambda self: self.codes.shape)
        ...     ndim = property(lambda self: self.codes.ndim)
        >>> lrjax.adapters.register_quantized(Rounded, lambda x: x.codes / 100)
        >>> params = {"kernel": Rounded(jnp.full((4, 3), 50, jnp.int8))}
        >>> adapters = lrjax.adapt(params, lrjax.LoRA(2), key=jax.random.key(0))
        >>> lrjax.materialize(params, adapters)["kernel"][0].tolist()
        [0.5, 0.5, 0.5]
    """
    _REGISTERED[cls] = dequantize


def is_quantized(x: Any) -> bool:
    """Whether ``x`` is a quantized array, of this library or a registered class."""
    return type(x) in _REGISTERED


def holds_quantized(tree: Any) -> bool:
    """Whether there is a quantized array in a tree."""
    return any(map(is_quantized, jax.tree.leaves(tree, is_leaf=is_quantized)))


def dense_array(x: Any) -> Any:
    """The numbers of an array, quantized or not."""
    return _REGISTERED[type(x)](x) if is_quantized(x) else x

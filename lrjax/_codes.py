"""Moments at eight or four bits a number: geometric progressions, one scale a block."""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Integer, PyTree

from ._sharding import by_compiler, sharding_along, shards_of
from .linalg import working_dtype


class _Ladder(NamedTuple):
    """The magnitudes that codes stand for, in geometric progression.

    Every number so keeps the same relative precision, however small it is next to the
    largest of its block: an update is a ratio of moments, and large where both are small.

    Attributes:
        top: how many there are; the code of the largest.
        growth: the logarithm to base 2 of the ratio ``ρ`` of neighboring ones.
        has_zero: whether a code stands for zero besides.
    """

    top: int
    growth: float
    has_zero: bool = True


# By the bits of a number, and whether it has a sign.
_LADDERS = {
    (8, True): _Ladder(127, 5 * math.log2(10) / 127),  # five decades
    (8, False): _Ladder(255, 7 * math.log2(10) / 255),
    (4, True): _Ladder(7, 1.0),
    (4, False): _Ladder(16, 1.0, has_zero=False),
}


class BlockQuantized(NamedTuple):
    """Moments at eight bits a number, and the largest magnitude of each block.

    Blocks are runs along the longer one of the last two axes. A number is ``± scale ·
    ρ^(|code| − top)``, or zero where the code is: signed codes (``int8``) for first
    moments, unsigned ones (``uint8``) for second moments.

    Attributes:
        codes: in the shape of the moments.
        scale: the same shape, but for the blocks along their axis.
    """

    codes: Integer[Array, "*shape"]
    scale: Float[Array, "*blocks"]


class PackedQuantized(NamedTuple):
    """Moments at four bits a number; see :class:`BlockQuantized`.

    Seven magnitudes, a sign and zero (``int8``) for first moments, sixteen magnitudes and
    no zero (``uint8``) for second ones.

    Attributes:
        codes: in the shape of the moments, but for two neighbors to a byte along the last
            axis, the first one in the low bits.
        scale: the shape of the moments, but for the blocks along their axis.
    """

    codes: Integer[Array, "*packed"]
    scale: Float[Array, "*blocks"]


Bits = Literal[4, 8]
Quantized = BlockQuantized | PackedQuantized
KINDS: dict[Bits, type[Quantized]] = {8: BlockQuantized, 4: PackedQuantized}


def _block_axis(shape: tuple[int, ...]) -> int:
    return -2 if len(shape) > 1 and shape[-2] > shape[-1] else -1


def _spread(scale: Array, like: Array) -> Array:
    """The scale of the block of every number."""
    spread = functools.partial(_repeated, shape=like.shape)
    return by_compiler(spread, scale, out=sharding_along(like))


def _repeated(scale: Array, shape: tuple[int, ...]) -> Array:
    axis = len(shape) + _block_axis(shape)
    size, blocks = shape[axis], scale.shape[axis]
    length = -(-size // blocks)
    cut = (*scale.shape[: axis + 1], length, *scale.shape[axis + 1 :])
    wide = jnp.broadcast_to(jnp.expand_dims(scale, axis + 1), cut)
    wide = wide.reshape(*shape[:axis], blocks * length, *shape[axis + 1 :])
    return wide if blocks * length == size else lax.slice_in_dim(wide, 0, size, axis=axis)


def _scales(x: Array, blocks: int) -> Array:
    """The largest magnitude of each block."""
    axis = x.ndim + _block_axis(x.shape)
    whole = blocks % shards_of(x)[axis] == 0  # blocks that lie on one device each
    kept = tuple(k if k != axis or whole else None for k in range(x.ndim))
    largest = functools.partial(_largest, blocks=blocks)
    return by_compiler(largest, x, out=sharding_along(x, kept))


def _largest(x: Array, blocks: int) -> Array:
    axis = x.ndim + _block_axis(x.shape)
    length = -(-x.shape[axis] // blocks)
    missing = length * blocks - x.shape[axis]
    size = jnp.abs(x)
    if missing:
        size = jnp.pad(size, [(0, missing if a == axis else 0) for a in range(x.ndim)])
    cut = (*x.shape[:axis], blocks, length, *x.shape[axis + 1 :])
    return jnp.max(size.reshape(cut), axis=axis + 1)


def dither(step: Int[Array, ""], shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    """Numbers in [0, 1), evenly spread over the steps at each place of an array.

    An additive recurrence: over ``t`` steps their mean is off by ``O(log t / t)`` where
    that of independent ones is off by ``t^(−1/2)``, and they need neither key nor memory.
    Matrices of a stack share them.
    """
    place = jnp.zeros((), jnp.uint32)
    for axis in range(max(0, len(shape) - 2), len(shape)):
        place = place * shape[axis] + lax.broadcasted_iota(jnp.uint32, shape, axis)
    # Fractions of 2³²: the golden ratio over the steps, the plastic one over the places.
    turn = jnp.asarray(step).astype(jnp.uint32) * jnp.uint32(2654435769)
    mixed = place * jnp.uint32(3242174889) + turn
    return (mixed >> 8).astype(jnp.float32) * 2.0**-24


def quantize(
    x: Float[Array, "*shape"],
    *,
    signed: bool,
    block: int = 256,
    bits: Bits = 8,
    step: Int[Array, ""] | None = None,
) -> Quantized:
    """Store moments at eight or four bits a number.

    With a ``step`` a number goes to one of its two neighbors by ``dither``, so that
    the mean over the steps of what is stored is the number itself; rounded to the nearest
    an average with a decay near one would never move. Without, it goes to the nearest.

    Args:
        x: the moments, with at least one axis.
        signed: whether they have signs; else they are not negative.
        block: the largest length of a block.
        bits: eight, or four for two numbers to a byte.
        step: the number of the step.

    Returns:
        The codes. Their error is at most ``ρ − 1`` of a number (half of that without a
        step): 9.5 % for signed ones above ``10⁻⁵`` of their block's largest, 6.6 % for
        others above ``10⁻⁷``. A smaller unsigned one is stored as that, never as zero. At
        four bits ``ρ = 2``, down to ``2⁻⁶`` and ``2⁻¹⁵``.

    Raises:
        ValueError: for other ``bits``; at four bits, if the last axis is odd.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.array([1.0, -0.3, 0.0, 1e-3])
        >>> codes = lrjax.subspaces.quantize(x, signed=True)
        >>> print(lrjax.subspaces.dequantize(codes).round(2))
        [ 1.   -0.31  0.    0.  ]
        >>> packed = lrjax.subspaces.quantize(x, signed=True, bits=4)
        >>> print(packed.codes.shape, lrjax.subspaces.dequantize(packed))
        (2,) [ 1.   -0.25  0.    0.  ]
    """
    check_bits(bits)
    blocks = -(-x.shape[_block_axis(x.shape)] // block)
    return _quantize(x, bits, signed, blocks, step)


def check_bits(bits: int) -> None:
    """Refuse what no code has."""
    if (bits, True) not in _LADDERS:
        raise ValueError(f"Moments are stored at bits=4 or bits=8 a number, got {bits!r}.")


def quantize_like(x: Float[Array, "*shape"], like: Quantized) -> Quantized:
    """Store moments as other ones of the same shape are stored."""
    blocks = like.scale.shape[_block_axis(x.shape)]
    return _quantize(x, *_kind(like), blocks, None)


def _kind(x: Quantized) -> tuple[Bits, bool]:
    """The bits of a number, and whether it has a sign."""
    return 4 if isinstance(x, PackedQuantized) else 8, x.codes.dtype == jnp.int8


def _quantize(
    x: Array, bits: Bits, signed: bool, blocks: int, step: Array | None
) -> Quantized:
    ladder, dtype = _LADDERS[bits, signed], x.dtype
    top, growth = ladder.top, ladder.growth
    x = x.astype(working_dtype(dtype))
    scale = _scales(x, blocks)
    size = jnp.abs(x) / _spread(jnp.where(scale > 0, scale, 1), x)
    place = top + jnp.log2(jnp.maximum(size, jnp.finfo(x.dtype).tiny)) / growth
    below = jnp.floor(place)
    # How far x is on the way from the code below to the one above, as numbers.
    t = (place - below) * (growth * math.log(2))
    # For ρ near one, three terms of exp are right to 3e-5 of a code.
    gain = t * (1 + t * (1 / 2 + t / 6)) if bits == 8 else jnp.expm1(t)
    share = gain / (2**growth - 1)
    smallest = 2.0 ** (growth * (1 - top))
    share = jnp.where(place < 1, size / smallest, share)
    cut = 0.5 if step is None else dither(step, x.shape)
    codes = jnp.clip(jnp.maximum(below, 0) + (share > cut), 0, top)
    if signed:
        codes = jnp.where(x < 0, -codes, codes)
    elif ladder.has_zero:
        codes = jnp.where(x > 0, jnp.maximum(codes, 1), 0)
    else:
        codes = jnp.maximum(codes, 1) - 1
    codes, scale = codes.astype("int8" if signed else "uint8"), scale.astype(dtype)
    return KINDS[bits](_packed(codes) if bits == 4 else codes, scale)


def _packed(codes: Integer[Array, "*shape"]) -> Integer[Array, "*packed"]:
    """The low halves of two neighboring bytes in one."""
    pairs, odd = divmod(codes.shape[-1], 2)
    if odd:
        raise ValueError(
            "Four bits a number are stored two to a byte along the last axis, which must "
            f"be even: got shape {codes.shape}. Use bits=8 for this array."
        )
    cut = codes.reshape(*codes.shape[:-1], pairs, 2)
    return (cut[..., 0] & 15) | (cut[..., 1] << 4)


def _unpacked(packed: Integer[Array, "*packed"]) -> Integer[Array, "*shape"]:
    """Undo :func:`_packed`: codes from −8 to 7 where the dtype has a sign, else to 15."""
    # The shift to the right fills up with the sign where there is one.
    pair = jnp.stack([(packed << 4) >> 4, packed >> 4], axis=-1)
    return pair.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def dequantize(x: Quantized) -> Float[Array, "*shape"]:
    """The numbers that `quantize` stored.

    Args:
        x: the codes.

    Returns:
        An array in the dtype of their scale, which is that of the moments.
    """
    bits, signed = _kind(x)
    ladder = _LADDERS[bits, signed]
    codes = _unpacked(x.codes) if bits == 4 else x.codes
    codes = codes.astype(working_dtype(x.scale.dtype))
    if not ladder.has_zero:
        codes = codes + 1
    size = jnp.exp2((jnp.abs(codes) - ladder.top) * ladder.growth)
    size = size * _spread(x.scale.astype(size.dtype), codes)
    return (jnp.sign(codes) * size).astype(x.scale.dtype)


def is_quantized(x: object) -> bool:
    """Whether moments are stored as codes."""
    return isinstance(x, BlockQuantized | PackedQuantized)


def split_codes(tree: PyTree, kind: type[Quantized]) -> Quantized:
    """A tree with codes of one kind among its leaves, as a tree of codes and one of scales.

    Both are trees of plain arrays like the parameters, as the moments themselves were:
    some frameworks rebuild those and nothing else. A leaf that is kept as it is stands
    among the codes, with ``optax.MaskedNode()`` for its scale.
    """
    codes = lambda x: x.codes if is_quantized(x) else x
    scale = lambda x: x.scale if is_quantized(x) else optax.MaskedNode()
    of = lambda part: jax.tree.map(part, tree, is_leaf=is_quantized)
    return kind(of(codes), of(scale))


def join_codes(tree: PyTree) -> PyTree:
    """Undo :func:`split_codes`; a tree that was not split stays as it is."""
    if not is_quantized(tree):
        return tree
    codes, treedef = jax.tree.flatten(tree.codes)
    scales = treedef.flatten_up_to(tree.scale)
    one = lambda c, s: c if isinstance(s, optax.MaskedNode) else type(tree)(c, s)
    return treedef.unflatten(map(one, codes, scales))

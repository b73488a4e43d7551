import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from ...linalg.gram import working_dtype
from .basis import Basis, Dense, Refresh, _dense_frame


# The magnitudes of both codes are in geometric progression, so that every number keeps
# the same relative precision, however small it is next to the largest of its block:
# an update is a ratio of moments, and large where both are small.
_DECADES = {"int8": 5.0, "uint8": 7.0}
_TOP = {"int8": 127, "uint8": 255}


class Codes(NamedTuple):
    """Moments at eight bits a number, and the largest magnitude of each block.

    Blocks are runs along the longer one of the last two axes. A number is ``± scale ·
    ρ^(|code| − top)``, or zero where the code is: signed codes (``int8``) for first
    moments, unsigned ones (``uint8``) for second moments.

    Attributes:
        codes: in the shape of the moments.
        scale: the same shape, but for the blocks along their axis.
    """

    codes: Int[Array, "*shape"]
    scale: Float[Array, "*blocks"]


def _block_axis(shape: tuple[int, ...]) -> int:
    return -2 if len(shape) > 1 and shape[-2] > shape[-1] else -1


def _spread(scale: Array, shape: tuple[int, ...]) -> Array:
    """The scale of the block of every number."""
    axis = len(shape) + _block_axis(shape)
    size, blocks = shape[axis], scale.shape[axis]
    length = -(-size // blocks)
    cut = (*scale.shape[: axis + 1], length, *scale.shape[axis + 1 :])
    # Broadcast and merged, not repeated: that keeps the sharding on Explicit meshes too.
    wide = jnp.broadcast_to(jnp.expand_dims(scale, axis + 1), cut)
    wide = wide.reshape(*shape[:axis], blocks * length, *shape[axis + 1 :])
    return wide if blocks * length == size else lax.slice_in_dim(wide, 0, size, axis=axis)


def _largest(x: Array, blocks: int) -> Array:
    axis = x.ndim + _block_axis(x.shape)
    length = -(-x.shape[axis] // blocks)
    missing = length * blocks - x.shape[axis]
    size = jnp.abs(x)
    if missing:
        size = jnp.pad(size, [(0, missing if a == axis else 0) for a in range(x.ndim)])
    cut = (*x.shape[:axis], blocks, length, *x.shape[axis + 1 :])
    return jnp.max(size.reshape(cut), axis=axis + 1)


def _growth(codes_dtype: str) -> float:
    """The logarithm to base 2 of the ratio ``ρ`` of neighboring magnitudes."""
    return _DECADES[codes_dtype] * math.log2(10) / _TOP[codes_dtype]


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


def encode(
    x: Float[Array, "*shape"],
    *,
    signed: bool,
    block: int = 256,
    step: Int[Array, ""] | None = None,
) -> Codes:
    """Store moments at eight bits a number.

    With a ``step`` a number goes to one of its two neighbors by :func:`dither`, so that
    the mean over the steps of what is stored is the number itself; rounded to the nearest
    an average with a decay near one would never move. Without, it goes to the nearest.

    Args:
        x: the moments, with at least one axis.
        signed: whether they have signs; else they are not negative.
        block: the largest length of a block.
        step: the number of the step.

    Returns:
        The codes. Their error is at most ``ρ − 1`` of a number (half of that without a
        step): 9.5 % for signed ones above ``10⁻⁵`` of their block's largest, 6.6 % for
        others above ``10⁻⁷``. A smaller unsigned one is stored as that, never as zero.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.array([1.0, -0.3, 0.0, 1e-3])
        >>> codes = lrjax.subspaces.encode(x, signed=True)
        >>> print(lrjax.subspaces.decode(codes).round(2))
        [ 1.   -0.31  0.    0.  ]
    """
    kind = "int8" if signed else "uint8"
    blocks = -(-x.shape[_block_axis(x.shape)] // block)
    return _encode(x, kind, blocks, step)


def encode_like(x: Float[Array, "*shape"], like: Codes) -> Codes:
    """Store moments as other ones of the same shape are stored."""
    blocks = like.scale.shape[_block_axis(x.shape)]
    return _encode(x, like.codes.dtype.name, blocks, None)


def _encode(x: Array, kind: str, blocks: int, step: Array | None) -> Codes:
    top, growth, dtype = _TOP[kind], _growth(kind), x.dtype
    x = x.astype(working_dtype(dtype))
    scale = _largest(x, blocks)
    size = jnp.abs(x) / _spread(jnp.where(scale > 0, scale, 1), x.shape)
    place = top + jnp.log2(jnp.maximum(size, jnp.finfo(x.dtype).tiny)) / growth
    below = jnp.floor(place)
    # How far x is on the way from the code below to the one above, as numbers.
    # ρ^t for t in [0, 1) and ρ near one: three terms of exp are right to 3e-5 of a code.
    t = (place - below) * (growth * math.log(2))
    share = t * (1 + t * (1 / 2 + t / 6)) / (2**growth - 1)
    smallest = 2.0 ** (growth * (1 - top))
    share = jnp.where(place < 1, size / smallest, share)
    cut = 0.5 if step is None else dither(step, x.shape)
    codes = jnp.clip(jnp.maximum(below, 0) + (share > cut), 0, top)
    if kind == "uint8":
        codes = jnp.where(x > 0, jnp.maximum(codes, 1), 0)
    else:
        codes = jnp.where(x < 0, -codes, codes)
    return Codes(codes.astype(kind), scale.astype(dtype))


def decode(x: Codes) -> Float[Array, "*shape"]:
    """The numbers that :func:`encode` stored.

    Args:
        x: the codes.

    Returns:
        An array in the dtype of their scale, which is that of the moments.
    """
    kind = x.codes.dtype.name
    codes = x.codes.astype(working_dtype(x.scale.dtype))
    size = jnp.exp2((jnp.abs(codes) - _TOP[kind]) * _growth(kind))
    size = size * _spread(x.scale.astype(size.dtype), codes.shape)
    return (jnp.sign(codes) * size).astype(x.scale.dtype)


class QuantizedBasis(NamedTuple):
    """A basis matrix at four or eight bits a number.

    Attributes:
        codes: groups of consecutive entries; two of four bits share a byte.
        scale: the step between codes, one a group.
        offset: the smallest entry, one a group.
    """

    codes: UInt8[Array, "*b groups bytes"]
    scale: Float[Array, "*b groups"]
    offset: Float[Array, "*b groups"]


def quantized(base: Basis, bits: Literal[4, 8] = 4, group: int = 256) -> Basis:
    """Store the basis matrix at four or eight bits a number.

    Each group of ``group`` consecutive entries is stored as ``offset + scale · code``
    with ``2^bits`` codes between its smallest and its largest entry.

    Args:
        base: a rule whose state is the basis matrix itself: ``svd``, ``power``,
            ``randomized_svd``, …
        bits: of an entry.
        group: entries that share a scale.

    Returns:
        The basis rule. At four bits ``PᵀP = I`` holds to some percent only, so that it
        counts as not orthonormal.

    Raises:
        ValueError: for another base or number of bits.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> basis = sub.quantized(sub.svd(4))
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)

    Reference:
        Z. Zhang et al., "Q-GaLore" (2024), arXiv 2407.08296.
    """
    if bits not in (4, 8):
        raise ValueError(f"quantized stores 4 or 8 bits a number, not {bits}.")
    if base.frame is not _dense_frame or base.observe is not None:
        raise ValueError("quantized needs a rule whose state is the basis matrix itself.")

    def init(shape, rank, dtype, key):
        return _pack(base.init(shape, rank, dtype, key), bits, group)

    def frame(state, key, size, rank):
        del key
        return Dense(_unpack(state, bits, size, rank))

    def rule(of):
        def apply(state: QuantizedBasis, a: Array, to: Refresh) -> QuantizedBasis:
            return _pack(of(_unpack(state, bits, a.shape[-2], to.rank), a, to), bits, group)

        return apply

    return base._replace(
        init=init,
        frame=frame,
        refresh=rule(base.refresh),
        start=None if base.start is None else rule(base.start),
        moved=None,  # every entry of a group moves with its largest
        orthonormal=base.orthonormal and bits == 8,
    )


def _pack(p: Array, bits: int, group: int) -> QuantizedBasis:
    flat = p.reshape(*p.shape[:-2], -1)
    group = min(group, flat.shape[-1] + flat.shape[-1] % 2)
    groups = -(-flat.shape[-1] // group)
    # Entries that fill up the last group repeat its last one: they widen no range.
    pad = [(0, 0)] * (flat.ndim - 1) + [(0, groups * group - flat.shape[-1])]
    flat = jnp.pad(flat, pad, mode="edge").reshape(*flat.shape[:-1], groups, group)
    offset, last = jnp.min(flat, axis=-1), 2**bits - 1
    scale = (jnp.max(flat, axis=-1) - offset) / last
    unit = jnp.where(scale > 0, scale, 1)[..., None]
    codes = jnp.round((flat - offset[..., None]) / unit)
    codes = jnp.clip(codes, 0, last).astype(jnp.uint8)
    if bits == 4:
        codes = codes[..., ::2] | (codes[..., 1::2] << 4)
    return QuantizedBasis(codes, scale, offset)


def _unpack(x: QuantizedBasis, bits: int, size: int, rank: int) -> Array:
    codes = x.codes
    if bits == 4:
        pairs = jnp.stack([codes & 15, codes >> 4], axis=-1)
        codes = pairs.reshape(*codes.shape[:-1], -1)
    flat = x.offset[..., None] + x.scale[..., None] * codes.astype(x.scale.dtype)
    batch = flat.shape[:-2]
    return flat.reshape(*batch, -1)[..., : size * rank].reshape(*batch, size, rank)

import functools
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from ..._matrices import Rank, Side
from ..._sharding import by_compiler, sharding_along
from .basis import Basis, DenseProjector, MatrixBasis, RefreshContext


class QuantizedMatrix(NamedTuple):
    """A basis matrix at four or eight bits a number.

    Attributes:
        codes: groups of consecutive entries; two of four bits share a byte.
        scale: the step between codes, one a group.
        offset: the smallest entry, one a group.
    """

    codes: UInt8[Array, "*b groups bytes"]
    scale: Float[Array, "*b groups"]
    offset: Float[Array, "*b groups"]


class Quantized(Basis):
    """Store the basis matrix at four or eight bits a number.

    Each group of ``group`` consecutive entries is stored as ``offset + scale · code``
    with ``2^bits`` codes between its smallest and its largest entry.

    Args:
        base: a rule whose state is the basis matrix itself: :class:`SVD`, :class:`Power`,
            :class:`RandomizedSVD`, …
        bits: of an entry. At four bits ``PᵀP = I`` holds to some percent only, so that
            the basis counts as not orthonormal.
        group: entries that share a scale.

    Raises:
        ValueError: for another base or number of bits.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> basis = sub.Quantized(sub.SVD(4))
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)

    Reference:
        Z. Zhang et al., "Q-GaLore: quantized GaLore with INT4 projection and
        layer-adaptive low-rank gradients" (2024), arXiv 2407.08296.
    """

    base: MatrixBasis
    bits: Literal[4, 8] = 4
    group: int = 256

    def __check_init__(self):
        if self.bits not in (4, 8):
            raise ValueError(f"Quantized stores 4 or 8 bits a number, not {self.bits}.")
        if not isinstance(self.base, MatrixBasis):
            raise ValueError(
                "Quantized needs a rule whose state is the basis matrix itself, got "
                f"{type(self.base).__name__}."
            )

    @property
    def rank(self) -> Rank:
        """That of the base."""
        return self.base.rank

    @property
    def side(self) -> Side:
        """That of the base."""
        return self.base.side

    @property
    def orthonormal(self) -> bool:
        """If the base is, and eight bits are kept."""
        return self.base.orthonormal and self.bits == 8

    @property
    def uses_momentum(self) -> bool:
        """If the base does."""
        return self.base.uses_momentum

    @property
    def has_start(self) -> bool:
        """If the base has."""
        return self.base.has_start

    def init(
        self, shape: tuple[int, ...], rank: int, dtype: Any, key: PRNGKeyArray
    ) -> QuantizedMatrix:
        """That of the base, stored."""
        return self._pack(self.base.init(shape, rank, dtype, key))

    def refresh(
        self, state: QuantizedMatrix, a: Array, context: RefreshContext
    ) -> QuantizedMatrix:
        """That of the base. Every entry of a group moves with its largest."""
        p = _unpack(state, self.bits, a.shape[-2], context.rank)
        return self._pack(self.base.refresh(p, a, context))

    def start(
        self, state: QuantizedMatrix, a: Array, context: RefreshContext
    ) -> QuantizedMatrix:
        """That of the base."""
        p = _unpack(state, self.bits, a.shape[-2], context.rank)
        return self._pack(self.base.start(p, a, context))

    def projector(
        self,
        state: QuantizedMatrix,
        key: PRNGKeyArray,
        size: int,
        rank: int,
        on_rows: bool,
    ) -> DenseProjector:
        """The matrix that the codes stand for."""
        del key
        matrix = _unpack(state, self.bits, size, rank)
        return DenseProjector(matrix=matrix, on_rows=on_rows)

    def _pack(self, p: Array) -> QuantizedMatrix:
        batch = sharding_along(p, tuple(range(p.ndim - 2)))
        pack = functools.partial(_pack, bits=self.bits, group=self.group)
        return by_compiler(pack, p, out=batch)


def _pack(p: Array, bits: int, group: int) -> QuantizedMatrix:
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
    return QuantizedMatrix(codes, scale, offset)


def _unpack(x: QuantizedMatrix, bits: int, size: int, rank: int) -> Array:
    batch = sharding_along(x.codes, (*range(x.codes.ndim - 2), None, None))
    unpack = functools.partial(_unpack_whole, bits=bits, size=size, rank=rank)
    return by_compiler(unpack, x, out=batch)


def _unpack_whole(x: QuantizedMatrix, bits: int, size: int, rank: int) -> Array:
    codes = x.codes
    if bits == 4:
        pairs = jnp.stack([codes & 15, codes >> 4], axis=-1)
        codes = pairs.reshape(*codes.shape[:-1], -1)
    flat = x.offset[..., None] + x.scale[..., None] * codes.astype(x.scale.dtype)
    batch = flat.shape[:-2]
    return flat.reshape(*batch, -1)[..., : size * rank].reshape(*batch, size, rank)

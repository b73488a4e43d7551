from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float

from ...._dense import dense
from ....linalg import times
from ....lowrank import LowRank
from ..._settings import (
    as_dtype,
    as_rate,
    check_divides,
    checked_dropout,
    checked_rank,
    kaiming_uniform,
    over_rank,
)
from ...protocol import Adapter, AdapterKind, Beside, Ready, Structured, trained


class Block(Adapter):
    """What the blocks of a weight share, or what each has of its own.

    Attributes:
        blocks: an array or factors ``(*b, …)``, trained.
        scale: ``(*b,)``, frozen, where there is one.
        sides: outputs and inputs.
        form: what the blocks do.
    """

    blocks: Any  # an array, or factors
    scale: Float[Array, "*b"] | None
    rate: Float[Array, "*b"] | None
    sides: tuple[int, int] = eqx.field(static=True)
    form: type["BlockForm"] = eqx.field(static=True)

    @property
    def shape(self):
        """Outputs by inputs."""
        array = jax.tree.leaves(self.blocks)[0]
        return (*array.shape[: array.ndim - self.form.axes], *self.sides)

    def dropout_rate(self):
        """The rate."""
        return self.rate

    def trainable(self):
        """The blocks."""
        return trained(self, lambda adapter: adapter.blocks)

    def prepare(self, site, pool=None):
        """Nothing to prepare."""
        return self.form(self.blocks, self.scale, self.sides)

    def factors(self, pool=None):
        """A repeated block and stacked identities; of other forms none."""
        if self.form is not Repeated:
            return None
        *lead, _, inputs = self.shape
        blocks = self.blocks
        right = _stacked_identities(inputs, blocks.shape[-1], blocks.dtype)
        right = jnp.broadcast_to(right, (*lead, *right.shape))
        return LowRank(blocks, right), jnp.ones(tuple(lead), right.dtype)


def _stacked_identities(size: int, rank: int, dtype: Any) -> Float[Array, "size rank"]:
    """Identities below each other, the last one cut."""
    return jnp.tile(jnp.eye(rank, dtype=dtype), (-(-size // rank), 1))[:size]


class BlockForm(Ready):
    """What the blocks do to a weight.

    Attributes:
        axes: how many axes the arrays of one matrix have.
    """

    axes: ClassVar[int]
    blocks: Any  # an array, or factors
    scale: Any  # a number, or None
    sides: tuple[int, int] = eqx.field(static=True)


class Repeated(BlockForm, Beside):
    """One block ``(out, r)`` beside itself, all along the inputs."""

    axes: ClassVar[int] = 2

    def weight(self, base):
        """``W`` and the block on each block of its columns."""
        copies = -(-self.sides[1] // self.blocks.shape[1])
        wide = jnp.tile(self.blocks, (1, copies))[:, : self.sides[1]]
        return base + wide.astype(base.dtype)

    def change(self, site, x):
        """The inputs summed, by a product with zeros and ones, and one thin product.

        Faster than to add up slices, forward and back, and once for layers of one input.
        """
        rank, dtype = self.blocks.shape[1], self.blocks.dtype
        return site.up(
            self.blocks, site.down(_stacked_identities(self.sides[1], rank, dtype), x)
        )


class Affine(BlockForm):
    """Blocks ``(r, r)`` of the weight, each mapped to ``W_ij (I + C_i) + C_i``."""

    axes: ClassVar[int] = 3

    def weight(self, base):
        """The products and sums of the blocks."""
        count, rank, _ = self.blocks.shape
        maps = self.blocks.astype(base.dtype)[:, None]
        tiles = base.reshape(count, rank, -1, rank).swapaxes(1, 2)  # (i, j, r, r)
        return base + (times(tiles, maps) + maps).swapaxes(1, 2).reshape(base.shape)


class Grid(BlockForm, Structured):
    """Factors of their own for each block of a grid."""

    axes: ClassVar[int] = 4

    def delta(self):
        """The blocks put together."""
        tiles = self.scale * self.blocks.materialize()
        return tiles.swapaxes(1, 2).reshape(self.sides)

    def act(self, x):
        """Thin products with the parts of the input, and from there to those of the output.

        One after the other: each is flattened over batch and positions.
        """
        left, right = self.blocks.left, self.blocks.right
        count, width = right.shape[0], right.shape[-1]
        lead, parts = x.shape[:-1], jnp.split(x.astype(right.dtype), count, axis=-1)
        down = right.transpose(1, 0, 3, 2).reshape(count, count * width, -1)
        thin = [dense(part, to) for part, to in zip(parts, down, strict=True)]
        h = jnp.stack([y.reshape(*lead, count, width) for y in thin], axis=-2)
        h = self.scale.astype(h.dtype) * h  # (…, block of outputs, block of inputs, r / k)
        up = left.transpose(0, 2, 1, 3).reshape(count, -1, count * width)
        y = [dense(h[..., a, :, :].reshape(*lead, -1), up[a]) for a in range(count)]
        return jnp.concatenate(y, axis=-1)


class MiSS(AdapterKind):
    """Matrix shard sharing (Bone): one trained block, added to every block of columns.

    ``W'[:, j] = W[:, j] + D[:, j mod r]`` with ``D (out, r)`` from zero: ``r · out``
    numbers, and inputs that are only summed. It is LoRA with the frozen factor
    ``A = [I I … I] (r, in)``, cut at the last input.

    Args:
        rank: the width of the block.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the block, by default that of each weight.

    Raises:
        ValueError: for a rank below 1 or a dropout outside [0, 1).

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(6, 5, key=jax.random.key(0))
        >>> kind = lrjax.adapters.MiSS(rank=2)
        >>> adapters = lrjax.adapt(model, kind, key=jax.random.key(1))
        >>> adapters[""].blocks.shape
        (5, 2)

    Reference:
        J. Kang, Q. Yin, "MiSS: balancing LoRA performance and efficiency with simple shard
        sharing" (2024), arXiv:2409.15371.
    """

    rank: int = eqx.field(static=True)
    dropout: ArrayLike | None
    dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(
        self,
        rank: int | np.integer = 64,
        *,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.rank = checked_rank("MiSS", rank)
        self.dropout, self.dtype = checked_dropout("MiSS", dropout), dtype

    def init(self, site, *, key=None, pool=None, data=None):
        """A block of zeros."""
        blocks = jnp.zeros((site.shape[0], self.rank), as_dtype(self.dtype, site))
        rate = as_rate(self.dropout, blocks.dtype)
        return Block(blocks, None, rate, site.shape, Repeated)


class BAT(AdapterKind):
    """Block affine transformation: every square block of a weight is mapped and moved.

    ``W'_ij = W_ij (I + C_i) + C_i`` for the blocks ``W_ij (r, r)`` of W, with
    ``C_i (r, r)`` from zero for each row of blocks: ``r · out`` numbers, as
    :class:`lrjax.adapters.MiSS` has, and a change of full rank. The dense weight is
    formed in each call.

    Args:
        rank: the side of the blocks; it must divide both sides of the matrix.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the maps, by default that of each weight.

    Raises:
        ValueError: for a rank below 1 or a dropout outside [0, 1); in :func:`lrjax.adapt`,
            for a rank that does not divide a side.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(6, 4, key=jax.random.key(0))
        >>> kind = lrjax.adapters.BAT(rank=2)
        >>> adapters = lrjax.adapt(model, kind, key=jax.random.key(1))
        >>> adapters[""].blocks.shape
        (2, 2, 2)

    Reference:
        J. Kang, Q. Yin, "MiSS: balancing LoRA performance and efficiency with simple shard
        sharing" (2024), arXiv:2409.15371, where it is called Bat.
    """

    rank: int = eqx.field(static=True)
    dropout: ArrayLike | None
    dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(
        self,
        rank: int | np.integer = 64,
        *,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.rank = checked_rank("BAT", rank)
        self.dropout, self.dtype = checked_dropout("BAT", dropout), dtype

    def init(self, site, *, key=None, pool=None, data=None):
        """Maps that do nothing."""
        check_divides("BAT", "rank", self.rank, site)
        shape = (site.shape[0] // self.rank, self.rank, self.rank)
        blocks = jnp.zeros(shape, as_dtype(self.dtype, site))
        return Block(blocks, None, as_rate(self.dropout, blocks.dtype), site.shape, Affine)


class GraLoRA(AdapterKind):
    """Granular low-rank adaptation: factors for each block of a grid on the weight.

    ``W'_ij = W_ij + s · B_ij A_ij`` for the k² blocks ``W_ij (out/k, in/k)``, with
    ``A_ij (r/k, in/k)``, ``B_ij (out/k, r/k)`` from zero and ``s = alpha / rank``: the
    numbers and products of LoRA, ``r (out + in)``, for a change of rank up to k·r. With
    k = 1 it is :class:`lrjax.LoRA`.

    Args:
        rank: of all blocks that share an input, together.
        alpha: the numerator of the scale, ``rank`` by default.
        blocks: k, how many blocks each side is cut into; it must divide the rank and both
            sides.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the factors, by default that of each weight.

    Raises:
        ValueError: for a rank or blocks below 1, a rank that they do not divide, a dropout
            outside [0, 1); in :func:`lrjax.adapt`, for sides that they do not divide.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(6, 4, key=jax.random.key(0))
        >>> kind = lrjax.adapters.GraLoRA(rank=4, blocks=2)
        >>> adapters = lrjax.adapt(model, kind, key=jax.random.key(1))
        >>> adapters[""].blocks.left.shape, adapters[""].blocks.right.shape
        ((2, 2, 2, 2), (2, 2, 3, 2))

    Reference:
        Y. Jung et al., "GraLoRA: granular low-rank adaptation for parameter-efficient
        fine-tuning" (2025), arXiv:2505.20355.
    """

    rank: int = eqx.field(static=True)
    alpha: ArrayLike | None
    blocks: int = eqx.field(static=True)
    dropout: ArrayLike | None
    dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(
        self,
        rank: int | np.integer = 32,
        alpha: ArrayLike | None = None,
        *,
        blocks: int = 2,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.rank, self.alpha = checked_rank("GraLoRA", rank), alpha
        if blocks < 1 or self.rank % blocks:
            raise ValueError(
                f"GraLoRA's blocks must divide its rank, got blocks={blocks} and "
                f"rank={rank}."
            )
        self.blocks, self.dtype = blocks, dtype
        self.dropout = checked_dropout("GraLoRA", dropout)

    def init(self, site, *, key, pool=None, data=None):
        """B zero and A uniform, within the bounds of the inputs of a block."""
        check_divides("GraLoRA", "blocks", self.blocks, site)
        dtype = as_dtype(self.dtype, site)
        (m, n), grid = (side // self.blocks for side in site.shape), (self.blocks,) * 2
        width = self.rank // self.blocks
        right = kaiming_uniform(key, (*grid, n, width), n, dtype)
        factors = LowRank(jnp.zeros((*grid, m, width), dtype), right)
        scale = over_rank(self.alpha, self.rank, dtype)
        rate = as_rate(self.dropout, dtype)
        return Block(factors, scale, rate, site.shape, Grid)

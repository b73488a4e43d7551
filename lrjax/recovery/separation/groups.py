from typing import NamedTuple, TypeGuard

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from ...linalg import nonzero


class Groups(NamedTuple):
    """Blocks of entries that are wrong together, and the threshold of their norms.

    The norm of a matrix in groups is the sum of the lengths of its blocks, of single
    entries the l1 norm. What its threshold takes off is the projection of each block on
    a ball.

    Attributes:
        rows: of a block; ``None`` for all.
        cols: of a block; ``None`` for all.
    """

    rows: int | None = 1
    cols: int | None = 1

    @property
    def T(self) -> "Groups":
        """The blocks of the transpose."""
        return Groups(self.cols, self.rows)

    def size(self, shape: tuple[int, ...]) -> int:
        """Entries of a block of a matrix of this shape."""
        return (self.rows or shape[0]) * (self.cols or shape[1])

    def project(self, x: Float[Array, "m n"], radius: ArrayLike) -> Float[Array, "m n"]:
        """Shorten the blocks that are longer than a radius to it.

        Args:
            x: ``(m, n)``.
            radius: a number, or by row ``(m, 1)`` or column ``(1, n)`` and alike within a
                block; entries with an infinite radius are free and count for no block.
        """
        radius = jnp.asarray(radius, x.dtype)
        if self == ENTRIES:
            return jnp.clip(x, -radius, radius)
        lengths = self._lengths(jnp.where(jnp.isinf(radius), 0, x))
        scale = jnp.where(lengths > radius, radius / nonzero(lengths), 1)
        return x * scale

    def reach(self, x: Float[Array, "m n"], radius: ArrayLike) -> Bool[Array, "m n"]:
        """Which entries are in blocks that are longer than a radius."""
        if self == ENTRIES:
            return jnp.abs(x) > radius
        free = jnp.isinf(radius)
        long = self._lengths(jnp.where(free, 0, x)) > radius
        return jnp.broadcast_to(long & ~free, x.shape)

    def _lengths(self, x: Array) -> Array:
        """Of the block of each entry, in a shape that broadcasts to that of ``x``."""
        squares = _block_sums(_block_sums(x * x, self.rows, 0), self.cols, 1)
        return jnp.sqrt(squares)


ENTRIES = Groups()


def _block_sums(x: Array, size: int | None, axis: int) -> Array:
    """Each entry replaced by the sum over its block along an axis."""
    if size == 1:
        return x
    if size is None:
        return jnp.sum(x, axis=axis, keepdims=True)
    length = x.shape[axis]
    x = jnp.moveaxis(x, axis, -1)
    blocks = jnp.pad(x, ((0, 0), (0, -length % size))).reshape(len(x), -1, size)
    sums = jnp.repeat(jnp.sum(blocks, axis=-1), size, axis=-1)[:, :length]
    return jnp.moveaxis(sums, -1, axis)


def groups_of(errors: str | tuple[int, int], shape: tuple[int, ...]) -> Groups:
    """The groups that a user names, of a matrix of this shape."""
    named = {"entries": ENTRIES, "rows": Groups(1, None), "columns": Groups(None, 1)}
    if isinstance(errors, str) and errors in named:
        return named[errors]
    if _is_block(errors, shape):
        return Groups(*errors)
    raise ValueError(
        "errors must be 'entries', 'rows', 'columns' or the shape (rows, columns) of a "
        f"block of a matrix {shape}; got {errors!r}."
    )


def _is_block(errors: object, shape: tuple[int, ...]) -> TypeGuard[tuple[int, int]]:
    return (
        isinstance(errors, tuple)
        and len(errors) == 2
        and all(isinstance(k, int) for k in errors)
        and all(1 <= k <= n for k, n in zip(errors, shape, strict=True))
    )

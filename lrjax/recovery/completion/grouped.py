from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt


T = TypeVar("T")
Reduce = Callable[[Array], Array]

ROWS = 256  # rows of the matrix that are regressed at a time
SLABS = (8, 64)  # the least and the most entries of each row that are gathered at a time


def identity(x: Array) -> Array:
    """The reduction where one device holds everything."""
    return x


class Grouped(NamedTuple):
    """Observed entries, grouped by row: what is needed to regress every row.

    Rows are worked on in the order of their number of entries, so that those of one
    block have about the same.

    Attributes:
        cols: ``(count,)``, the columns of the entries, row by row.
        values: ``(count,)``.
        starts: ``(m + 1,)``, where the entries of each row start.
        order: ``(m,)``, rows by their number of entries.
        places: ``(m,)``, where a row stands in that order.
        window: ``(2,)``, the lots of the entries that are looked at, see :func:`lots`.
    """

    cols: Int[Array, " count"]
    values: Float[Array, " count"]
    starts: Int[Array, " m1"]
    order: Int[Array, " m"]
    places: Int[Array, " m"]
    window: UInt[Array, "2"]


EVERY = (0, 0xFFFFFFFF)  # the window of all entries


def lots(i: Int[Array, "*#k"], j: Int[Array, "*#k"]) -> UInt[Array, "*#k"]:
    """A number for each place of the matrix, as if drawn at random, from 0 to 2³² − 2.

    It is that of the transposed place, too: an entry has one lot, whether it is come upon
    by rows or by columns, and so have several observations of it.
    """
    mixed = _mix(_mix(i.astype(jnp.uint32)) + _mix(j.astype(jnp.uint32)))
    return jnp.minimum(mixed, jnp.uint32(0xFFFFFFFE))


def _mix(x: UInt[Array, "*k"]) -> UInt[Array, "*k"]:
    """A bijection of 32 bits in which every bit of the result hangs on every bit."""
    x = x + jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 15)


class Slab(NamedTuple):
    """The same few entries of every row of a block.

    Attributes:
        vectors: ``(rows, width, r)``, what the columns are regressed on; zero where
            nothing is observed.
        values: ``(rows, width)``, zero where nothing is observed.
        seen: ``(rows, width)``, which entries there are.
        cols: ``(rows, width)``, their columns.
        index: the number of the slab.
    """

    vectors: Float[Array, "rows width r"]
    values: Float[Array, "rows width"]
    seen: Bool[Array, "rows width"]
    cols: Int[Array, "rows width"]
    index: Int[Array, ""]


class Block(NamedTuple):
    """Some rows of a matrix, with access to their entries.

    Attributes:
        rows: their indices; ``m`` for a place without a row.
        first: where the entries of each row start.
        counts: how many entries each row has.
        fold: ``fold(body, start)`` calls ``body(carry, slab) -> carry`` on all entries.
    """

    rows: Int[Array, " rows"]
    first: Int[Array, " rows"]
    counts: Int[Array, " rows"]
    fold: Callable[[Callable[[Any, Slab], Any], Any], Any]


def group_by_row(
    rows: Int[Array, " count"],
    cols: Int[Array, " count"],
    values: Float[Array, " count"],
    m: int,
    reduce: Reduce = identity,
) -> Grouped:
    """Sort entries by row; those with a row index of ``m`` are left out.

    ``reduce`` sums over devices that hold other entries of the same rows: all must work
    on the rows in one order.
    """
    counts = jnp.zeros(m, jnp.int32).at[rows].add(1, mode="drop")
    starts = jnp.pad(jnp.cumsum(counts), (1, 0))
    # A stable sort would need four times the memory of the data on CPU.
    _, cols, values = lax.sort((rows, cols, values), num_keys=1, is_stable=False)
    order = jnp.argsort(reduce(counts), stable=False).astype(jnp.int32)
    places = jnp.zeros(m, jnp.int32).at[order].set(jnp.arange(m, dtype=jnp.int32))
    return Grouped(
        cols, values, starts, order, places, jnp.asarray(np.array(EVERY, np.uint32))
    )


def scan_rows(
    work: Callable[[T, Block], tuple[T, Array]],
    start: T,
    entries: Grouped,
    vectors: Float[Array, "n r"],
    *,
    width: int | None = None,
    scale: Float[Array, " n"] | None = None,
) -> tuple[T, Array]:
    """Call ``work(carry, block) -> (carry, (rows, k))`` on every block of rows.

    Needs the memory of one block: ``rows × slab × r`` numbers, whatever the number of
    entries, and whatever ``work`` makes of them.

    ``width`` is the number of entries of each row in a slab; the values of each column are
    multiplied by its ``scale``.

    Returns:
        The last carry, and what was made of each row, in the order of the matrix.
    """
    m, count = len(entries.order), len(entries.cols)
    size = min(ROWS, m)
    if width is None:
        width = min(max(SLABS[0], 1 << (count // (2 * m)).bit_length()), SLABS[1])
    padded = jnp.pad(entries.order, (0, -m % size), constant_values=m)
    starts = jnp.pad(entries.starts, (0, 1), mode="edge")

    def step(carry, rows):
        first, last = starts[rows], starts[rows + 1]

        def fold(body, start):
            def one(index, carry):
                place = first[:, None] + index * width + jnp.arange(width)[None, :]
                there = place < last[:, None]
                place = jnp.where(there, place, 0)
                cols = entries.cols[place]
                lot = lots(rows[:, None], cols)
                values = entries.values[place]
                if scale is not None:
                    values *= scale[cols]
                low, high = entries.window
                seen = there & (lot >= low) & (lot < high)
                slab = Slab(
                    jnp.where(seen[..., None], vectors[cols], 0),
                    jnp.where(seen, values, 0),
                    seen,
                    cols,
                    index,
                )
                return body(carry, slab)

            return lax.fori_loop(0, -(-jnp.max(last - first) // width), one, start)

        return work(carry, Block(rows, first, last - first, fold))

    carry, made = lax.scan(step, start, padded.reshape(-1, size))
    return carry, made.reshape(-1, made.shape[-1])[entries.places]


def back_project(entries: Grouped, vectors: Float[Array, "n r"]) -> Float[Array, "m r"]:
    """The product of the sparse matrix of the entries with a thin matrix."""

    def work(_, block):
        def add(total, slab):
            return total + jnp.einsum("bwr,bw->br", slab.vectors, slab.values)

        zeros = jnp.zeros((len(block.rows), vectors.shape[-1]), vectors.dtype)
        return None, block.fold(add, zeros)

    return scan_rows(work, None, entries, vectors)[1]

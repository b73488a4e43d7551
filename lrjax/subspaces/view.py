import math
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

from jaxtyping import Array


Side = Literal["short", "long", "left", "right"]
Rank = int | float | Callable[[str, tuple[int, int]], int]

_NOT_HIDDEN = re.compile(
    r"(.*embed.*|.*emb|wte|wpe|unembed.*|.*vocab.*|logits|(.*_)?head)", re.IGNORECASE
)


class MatrixSpec(NamedTuple):
    """Which axes of a leaf are the rows and the columns of its matrices.

    The axes named in neither are batch axes: each of their positions is a matrix with
    a basis of its own.

    Args:
        rows: axes that together index the rows.
        cols: axes that together index the columns.
        blocks: into how many blocks the rows are cut, each a matrix of its own: the
            heads of a fused projection. They become the last batch axis.

    Example:
        >>> import lrjax
        >>> conv = lrjax.subspaces.MatrixSpec(rows=(0,), cols=(1, 2, 3))
        >>> lrjax.subspaces.matrix_shape((8, 4, 3, 3), conv)
        (8, 36)
    """

    rows: tuple[int, ...] = (-2,)
    cols: tuple[int, ...] = (-1,)
    blocks: int = 1


def is_hidden_matrix(path: str, shape: tuple[int, ...]) -> bool:
    """The default choice of what to project: matrices that are no embedding or head.

    A leaf counts if its last two axes are at least 8 long (leading axes are stacked
    layers, heads or experts) and no part of its path is called like an embedding, a
    vocabulary or an output head. Shapes alone cannot tell a head from a hidden layer,
    so replace this rule where the names differ.

    Args:
        path: the path of the leaf, as printed by ``jax.tree_util.keystr``.
        shape: its shape.

    Returns:
        Whether to project it.

    Example:
        >>> import lrjax
        >>> lrjax.subspaces.is_hidden_matrix(".mlp.weight", (16, 32))
        True
        >>> lrjax.subspaces.is_hidden_matrix(".lm_head.weight", (16, 32))
        False
    """
    named = any(_NOT_HIDDEN.fullmatch(part) for part in re.split(r"\W+", path))
    return len(shape) >= 2 and min(shape[-2:]) >= 8 and not named


def _axes(ndim: int, spec: MatrixSpec) -> tuple[list[int], list[int], list[int]]:
    rows = [axis % ndim for axis in spec.rows]
    cols = [axis % ndim for axis in spec.cols]
    if len({*rows, *cols}) != len(rows) + len(cols) or not rows or not cols:
        raise ValueError(
            f"{spec} must name different axes for rows and columns, at least one each, "
            f"of a leaf with {ndim} axes."
        )
    batch = [axis for axis in range(ndim) if axis not in rows and axis not in cols]
    return batch, rows, cols


def matrix_shape(shape: tuple[int, ...], spec: MatrixSpec) -> tuple[int, ...]:
    """The shape ``(batch…, m, n)`` of the matrices of a leaf."""
    batch, rows, cols = _axes(len(shape), spec)
    heads = () if spec.blocks == 1 else (spec.blocks,)
    m, rest = divmod(_product(shape, rows), spec.blocks)
    if rest:
        raise ValueError(
            f"{spec} cannot cut the {_product(shape, rows)} rows of a leaf of shape "
            f"{shape} into {spec.blocks} equal blocks."
        )
    return (*(shape[a] for a in batch), *heads, m, _product(shape, cols))


def _product(shape: tuple[int, ...], axes: list[int]) -> int:
    return math.prod(shape[axis] for axis in axes)


def as_matrices(x: Array, spec: MatrixSpec) -> Array:
    """View a leaf as matrices ``(batch…, m, n)``; a no-op where it already is one."""
    batch, rows, cols = _axes(x.ndim, spec)
    shape = matrix_shape(x.shape, spec)
    order = batch + rows + cols
    if order != list(range(x.ndim)):
        x = x.transpose(order)
    if len(rows) == len(cols) == spec.blocks == 1:
        return x
    return x.reshape(shape)


def from_matrices(x: Array, spec: MatrixSpec, shape: tuple[int, ...]) -> Array:
    """Undo :func:`as_matrices` for a leaf of the given shape."""
    batch, rows, cols = _axes(len(shape), spec)
    order = batch + rows + cols
    x = x.reshape([shape[axis] for axis in order])
    if order == list(range(len(shape))):
        return x
    return x.transpose([order.index(axis) for axis in range(len(shape))])


def projects_rows(m: int, n: int, side: Side) -> bool:
    """Whether a basis on ``side`` of an ``m × n`` matrix lives in the row index space.

    Ties of "short" and "long" go to the left, ``P (m, r)``.
    """
    if side == "short":
        return m <= n
    if side == "long":
        return m >= n
    return side == "left"


def resolve_rank(rank: Rank, path: str, m: int, n: int) -> int:
    """The rank of a leaf: an int, a fraction of ``min(m, n)`` or a callable's answer."""
    full = min(m, n)
    value = rank(path, (m, n)) if callable(rank) else rank
    if isinstance(value, float):
        if not 0 < value <= 1:
            raise ValueError(
                f"A rank given as a fraction must be in (0, 1], got {value} at {path}."
            )
        value = max(1, round(value * full))
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"rank must be a positive int, a fraction in (0, 1] or a callable of (path, "
            f"(rows, columns)) that gives a positive int; got {value!r} at {path}."
        )
    return min(value, full)

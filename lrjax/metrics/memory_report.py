import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.tree_util as jtu
import optax
from jaxtyping import PyTree

from .._arguments import check_parameters
from .._matrices import named_leaves


class LeafMemory(NamedTuple):
    """Optimizer state of one parameter leaf.

    Attributes:
        path: where the leaf is.
        shape: its shape.
        parameter_bytes: its size.
        state_bytes: the size of all state arrays that belong to it.
        adam_bytes: what ``optax.scale_by_adam`` would keep for it.
    """

    path: str
    shape: tuple[int, ...]
    parameter_bytes: int
    state_bytes: int
    adam_bytes: int


class MemoryReport(NamedTuple):
    """The optimizer state of a model, leaf by leaf; prints as a table.

    Attributes:
        leaves: one row for each parameter leaf.
        shared_bytes: state that belongs to no single leaf: counters and the like.
        adam_bytes: what ``optax.scale_by_adam`` would keep for the same parameters.
    """

    leaves: tuple[LeafMemory, ...]
    shared_bytes: int
    adam_bytes: int

    @property
    def state_bytes(self) -> int:
        """All state together."""
        return self.shared_bytes + sum(leaf.state_bytes for leaf in self.leaves)

    @property
    def ratio(self) -> float:
        """All state over that of Adam."""
        return self.state_bytes / self.adam_bytes if self.adam_bytes else math.nan

    def __str__(self) -> str:
        width = max([9, *(len(leaf.path) for leaf in self.leaves)])
        rows = [f"{'leaf':<{width}}  {'shape':>18}  {'parameter':>12}  {'state':>12}"]
        rows += [
            f"{leaf.path:<{width}}  {leaf.shape!s:>18}  {leaf.parameter_bytes:>12,}  "
            f"{leaf.state_bytes:>12,}{'  more than Adam' * _costs_more(leaf)}"
            for leaf in self.leaves
        ]
        total = sum(leaf.parameter_bytes for leaf in self.leaves)
        rows.append(f"{'shared':<{width}}  {'':>18}  {'':>12}  {self.shared_bytes:>12,}")
        rows.append(f"{'total':<{width}}  {'':>18}  {total:>12,}  {self.state_bytes:>12,}")
        rows.append(f"{self.ratio:.3f} of Adam's {self.adam_bytes:,} bytes")
        return "\n".join(rows)


def memory_report(params: PyTree, tx: optax.GradientTransformation) -> MemoryReport:
    """How many bytes an optimizer keeps for each parameter, and in all, next to Adam.

    Nothing is allocated: the state is only evaluated by shape, so that the report of a
    model that does not fit in memory is a matter of seconds.

    Warns of leaves that cost more than under Adam while others save: most often an array
    whose axes are taken for something else, like a kernel ``(512, 8, 64)`` of attention
    for 512 matrices of 8 × 64. ``where=`` tells the axes by a ``MatrixSpec``.

    Args:
        params: the parameters, or their ``jax.ShapeDtypeStruct``.
        tx: any optax transform.

    Returns:
        The report; ``print`` it, or read ``.ratio``, ``.state_bytes`` and ``.leaves``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> params = {"weight": jnp.zeros((64, 128))}
        >>> report = lrjax.metrics.memory_report(params, lrjax.subspace_adam(1e-3, rank=8))
        >>> print(round(report.ratio, 3))
        0.156
    """
    check_parameters("memory_report", params)
    shapes = jax.eval_shape(lambda p: p, params)
    paths, _ = jtu.tree_flatten_with_path(shapes)
    named, _ = named_leaves(shapes)
    state = jax.eval_shape(tx.init, shapes)
    owned = {path: 0 for path, _ in paths}
    shared = 0
    for path, x in jtu.tree_flatten_with_path(state)[0]:
        owner = _owner(path, owned)
        if owner is None:
            shared += _size(x)
        else:
            owned[owner] += _size(x)
    adam = jax.eval_shape(optax.scale_by_adam().init, shapes)
    moments = zip(jax.tree.leaves(adam.mu), jax.tree.leaves(adam.nu), strict=True)
    leaves = tuple(
        LeafMemory(
            name or "the root",
            x.shape,
            _size(x),
            owned[path],
            _size(m) + _size(v),
        )
        for (name, x), (path, _), (m, v) in zip(named, paths, moments, strict=True)
    )
    _warn_of_costs(leaves)
    return MemoryReport(leaves, shared, sum(map(_size, jax.tree.leaves(adam))))


def _costs_more(leaf: LeafMemory) -> bool:
    return leaf.state_bytes > leaf.adam_bytes


def _warn_of_costs(leaves: tuple[LeafMemory, ...]) -> None:
    more = [leaf for leaf in leaves if _costs_more(leaf) and len(leaf.shape) >= 2]
    if more and any(leaf.state_bytes < leaf.adam_bytes for leaf in leaves):
        named = ", ".join(f"{leaf.path} {leaf.shape}" for leaf in more[:5])
        warnings.warn(
            f"{len(more)} leaves keep more than under Adam: {named}. Their matrices may "
            "lie along other axes: let where= answer a MatrixSpec, or False.",
            stacklevel=3,
        )


def _size(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize


def _owner(path: tuple, leaves: dict[tuple, int]) -> tuple | None:
    """The parameter whose path appears, in full, inside the path of a state array.

    The longest one wins, and of equally long ones the last. A tree that is a single
    array has the empty path, and owns all arrays that are no scalars' concern.
    """
    best = None
    for start in range(len(path)):
        for stop in range(len(path), start, -1):
            part = path[start:stop]
            if part in leaves and (best is None or len(part) >= len(best)):
                best = part
    if best is None and () in leaves:
        return ()
    return best

"""One compiled program for a chunk of members, on one device or on a mesh."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from .grid import Group


class Program(NamedTuple):
    """A function that is run on chunks of members, with what they share in its place.

    Attributes:
        run: the function.
        mesh: what the members are spread over.
        arrays: what is shared and an array or a number.
        others: the rest of what is shared, part of the compiled program.
    """

    run: Any
    mesh: Mesh | None
    arrays: list
    others: Any

    @classmethod
    def make(cls, run, shared: tuple, mesh: Mesh | None) -> "Program":
        """Put what the members share where it is used."""
        arrays, others = _split_static(shared)
        if mesh is not None:
            arrays = _placed(arrays, NamedSharding(mesh, PartitionSpec()))
        return cls(run, mesh, arrays, others)

    def size(self, members: int, batch_size: int | None) -> int:
        """How many of some members run at once."""
        chunk = min(batch_size or members, members)
        return chunk if self.mesh is None else -(-chunk // self.mesh.size) * self.mesh.size

    def shapes(self, group: Group, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the results of one member, by name; nothing is run."""
        points = self._points(group, np.zeros(size, int))
        try:
            out = _run_chunk.eval_shape(*self._static(group), self.arrays, points)
        except Exception as error:
            if group.static:
                error.add_note(f"lrjax.sweep: in tracing {dict(group.static)}.")
            raise
        return {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in _named(out)}

    def results(
        self, group: Group, pending: np.ndarray, size: int
    ) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Places in the grid and results of those members that are asked for, by chunk."""
        for start in range(0, len(pending), size):
            members = pending[start : start + size]
            # Past the end the last member is repeated: one shape, one compilation.
            padded = np.pad(members, (0, size - len(members)), mode="edge")
            try:
                points = self._points(group, padded)
                out = _run_chunk(*self._static(group), self.arrays, points)
                out = _fetched(out, self.mesh)
            except Exception as error:
                error.add_note(f"lrjax.sweep: in a chunk with {group.describe(members)}.")
                raise
            yield group.where[members], {name: x[: len(members)] for name, x in _named(out)}

    def _static(self, group: Group):
        return self.run, self.mesh, group.static, self.others

    def _points(self, group: Group, members: np.ndarray):
        # Places too, so that there is something to vmap over where all values are static.
        points = group.where[members], {n: v[members] for n, v in group.points.items()}
        if self.mesh is None:
            return points
        return _placed(
            points, NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        )


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether devices of other processes work on the members."""
    return mesh is not None and mesh.is_multi_process


def _named(tree) -> list[tuple[str, Any]]:
    leaves = jtu.tree_flatten_with_path(tree)[0]
    return [(jtu.keystr(p, simple=True, separator=".") or "result", x) for p, x in leaves]


def _placed(tree, sharding: Sharding):
    """A tree of arrays that every process has, spread over the devices of all of them."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def place(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jr.wrap_key_data(place(jr.key_data(x)), impl=jr.key_impl(x))
        x = np.asarray(jnp.asarray(x))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree)


def _fetched(tree, mesh: Mesh | None):
    if spans_processes(mesh):
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def _split_static(tree):
    """Arrays and numbers on one side; on the other what a model holds besides them."""
    leaves, structure = jax.tree.flatten(tree)
    is_data = [
        isinstance(x, jax.Array | np.ndarray | np.generic | float | int) for x in leaves
    ]
    arrays = [x for x, data in zip(leaves, is_data, strict=True) if data]
    others = tuple(None if data else x for x, data in zip(leaves, is_data, strict=True))
    return arrays, (structure, tuple(is_data), others)


def _join_static(arrays, static):
    structure, is_data, others = static
    arrays = iter(arrays)
    pairs = zip(is_data, others, strict=True)
    return structure.unflatten([next(arrays) if data else other for data, other in pairs])


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run_chunk(run, mesh, fixed, others, arrays, points):
    def members(arrays, points):
        shared = _join_static(arrays, others)
        one = lambda place, point: run(*shared, **dict(fixed), **point)
        return jax.vmap(one)(*points)

    if mesh is None:
        return members(arrays, points)
    axes = PartitionSpec(mesh.axis_names)
    # Members do not talk to each other; shard_map keeps decompositions, which the
    # partitioner would gather, on the device of their member.
    return jax.shard_map(
        members,
        mesh=mesh,
        in_specs=(PartitionSpec(), axes),
        out_specs=axes,
        check_vma=False,
    )(arrays, points)

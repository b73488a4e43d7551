import functools
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def sweep(
    run: Callable[..., Any],
    grid: Mapping[str, Any],
    *shared: Any,
    over: Literal["product", "zip"] = "product",
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    progress: bool = True,
):
    """Run a function for every point of a grid of hyper-parameters, vectorized.

    All members run in one compiled program, ``vmap`` of ``run`` over the grid. What the
    members have in common goes in as ``shared`` and is not copied: with a shared
    measurement operator, ``B`` matrix-vector products become one matrix product. A
    member that diverges shows as non-finite numbers; the others do not notice.

    Args:
        run: called as ``run(*shared, **point)`` with one scalar for each name of the
            grid; returns an array or a pytree of arrays (a dict gives the best names).
            It must be traceable, so ``rank``-like arguments that decide shapes cannot be
            on the grid. Passing the same function again reuses its compiled program.
        grid: one-dimensional array-likes by name. For seeds use integers and call
            ``jax.random.key(seed)`` in ``run``.
        *shared: pytrees (data, a model, a problem), the same for all members. Pass big
            arrays here instead of closing over them: XLA spends minutes on constants.
        over: ``"product"`` runs every combination, ``"zip"`` the i-th values together.
        batch_size: how many members run at once, for sweeps that do not fit in memory.
            The last chunk is padded, so there is still one compilation only.
        mesh: spread the members of each chunk over all devices of this mesh.
        progress: show a progress bar that counts members.

    Returns:
        An ``xarray.Dataset`` with one variable for each array that ``run`` returns. The
        names of the grid are its first dimensions, with the values as coordinates
        (``over="zip"``: one dimension ``member`` that carries all of them).

    Raises:
        ValueError: for an empty grid, values that are not one-dimensional, unequal lengths
            with ``over="zip"``, or a ``batch_size`` below 1.
        ImportError: if xarray is not installed; the message names the extra.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> def run(data, *, scale, power):
        ...     return {"total": jnp.sum(scale * data**power)}
        >>> grid = {"scale": [1.0, 10.0], "power": [1.0, 2.0, 3.0]}
        >>> out = lrjax.sweep(run, grid, jnp.array([1.0, 2.0]), progress=False)
        >>> out["total"].sel(scale=10.0).values.tolist()
        [30.0, 50.0, 90.0]
    """
    xarray = _import("xarray")
    values = _check_grid(grid, over)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if over == "product":
        sizes = {name: len(v) for name, v in values.items()}
        indices = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)
        points = {name: v[i] for (name, v), i in zip(values.items(), indices, strict=True)}
        coords = {name: _coordinate(v) for name, v in values.items()}
    else:
        points = values
        sizes = {"member": len(next(iter(values.values())))}
        coords = {name: ("member", _coordinate(v)) for name, v in values.items()}
    results = _run_in_chunks(run, shared, points, batch_size, mesh, progress)
    variables = {}
    for path, x in jtu.tree_flatten_with_path(results)[0]:
        name = jtu.keystr(path, simple=True, separator=".") or "result"
        own = tuple(f"{name}_{axis}" for axis in range(x.ndim - 1))
        variables[name] = ((*sizes, *own), x.reshape(*sizes.values(), *x.shape[1:]))
    return xarray.Dataset(variables, coords)


def _import(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"lrjax.sweep needs {module}, which is not installed: "
            "pip install 'lrjax[sweep]'."
        ) from error


def _check_grid(grid: Mapping[str, Any], over: str) -> dict[str, jax.Array]:
    if over not in ("product", "zip"):
        raise ValueError(f"over must be 'product' or 'zip', got {over!r}.")
    values = {name: jnp.asarray(v) for name, v in grid.items()}
    if not values:
        raise ValueError("sweep got an empty grid: give at least one name with its values.")
    for name, v in values.items():
        if v.ndim != 1 or v.size == 0:
            raise ValueError(
                f"the grid's values for {name!r} must be one-dimensional and not empty, "
                f"got shape {v.shape}."
            )
    lengths = {name: len(v) for name, v in values.items()}
    if over == "zip" and len(set(lengths.values())) > 1:
        raise ValueError(f"over='zip' needs values of one length, got {lengths}.")
    return values


def _coordinate(values: jax.Array) -> np.ndarray:
    if jnp.issubdtype(values.dtype, jax.dtypes.prng_key):
        return np.arange(len(values))  # a key has no label of its own
    return np.asarray(values)


def _run_in_chunks(run, shared, points, batch_size, mesh, progress):
    total = len(next(iter(points.values())))
    arrays, static = _split_static(shared)
    chunk = min(batch_size or total, total)
    if mesh is not None:
        chunk = math.ceil(chunk / mesh.size) * mesh.size
        arrays = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))
    chunks = []
    with _progress_bar(total, progress) as bar:
        for start in range(0, total, chunk):
            # Past the end the last member is repeated: one shape, one compilation.
            index = np.minimum(np.arange(start, start + chunk), total - 1)
            part = {name: v[index] for name, v in points.items()}
            if mesh is not None:
                spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
                part = jax.device_put(part, spread)
            outputs = _run_chunk(run, mesh, static, arrays, part)
            chunks.append(jax.device_get(outputs))
            bar.update(min(chunk, total - start))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:total], *chunks)


class _NoBar:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, count):
        pass


def _progress_bar(total: int, progress: bool):
    return _import("tqdm").tqdm(total=total, unit="run") if progress else _NoBar()


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


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run_chunk(run, mesh, static, arrays, points):
    def members(arrays, points):
        shared = _join_static(arrays, static)
        return jax.vmap(lambda point: run(*shared, **point))(points)

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

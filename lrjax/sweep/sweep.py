import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .. import _extras, _progress
from .chunks import Program, spans_processes
from .grid import make_grid
from .store import Store


def sweep(
    run: Callable[..., Any],
    grid: Mapping[str, Any],
    *shared: Any,
    over: Literal["product", "zip"] = "product",
    static: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    save_to: str | os.PathLike | None = None,
    progress: bool = True,
):
    """Run a function for every point of a grid of hyper-parameters, vectorized.

    All members run in one compiled program, ``vmap`` of ``run`` over the grid. What the
    members have in common goes in as ``shared`` and is not copied: with a shared
    measurement operator, ``B`` matrix-vector products become one matrix product. A
    member that diverges shows as non-finite numbers; the others do not notice. Should a
    chunk fail altogether, the traceback ends with the points that were in it.

    Args:
        run: called as ``run(*shared, **point)`` with one scalar for each name of the
            grid; returns an array or a pytree of arrays (a dict gives the best names).
            It must be traceable. Passing the same function again reuses its compiled
            program.
        grid: one-dimensional array-likes by name. For seeds use integers and call
            ``jax.random.key(seed)`` in ``run``.
        *shared: pytrees (data, a model, a problem), the same for all members. Pass big
            arrays here instead of closing over them: XLA spends minutes on constants.
        over: ``"product"`` runs every combination, ``"zip"`` the i-th values together.
        static: lists by name of what decides shapes or branches in ``run``, a rank or
            the name of a method: it gets these values as they are. Each takes a
            compilation of its own. The results need one shape for all of them.
        batch_size: how many members run at once, for sweeps that do not fit in memory.
            The last chunk is padded, so there is still one compilation only.
        mesh: spread the members of each chunk over all devices of this mesh. It may be
            one over several processes (``jax.distributed``), that all call ``sweep`` with
            the same arguments and all get all results; the first shows the progress.
        save_to: the path of a Zarr store that every chunk is written to when it is
            finished. If the store is there already, its members do not run again, also
            under another ``batch_size`` or ``mesh``: a sweep that was killed goes on
            where it was. Of several processes the first writes and all read. The
            variable ``finished`` tells which members have results, floating-point
            results of the others are NaN. ``run`` and ``shared`` are not compared with
            those that wrote the store, the grid and the shapes of the results are.
        progress: show a progress bar that counts members.

    Returns:
        An ``xarray.Dataset`` with one variable for each array that ``run`` returns. The
        names in ``static`` and in the grid are its first dimensions, with the values as
        coordinates (``over="zip"``: one dimension ``member`` that carries all of them).

    Raises:
        ValueError: for an empty grid, values that are not one-dimensional, unequal lengths
            with ``over="zip"``, a ``batch_size`` below 1, results whose shapes differ
            between static values, or a store of another grid.
        ImportError: if xarray is not installed, or Zarr with ``save_to``; the message
            names the extra.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> def run(data, *, scale, power):
        ...     return {"total": jnp.sum(scale * data**power)}
        >>> grid = {"scale": [1.0, 10.0], "power": [1.0, 2.0, 3.0]}
        >>> out = lrjax.sweep(run, grid, jnp.array([1.0, 2.0]), progress=False)
        >>> out["total"].sel(scale=10.0).values.tolist()
        [30.0, 50.0, 90.0]

        Mean and standard error over seeds, for two ranks:

        >>> import jax.random as jr
        >>> def largest(*, rank, seed):
        ...     return jnp.max(jr.normal(jr.key(seed), (rank,)))
        >>> grid = {"seed": range(100)}
        >>> out = lrjax.sweep(largest, grid, static={"rank": [4, 16]}, progress=False)
        >>> mean = out.mean("seed")
        >>> error = out.std("seed", ddof=1) / out.sizes["seed"] ** 0.5
        >>> bool((mean + 2 * error).sel(rank=4).result < mean.sel(rank=16).result)
        True
    """
    xarray = _extras.load("xarray", "sweep", "lrjax.sweep")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    points = make_grid(grid, static or {}, over)
    program = Program.make(run, shared, mesh)
    chunks = [program.size(len(group.where), batch_size) for group in points.groups]
    shapes = _shapes(program, points.groups, chunks)
    variables = {}
    for name, x in shapes.items():
        own = tuple(f"{name}_{axis}" for axis in range(len(x.shape)))
        empty = _empty((*points.sizes.values(), *x.shape), x.dtype)
        variables[name] = ((*points.sizes, *own), empty)
    dataset = xarray.Dataset(variables, points.coords)
    # The dataset wraps these arrays, which are filled from here on.
    finished = np.zeros(tuple(points.sizes.values()), bool)
    flat = {
        name: dataset[name].values.reshape(finished.size, *x.shape)
        for name, x in shapes.items()
    }
    several = spans_processes(mesh)
    store = None
    if save_to is not None:
        store = Store(save_to, points, dataset, chunk=max(chunks), shared=several)
        finished = store.finished
    shown = progress and not (several and jax.process_index())
    with _progress_bar(finished, shown) as bar:
        for group, chunk in zip(points.groups, chunks, strict=True):
            pending = np.flatnonzero(~finished.reshape(-1)[group.where])
            size = min(chunk, program.size(max(1, len(pending)), batch_size))
            for where, results in program.results(group, pending, size):
                for name, x in results.items():
                    flat[name][where] = x
                if store is not None:
                    store.write(where)
                if bar is not None:
                    bar.update(len(where))
    return dataset


def _shapes(program, groups, chunks):
    """What ``run`` returns for one member, the same whatever the static values are."""
    first, *others = (
        program.shapes(group, chunk) for group, chunk in zip(groups, chunks, strict=True)
    )
    for group, shapes in zip(groups[1:], others, strict=True):
        for name in first.keys() | shapes.keys():
            a, b = first.get(name), shapes.get(name)
            if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
                say = lambda x: "missing" if x is None else f"{x.dtype}{list(x.shape)}"
                raise ValueError(
                    f"the results of a sweep need one shape, but {name!r} is {say(a)} for "
                    f"{dict(groups[0].static)} and {say(b)} for {dict(group.static)}. "
                    "Return what has the same shape for all of them, such as norms, "
                    "losses or products of the factors."
                )
    return first


def _empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    if not jnp.issubdtype(dtype, jnp.inexact):
        return np.zeros(shape, dtype)
    # xarray and Zarr know the floating-point types of numpy alone, not bfloat16.
    return np.full(shape, np.nan, np.float32 if np.dtype(dtype).kind == "V" else dtype)


def _progress_bar(finished: np.ndarray, shown: bool):
    if not shown:
        return contextlib.nullcontext()
    done = int(finished.sum())
    return _progress.bar("lrjax.sweep", finished.size, done=done, unit="run")

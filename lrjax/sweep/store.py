"""Results of a sweep on disk, written chunk by chunk: a Zarr store that xarray opens.

Zarr and not NetCDF: every piece is a file of its own that is put in place whole, so a
process that is killed leaves all that it had finished. An HDF5 file would be lost.
"""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from .. import _extras
from .grid import Grid


FINISHED = "finished"  # the variable that says which members have results
PIECE = 1 << 26  # bytes of a result in one file, at most


class Store:
    """A store of one grid, opened to be continued or created.

    All processes of a sweep read it; the first one writes.

    Attributes:
        finished: which members have results, in the shape of the grid.
    """

    finished: np.ndarray

    def __init__(self, path, grid: Grid, dataset, *, chunk: int, shared: bool):
        """Open or create it and read what it has into the arrays of a dataset."""
        self._arrays = {name: x.values for name, x in dataset.data_vars.items()}
        _check_names(self._arrays)
        self._path = os.fspath(path)
        self._zarr = _extras.load("zarr", "sweep", "lrjax.sweep with save_to")
        self._writes = not shared or jax.process_index() == 0
        try:
            if self._writes and not self._exists():
                self._create(grid, dataset, chunk)
        finally:
            if shared:  # the others look at it when it is there, or hear that it is not
                multihost_utils.sync_global_devices(f"lrjax.sweep: {self._path}")
        self._load(grid, dataset)

    def write(self, where: np.ndarray) -> None:
        """Write the results of some members, then that they are there."""
        places = np.unravel_index(where, self.finished.shape)
        self.finished[places] = True
        if not self._writes:
            return
        # The smallest block of the grid around them: what else it holds is written anew.
        block = tuple(slice(i.min(), i.max() + 1) for i in places)
        group = self._zarr.open_group(self._path, mode="r+")
        for name, x in self._arrays.items():
            group[name][block] = x[block]
        group[FINISHED][...] = self.finished

    def _exists(self) -> bool:
        try:
            self._zarr.open_group(self._path, mode="r")
        except FileNotFoundError:
            if Path(self._path).exists():
                raise ValueError(
                    f"save_to={self._path!r} is there already and no Zarr store. Give a "
                    "path that does not exist."
                ) from None
            return False
        return True

    def _create(self, grid: Grid, dataset, chunk: int) -> None:
        sizes = tuple(grid.sizes.values())
        encoding: dict[str, Any] = {FINISHED: {"chunks": sizes}}
        for name, x in self._arrays.items():
            own = x.shape[len(sizes) :]
            member = max(1, int(np.prod(own)) * x.dtype.itemsize)
            block = _block(sizes, min(chunk, max(1, PIECE // member)))
            encoding[name] = {"chunks": tuple(max(1, n) for n in (*block, *own))}
        finished = (tuple(grid.sizes), np.zeros(sizes, bool))
        # Format 2: strings have no settled form in format 3, and labels may be strings.
        dataset.assign({FINISHED: finished}).assign_attrs(sweep=grid.digests).to_zarr(
            self._path, mode="w-", zarr_format=2, consolidated=True, encoding=encoding
        )

    def _load(self, grid: Grid, dataset) -> None:
        xarray = _extras.load("xarray", "sweep", "lrjax.sweep")
        try:
            found = xarray.open_zarr(self._path, chunks=None, consolidated=True)
        except Exception as error:
            raise self._refusal("no store that a sweep has written") from error
        if "sweep" not in found.attrs or FINISHED not in found:
            raise self._refusal("no store that a sweep has written")
        if difference := _difference(grid, found):
            raise self._refusal(f"a sweep over another grid: {difference}")
        shapes = lambda variables: {
            name: (x.shape, str(x.dtype)) for name, x in variables.items()
        }
        stored = shapes(found.drop_vars(FINISHED).data_vars)
        if stored != (wanted := shapes(dataset.data_vars)):
            raise self._refusal(f"other results: {stored}, and here {wanted}")
        self.finished = np.array(found[FINISHED])
        if self.finished.any():
            for name, x in self._arrays.items():
                x[...] = found[name].values

    def _refusal(self, what: str) -> ValueError:
        return ValueError(
            f"save_to={self._path!r} holds {what}. Give another path, or delete the store "
            "to run this sweep from the start."
        )


def _check_names(names) -> None:
    bad = [name for name in names if name == FINISHED or "/" in name]
    if bad:
        raise ValueError(
            f"results named {bad} cannot be saved: {FINISHED!r} is a variable of the store "
            "itself and a name with '/' is a folder. Return them by other names."
        )


def _block(sizes: tuple[int, ...], members: int) -> tuple[int, ...]:
    """The shape of a block of the grid with about as many members, last axes whole."""
    shape = []
    for size in reversed(sizes):
        shape.append(min(size, members))
        members = max(1, members // size)
    return tuple(reversed(shape))


def _difference(grid: Grid, found) -> str:
    stored = found.attrs["sweep"]
    dims = [dim for dim in found[FINISHED].dims]
    if set(stored) != set(grid.digests) or dims != list(grid.sizes):
        return f"{sorted(stored)} with dimensions {dims}, and here {dict(grid.sizes)}"
    for name, digest in grid.digests.items():
        if stored[name] != digest:
            was, now = found[name].values, grid.coords[name][1]
            return f"{name!r} has the values {_short(was)} there and {_short(now)} here"
    return ""


def _short(values: np.ndarray) -> str:
    return f"{np.array2string(values, threshold=8)} ({values.dtype})"

"""Safetensors files: nothing is believed of one before it is checked, nothing executed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..._extras import load


_READ = ("F64", "F32", "F16", "BF16")


class Tensors:
    """Shapes of the tensors of an open file; the numbers of one are read when asked for."""

    def __init__(self, path: Path, opened: Any):
        self.path, self._file = path, opened
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        for name, part in slices.items():
            if part.get_dtype() not in _READ:
                raise ValueError(
                    f"The tensor {name!r} of {path} is {part.get_dtype()}; adapters are "
                    f"read in {_READ}."
                )

    def read(self, name: str) -> np.ndarray:
        """The numbers of one tensor, in the dtype of the file."""
        return self._file.get_tensor(name)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Tensors]:
    """The tensors of a file; raises a ``ValueError`` if it is cut off, or no such file."""
    library = load("safetensors", "peft", "Reading safetensors files")
    try:
        opened = library.safe_open(path, "numpy").__enter__()
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}): it was cut off on its way, or "
            "is something else."
        ) from error
    try:
        yield Tensors(path, opened)
    finally:
        opened.__exit__(None, None, None)


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a file whole or not at all."""
    library = load("safetensors.numpy", "peft", "Writing safetensors files")
    own = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    part = path.with_name(f"{path.name}.part")
    library.save_file(own, part, metadata={"format": "pt"})
    os.replace(part, path)

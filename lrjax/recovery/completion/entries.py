"""Entries of a matrix as three vectors."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from ...linalg import working_dtype
from .._inputs import VectorLike, as_indices, as_numbers


def check_entries(
    owner: str, rows: VectorLike, cols: VectorLike, values: VectorLike, shape: Sequence[int]
) -> tuple[Array, Array, Array]:
    """The entries as arrays; refuse what are none of a matrix of the given shape."""
    rows, cols = as_indices(owner, "rows", rows), as_indices(owner, "cols", cols)
    values = jnp.asarray(as_numbers(owner, values, "values"))
    if not (rows.ndim == 1 and rows.shape == cols.shape == values.shape):
        raise ValueError(
            f"{owner} needs vectors rows, cols and values of one length, got shapes "
            f"{rows.shape}, {cols.shape} and {values.shape}."
        )
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{owner} needs a shape (m, n) with m, n >= 1, got {shape}.")
    if rows.shape[0] == 0:
        raise ValueError(f"{owner} needs at least one observed entry, got none.")
    for name, index, size in zip(("rows", "cols"), (rows, cols), shape, strict=True):
        if isinstance(index, Tracer):
            continue
        # With numpy: under jit even the minimum of a constant is traced.
        least, most = np.asarray(index).min(), np.asarray(index).max()
        if least < 0 or most >= size:
            raise ValueError(
                f"{owner} needs {name} in [0, {size}) for a matrix of shape {shape}; got "
                f"{least} to {most}."
            )
    return rows, cols, values


def observed(
    rows: Array, cols: Array, values: Array, shape: tuple[int, int]
) -> tuple[Array, Array, Array]:
    """Entries in floating point; what is missing gets the indices ``(m, n)``."""
    m, n = shape
    values = values.astype(working_dtype(jnp.result_type(values.dtype, jnp.float32)))
    inside = (rows >= 0) & (rows < m) & (cols >= 0) & (cols < n)
    seen = inside & jnp.isfinite(values)
    rows = jnp.where(seen, rows, m).astype(jnp.int32)
    cols = jnp.where(seen, cols, n).astype(jnp.int32)
    return rows, cols, jnp.where(seen, values, 0)

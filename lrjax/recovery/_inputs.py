"""What people have in their hands, as arrays: tables, sparse and masked matrices."""

import operator
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int


MatrixLike: TypeAlias = Any  # what as_matrix takes
VectorLike: TypeAlias = Any  # arrays, lists and columns of tables
MATRIX_HELP = (
    "Accepted are arrays of real numbers, numpy.ma arrays, pandas tables and, with a mask, "
    "scipy.sparse matrices; NaN counts as missing."
)


class MatrixEntries(NamedTuple):
    """The entries of a matrix that are known, as :func:`fit_completion` takes them.

    Attributes:
        rows: the row of each.
        cols: its column.
        values: what it is.
        shape: ``(m, n)`` of the whole matrix.
    """

    rows: Int[Array, " count"]
    cols: Int[Array, " count"]
    values: Float[Array, " count"]
    shape: tuple[int, int]


def matrix_entries(matrix: Any, mask: Any = None) -> MatrixEntries:
    """The observed entries of a table, for :func:`fit_completion`.

    Of a sparse matrix those that are stored, zeros included; of anything else those that
    are finite and neither masked nor NaN.

    Args:
        matrix: ``(m, n)``: an array, a ``numpy.ma`` array, a pandas table, or any matrix
            of scipy.sparse. Integers count as numbers. A traced array keeps all of its
            entries, those that are not observed as NaN: their number is part of a shape.
        mask: boolean ``(m, n)``, true where an entry is observed.

    Returns:
        :class:`MatrixEntries`, so that ``fit_completion(*matrix_entries(table))`` fits.

    Raises:
        TypeError: for booleans, dates, text, or objects that are not numbers.
        ValueError: for an array that is no matrix, or a mask that does not fit it.

    Example:
        >>> import numpy as np, lrjax
        >>> table = np.array([[1.0, np.nan], [3.0, 4.0]])
        >>> rows, cols, values, shape = lrjax.recovery.matrix_entries(table)
        >>> rows.tolist(), cols.tolist(), values.tolist(), shape
        ([0, 1, 1], [0, 0, 1], [1.0, 3.0, 4.0], (2, 2))
    """
    if _is_sparse(matrix):
        return _stored_entries(matrix, mask)
    x, seen = as_matrix("matrix_entries", matrix, mask)
    if isinstance(x, Tracer) or isinstance(seen, Tracer):
        x = jnp.asarray(x) if seen is None else jnp.where(seen, x, jnp.nan)
        m, n = x.shape
        rows = jnp.repeat(jnp.arange(m), n)
        return MatrixEntries(rows, jnp.tile(jnp.arange(n), m), x.ravel(), (m, n))
    x = np.asarray(x)
    known = np.isfinite(x) if seen is None else np.isfinite(x) & np.asarray(seen)
    rows, cols = np.nonzero(known)
    return _entries(rows, cols, x[known], x.shape)


def _stored_entries(matrix: Any, mask: Any) -> MatrixEntries:
    stored = matrix.tocoo()
    rows, cols = stored.row, stored.col
    values = as_numbers("matrix_entries", stored.data)
    known = np.isfinite(values)
    if mask is not None:
        known = known & as_mask("matrix_entries", mask, matrix.shape)[rows, cols]
    return _entries(rows[known], cols[known], values[known], matrix.shape)


def _entries(rows, cols, values, shape) -> MatrixEntries:
    m, n = (int(size) for size in shape)
    rows, cols = jnp.asarray(rows, jnp.int32), jnp.asarray(cols, jnp.int32)
    return MatrixEntries(rows, cols, jnp.asarray(values), (m, n))


def as_matrix(owner: str, matrix: Any, mask: Any = None) -> tuple[Any, Any]:
    """A matrix of numbers, NaN or masked where it is missing, and its mask.

    Args:
        owner: who asks, for the sentences.
        matrix: see :func:`matrix_entries`; a sparse one needs a mask that says which of
            its zeros are observed.
        mask: boolean, or ``None``.

    Returns:
        The matrix, as numpy or jax array, and the mask of the same kind or ``None``.

    Raises:
        TypeError: for what is not made of numbers, with the column if it has a name.
        ValueError: for other than two axes; a mask that does not fit; a sparse matrix
            without a mask.
    """
    if _is_sparse(matrix):
        if mask is None:
            raise ValueError(
                f"{owner} cannot tell whether the entries that a sparse matrix does not "
                "store are zeros or missing. Zeros: pass matrix.toarray(). Missing: pass "
                "mask=, true where an entry is observed, as in mask=(pattern != 0)."
            )
        matrix = matrix.toarray()
    if isinstance(matrix, np.ma.MaskedArray):
        numbers = as_numbers(owner, matrix.data)
        visible = ~np.ma.getmaskarray(matrix)
        matrix = numbers
        mask = visible if mask is None else visible & as_mask(owner, mask, visible.shape)
    else:
        matrix = as_numbers(owner, matrix)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(
            f"{owner} needs a matrix (m, n) with entries, got shape {matrix.shape}. "
            "For several matrices at once use jax.vmap."
        )
    return matrix, None if mask is None else as_mask(owner, mask, matrix.shape)


def as_mask(owner: str, mask: Any, shape: tuple[int, ...]) -> Any:
    """A boolean mask of a given shape, or a sentence."""
    if _is_sparse(mask):
        mask = mask.toarray()
    mask = mask if isinstance(mask, Array | Tracer) else np.asarray(mask)
    if np.dtype(mask.dtype).kind != "b":
        raise ValueError(
            f"{owner}: the mask must be boolean, true where an entry is observed; got "
            f"{mask.dtype}. Convert it with mask.astype(bool)."
        )
    if mask.shape != tuple(shape):
        raise ValueError(
            f"{owner}: the mask must have the shape of the matrix, {tuple(shape)}; got "
            f"{mask.shape}."
        )
    return mask


def as_numbers(owner: str, x: Any, of: str = "the matrix") -> Any:
    """An array of real numbers out of an array, a table or a list; else a sentence."""
    if isinstance(x, Array | Tracer):
        _check_dtype(owner, x.dtype, of)
        return x
    if _is_table(x):
        return _table_numbers(owner, x)
    x = np.asarray(x)
    if x.dtype.kind == "O":
        return _object_numbers(owner, x, of)
    _check_dtype(owner, x.dtype, of)
    return x


def as_indices(owner: str, name: str, x: Any) -> Int[Array, "..."]:
    """An array of integers, or a sentence that says how names become integers."""
    x = x if isinstance(x, Array | Tracer) else np.asarray(x)
    if not np.issubdtype(x.dtype, np.integer):
        raise TypeError(
            f"{owner} needs integers as {name}, got {x.dtype}. Names become integers by "
            "pandas.factorize(names) or numpy.unique(names, return_inverse=True)."
        )
    return jnp.asarray(x)


def _check_dtype(owner: str, dtype: Any, of: str) -> None:
    if jnp.issubdtype(dtype, np.complexfloating):
        raise ValueError(f"{owner} needs real numbers, but {of} is {dtype}.")
    if np.dtype(dtype).kind == "b":
        raise TypeError(
            f"{owner} needs numbers, but {of} is boolean. If false and true stand for 0 "
            f"and 1, convert it with .astype(float). {MATRIX_HELP}"
        )
    if not jnp.issubdtype(dtype, np.number) or np.dtype(dtype).kind == "m":
        dates = np.dtype(dtype).kind in "mM"
        fix = (
            "Take a difference from a first date and divide it by a unit, as in "
            "(x - x.min()) / np.timedelta64(1, 'D')."
            if dates
            else "Drop it, or encode it as numbers."
        )
        raise TypeError(f"{owner} needs numbers, but {of} is {dtype}. {fix} {MATRIX_HELP}")


def _table_numbers(owner: str, table: Any) -> np.ndarray:
    """A pandas table, with NaN for its missing values; its dtypes are told by column."""
    columns = []
    for place, name in enumerate(table.columns):
        column = table.iloc[:, place]
        kind = getattr(column.dtype, "numpy_dtype", column.dtype)
        if kind == np.dtype(object):
            values = _object_numbers(owner, column.to_numpy(), f"column {name!r}")
        else:
            native = isinstance(kind, np.dtype)
            _check_dtype(owner, kind if native else np.dtype(str), f"column {name!r}")
            values = column.to_numpy(dtype=float, na_value=np.nan)
        columns.append(values)
    return np.stack(columns, axis=1) if columns else np.empty(table.shape)


def _object_numbers(owner: str, x: np.ndarray, of: str) -> np.ndarray:
    """Numbers and None (missing) that are kept as objects."""
    strange = {type(v).__name__ for v in x.ravel() if not _is_number(v)}
    if strange:
        raise TypeError(
            f"{owner} needs numbers, but {of} holds objects of type "
            f"{', '.join(sorted(strange))}. {MATRIX_HELP}"
        )
    return np.array([np.nan if v is None else v for v in x.ravel()], float).reshape(x.shape)


def _is_number(x: Any) -> bool:
    real = isinstance(x, int | float | np.integer | np.floating)
    return x is None or (real and not isinstance(x, bool | np.bool_))


def _is_sparse(x: Any) -> bool:
    """Whether it is a matrix of scipy.sparse, which need not be installed."""
    return hasattr(x, "tocoo") and hasattr(x, "toarray")


def _is_table(x: Any) -> bool:
    return hasattr(x, "columns") and hasattr(x, "iloc")


def check_width(owner: str, rank: Any, most: int, shape: tuple[int, ...]) -> int:
    """A rank as an integer between 1 and ``most``."""
    try:
        whole = operator.index(rank)
    except TypeError:
        raise TypeError(
            f"{owner}: rank must be an integer, static under jit; got {rank!r}."
        ) from None
    if not 1 <= whole <= most:
        raise ValueError(
            f"rank must be between 1 and {most} for a matrix of shape {shape}, got {rank}."
        )
    return whole


def check_not_negative(owner: str, **numbers: Any) -> None:
    """Refuse negative numbers and NaN where their values are known."""
    for name, x in numbers.items():
        if x is None or isinstance(x, Tracer):
            continue
        # With numpy: under jit even a comparison of constants is traced.
        if not (np.asarray(x) >= 0).all():
            raise ValueError(f"{owner}: {name} must not be negative, got {x}.")

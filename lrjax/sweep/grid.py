"""The points of a grid: their labels, their places, and which share a compiled program."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np


SHOWN = 3  # points of a chunk that an error names

Values = np.ndarray | jax.Array  # the latter for keys alone, which numpy does not know


class Group(NamedTuple):
    """Members that one compiled program can run.

    Attributes:
        static: the values that are part of the program, by name, in a hashable form.
        where: ``(members,)``, their places in the flattened grid.
        points: by name the values of all members, ``(members,)``.
        labels: by name what the values of all members are called, ``(members,)``.
    """

    static: tuple[tuple[str, Any], ...]
    where: np.ndarray
    points: dict[str, Values]
    labels: dict[str, np.ndarray]

    def describe(self, members: np.ndarray) -> str:
        """Some of the members in words, by what they are called with."""
        names = [  # as strings: numpy formats float32 as float64
            ", ".join(f"{name}={labels[i]!s}" for name, labels in self.labels.items())
            for i in members[:SHOWN]
        ]
        rest = len(members) - len(names)
        return "; ".join(names) + (f"; and {rest} more" if rest else "")


class Grid(NamedTuple):
    """A grid of points.

    Attributes:
        sizes: its dimensions.
        coords: the values along them, as ``xarray.Dataset`` takes them.
        groups: all of its points.
        digests: a short text for each name that differs where its values do.
    """

    sizes: dict[str, int]
    coords: dict[str, tuple[str, np.ndarray]]
    groups: list[Group]
    digests: dict[str, str]


def make_grid(grid: Mapping[str, Any], static: Mapping[str, Any], over: str) -> Grid:
    """Check the values of a grid and lay out its points."""
    if over not in ("product", "zip"):
        raise ValueError(f"over must be 'product' or 'zip', got {over!r}.")
    fixed = {name: _check_static(name, values) for name, values in static.items()}
    free = {name: _check_values(name, values) for name, values in grid.items()}
    if twice := sorted(fixed.keys() & free.keys()):
        raise ValueError(f"{twice} are in the grid and in static: a name is one of both.")
    labels = {name: _labels(v) for name, v in fixed.items()}
    labels |= {name: _coordinate(v) for name, v in free.items()}
    if not labels:
        raise ValueError("sweep got an empty grid: give at least one name with its values.")
    lengths = {name: len(v) for name, v in labels.items()}
    if over == "product":
        sizes, dims = lengths, {name: name for name in lengths}
        indices = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)
    else:
        if len(set(lengths.values())) > 1:
            raise ValueError(f"over='zip' needs values of one length, got {lengths}.")
        sizes, dims = {"member": max(lengths.values())}, dict.fromkeys(lengths, "member")
        indices = np.tile(np.arange(sizes["member"]), (len(lengths), 1))
    index = dict(zip(lengths, indices, strict=True))
    return Grid(
        sizes,
        {name: (dims[name], v) for name, v in labels.items()},
        _groups(fixed, free, labels, index),
        {name: _digest(free.get(name, labels[name])) for name in labels},
    )


def _groups(
    fixed: dict[str, list],
    free: dict[str, Values],
    labels: dict[str, np.ndarray],
    index: dict[str, np.ndarray],
) -> list[Group]:
    """Points with the same static values together, in the order of the grid."""
    total = len(next(iter(index.values())))
    members: dict[tuple, list[int]] = {}
    for i in range(total):
        static = tuple((name, v[index[name][i]]) for name, v in fixed.items())
        members.setdefault(static, []).append(i)
    groups = []
    for static, places in members.items():
        where = np.asarray(places)
        pick = lambda values, where=where: {
            name: v[index[name][where]] for name, v in values.items()
        }
        groups.append(Group(static, where, pick(free), pick(labels)))
    return groups


def _coordinate(values: Values) -> np.ndarray:
    """The labels of the values of one name."""
    if jnp.issubdtype(values.dtype, jax.dtypes.prng_key):
        return np.arange(len(values))  # a key has no label of its own
    return np.asarray(values)


def _labels(values: list) -> np.ndarray:
    if all(isinstance(v, int | float | str | np.generic) for v in values):
        return np.asarray(values)
    return np.asarray([getattr(v, "__name__", str(v)) for v in values])


def _check_values(name: str, values: Any) -> Values:
    values = jnp.asarray(values)  # in the precision that JAX has
    if not jnp.issubdtype(values.dtype, jax.dtypes.prng_key):
        values = np.asarray(values)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(
            f"the grid's values for {name!r} must be one-dimensional and not empty, "
            f"got shape {values.shape}."
        )
    return values


def _check_static(name: str, values: Any) -> list:
    is_list = isinstance(values, Iterable) and not isinstance(values, str)
    found = list(values) if is_list else []
    if not found:
        raise ValueError(
            f"static values for {name!r} must be a list that is not empty, got {values!r}."
        )
    for value in found:
        try:
            hash(value)
        except TypeError:
            raise ValueError(
                f"static values are part of the compiled program and must be hashable, as "
                f"numbers, strings and tuples are; {name!r} has {value!r}."
            ) from None
    return found


def _digest(values: Values) -> str:
    if jnp.issubdtype(values.dtype, jax.dtypes.prng_key):
        values = jr.key_data(values)
    values = np.asarray(values)
    return hashlib.sha256(f"{values.dtype}".encode() + values.tobytes()).hexdigest()[:16]

from collections.abc import Callable
from typing import Any

import optax
from jaxtyping import Array, ArrayLike, Int

from ...linalg import map_singular_values


def at(number: optax.ScalarOrSchedule, count: Int[Array, ""]) -> Any | ArrayLike:
    """A number, or that of a schedule."""
    return number(count) if callable(number) else number


def ending_at(f: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """Of a matrix the step that ends where ``f`` has mapped the singular values."""

    def step(update: Array, x: Array) -> Array:
        goal = (x + update).astype(x.dtype)
        return (map_singular_values(f, goal) - x).astype(update.dtype)

    return step

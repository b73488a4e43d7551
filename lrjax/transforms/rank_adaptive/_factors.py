from typing import Any

import optax
from jaxtyping import Array, ArrayLike, Int


def at(number: optax.ScalarOrSchedule, count: Int[Array, ""]) -> Any | ArrayLike:
    """A number, or that of a schedule."""
    return number(count) if callable(number) else number

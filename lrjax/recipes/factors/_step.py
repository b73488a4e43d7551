from typing import Literal

import optax
from jaxtyping import ArrayLike

from ...transforms import scale_by_level, scale_by_polyak


Minimum = ArrayLike | Literal["search"] | None


def known_minimum(f_min: Minimum) -> ArrayLike | None:
    """The smallest loss where it is given as a number."""
    return None if isinstance(f_min, str) else f_min


def step_size(f_min: Minimum) -> optax.GradientTransformation:
    """Polyak's step for a known or a searched smallest loss; ``None``: no change."""
    if f_min is None:
        return optax.identity()
    if isinstance(f_min, str):
        if f_min != "search":
            raise ValueError(f'f_min must be a number, "search" or None, got {f_min!r}.')
        return scale_by_level()
    return scale_by_polyak(f_min)

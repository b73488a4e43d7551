from collections.abc import Callable

import numpy as np
from jax.core import Tracer
from jaxtyping import ArrayLike


def check_non_negative(function: str, argument: str, value: ArrayLike | Callable) -> None:
    """Refuse negative numbers; tracers and schedules cannot be looked at and pass."""
    if callable(value) or isinstance(value, Tracer):
        return
    # NumPy, because jax.numpy would trace the comparison inside a jitted function.
    if not bool((np.asarray(value) >= 0).all()):
        raise ValueError(f"{function} needs {argument} >= 0, got {value}.")


def check_extra(function: str, **extra) -> None:
    """Refuse an update that was called without an extra argument it needs."""
    missing = [name for name, value in extra.items() if value is None]
    if missing:
        call = ", ".join(f"{name}=…" for name in extra)
        raise ValueError(
            f"{function} needs the extra argument{'s' * (len(missing) > 1)} "
            f"{' and '.join(missing)}: call tx.update(grads, state, params, {call}) with "
            "the loss as value and the raw gradient as grad."
        )

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..linalg import nonzero, svd, working_dtype


def as_samples(function: str, samples: Any, least: int = 2) -> Float[Array, "n d"]:
    """Samples as a matrix of real numbers in float32 or wider, one in a row."""
    samples = jnp.asarray(samples)
    if samples.ndim != 2 or len(samples) < least or not samples.shape[1]:
        raise ValueError(
            f"{function} takes samples (n, d), one in a row and at least {least}, got "
            f"shape {samples.shape}: images are to be flattened, x.reshape(len(x), -1)."
        )
    if jnp.issubdtype(samples.dtype, jnp.complexfloating):
        raise TypeError(f"{function} takes real samples, got {samples.dtype}.")
    return samples.astype(working_dtype(samples.dtype))


def check_whole(function: str, name: str, value: Any, most: int | None = None) -> None:
    """Refuse what is no number of things, or more than there are."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 1 or (most is not None and value > most):
        upper = "" if most is None else f" and at most {most}"
        raise ValueError(
            f"{function} needs {name}, an integer of at least 1{upper}, got {value!r}."
        )


def in_their_span(samples: Float[Array, "n d"]) -> Float[Array, "n k"]:
    """The samples in an orthonormal basis of their span, where that is shorter.

    Inner products stay as they are.
    """
    samples = lax.stop_gradient(samples)
    if samples.shape[1] <= samples.shape[0]:
        return samples
    left, values, _ = svd(samples)
    return left * values[None, :]


def share_of_largest(
    values: Float[Array, " k"], fit_weight: Any, relative: bool
) -> Float[Array, ""]:
    """``1 / τ``, of a τ that is absolute or in units of ``1 / σ₁²``."""
    unit = nonzero(values[0] ** 2) if relative else 1
    return jnp.asarray(unit / jnp.asarray(fit_weight, values.dtype), values.dtype)

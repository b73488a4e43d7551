"""What the settings of several kinds have in common."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from .._sites import Site
from ..linalg import working_dtype


def checked_rank(kind: str, rank: Any, what: str = "rank") -> int:
    """The rank, or another count, as an int of at least 1."""
    if isinstance(rank, np.integer):
        rank = int(rank)
    if isinstance(rank, (list, tuple, np.ndarray, jax.Array)) and np.ndim(rank):
        raise ValueError(
            f"{kind} is the recipe for one matrix and has one {what}, got {rank!r}. For "
            "layers of a stack with a rank each answer with a list of kinds, "
            f"lrjax.adapt(model, lambda path, site: [{kind}(r) for r in ranks], …); or "
            "adapt with the largest and mask the others by lrjax.adapters.with_ranks."
        )
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{kind} needs a {what} of at least 1 (an int), got {rank!r}.")
    return rank


def check_fits(kind: str, rank: int, site: Site) -> None:
    """Refuse more singular vectors than a matrix has."""
    if rank > min(site.shape):
        raise ValueError(
            f"{kind} takes {rank} singular vectors or pivots of the weight, and "
            f"{site.path or 'the root'} {site.shape} has {min(site.shape)} of them."
        )


def check_divides(kind: str, name: str, number: int, site: Site) -> None:
    """Refuse sides of a matrix that are no multiples of a number."""
    if any(side % number for side in site.shape):
        raise ValueError(
            f"{kind} cuts both sides of the weight into equal parts, and {name}={number} "
            f"does not divide those of {site.path or 'the root'} {site.shape}: choose "
            f"another {name}, for this layer alone by a rule (path, site) -> kind."
        )


def checked_dropout(kind: str, dropout: ArrayLike) -> ArrayLike | None:
    """The rate, or ``None`` where there is no dropout: for a plain 0."""
    if isinstance(dropout, Tracer):
        return dropout
    if not np.all((np.asarray(dropout) >= 0) & (np.asarray(dropout) < 1)):
        raise ValueError(f"{kind}'s dropout must be in [0, 1), got {dropout!r}.")
    return None if isinstance(dropout, (int, float)) and dropout == 0 else dropout


def as_dtype(dtype: Any, site: Site) -> Any:
    """The dtype that is asked for, or else that of the weight."""
    return site.dtype if dtype is None else jnp.dtype(dtype)


def as_number(x: ArrayLike, dtype: Any) -> Array:
    """A hyper-parameter as an array, in float32 or higher."""
    return jnp.asarray(x, working_dtype(dtype))


def over_rank(alpha: ArrayLike | None, rank: int, dtype: Any) -> Array:
    """The scale ``alpha / rank``, one by default."""
    return as_number(1.0 if alpha is None else alpha / rank, dtype)


def as_rate(x: ArrayLike | None, dtype: Any) -> Array | None:
    """The same for a rate, where there is one."""
    return None if x is None else as_number(x, dtype)


def kaiming_uniform(
    key: PRNGKeyArray, shape: tuple[int, ...], fan_in: int, dtype: Any
) -> Array:
    """Uniform in ``±1/√fan_in``."""
    bound = 1 / math.sqrt(max(fan_in, 1))
    return jr.uniform(key, shape, dtype, -bound, bound)

"""The loop that every separation of a matrix by alternating two updates runs in."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Real

from ...linalg import (
    cross,
    inverse_gram,
    inverse_root_gram,
    nonzero,
    subspace_iteration,
    times,
    working_dtype,
)
from ...lowrank import LowRank
from ..descent import Observer, SolveState, scan_until_stopped
from ..problems import observed_entries


class Separation(eqx.Module):
    """A matrix taken apart, ``matrix ≈ low_rank + sparse``, and how that went.

    Attributes:
        low_rank: the low-rank part.
        sparse: ``(m, n)``, the gross errors; zero where nothing is observed.
        residual: ``(steps,)``, at the start of every step
            ``‖matrix − low_rank − sparse‖ / ‖matrix‖`` over what is observed; after an
            early stop the last one repeats.
        observed: what ``observe`` returned at the start of every step, stacked.
        steps: the steps taken.
        converged: whether the residual fell to ``tol``; false without ``tol``.
        state: what the method keeps between steps, see there.
    """

    low_rank: LowRank
    sparse: Float[Array, "m n"]
    residual: Float[Array, " steps"]
    observed: PyTree
    steps: Int[Array, ""]
    converged: Bool[Array, ""]
    state: PyTree


class Rule(NamedTuple):
    """A method: how each part follows from the other.

    Attributes:
        sparse: ``(matrix − low rank, state) -> sparse part``.
        low_rank: ``(low rank, error, state) -> (low rank, state)``, where the error is
            ``matrix − low rank − sparse``.
    """

    sparse: Callable[[Array, Any], Array]
    low_rank: Callable[[LowRank, Array, Any], tuple[LowRank, Any]]


class Observed(NamedTuple):
    """A matrix with zeros where it is not observed, and the mask of where it is."""

    matrix: Float[Array, "m n"]
    mask: Bool[Array, "m n"]

    def share(self) -> Float[Array, ""]:
        """The share of entries that is observed; one entry at least."""
        count = jnp.sum(self.mask, dtype=self.matrix.dtype)
        return jnp.maximum(count, 1) / self.mask.size

    def rest(self, x: LowRank) -> Float[Array, "m n"]:
        """What a low-rank part leaves of the observed entries."""
        return jnp.where(self.mask, self.matrix - x.materialize(), 0)


def observed(
    method: str, matrix: Real[Array, "..."], mask: Bool[Array, "..."] | None
) -> Observed:
    """Check a matrix and its mask; entries that are not finite count as missing."""
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(
            f"{method} needs a matrix (m, n) with entries, got shape {matrix.shape}. For "
            "several matrices at once use jax.vmap."
        )
    dtype = working_dtype(jnp.result_type(matrix.dtype, jnp.float32))
    return Observed(*observed_entries(matrix.astype(dtype), mask))


def check_rank(method: str, rank: int, shape: tuple[int, ...]) -> None:
    """Refuse a rank that a matrix cannot have."""
    if not 1 <= rank <= min(shape):
        raise ValueError(
            f"{method}: rank must be between 1 and {min(shape)} for a matrix of shape "
            f"{shape}, got {rank}."
        )


def alternate(
    data: Observed,
    x: LowRank,
    state: PyTree,
    rule: Rule,
    *,
    max_steps: int,
    tol: ArrayLike | None = None,
    observe: Observer | None = None,
) -> Separation:
    """Apply a rule until the parts explain the matrix to a tolerance.

    Args:
        data: what is known of the matrix.
        x: the first low-rank part.
        state: the first state of the rule.
        rule: the two updates.
        max_steps: at most as many.
        tol: stop at this relative residual, or at one that is not finite; ``None``
            takes all steps, and only then can the result be differentiated in reverse.
        observe: called with a :class:`lrjax.recovery.SolveState` in every step.

    Returns:
        The parts.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}.")
    size = nonzero(_norm(data.matrix))

    def step(carry: _Carry, index) -> tuple[_Carry, tuple]:
        rest = data.rest(carry.x)
        error = rest - rule.sparse(rest, carry.state)
        residual = _norm(lax.stop_gradient(error)) / size
        state = SolveState(index, carry.x, residual)
        record = residual, None if observe is None else observe(state)
        running = carry.running
        if tol is not None:
            # A NaN compares false, so a member of a batch that diverged stops too.
            running = running & (residual > tol)
        x, state = rule.low_rank(carry.x, error, carry.state)
        return _Carry(x, state, running, carry.taken + 1), record

    start = _Carry(x, state, jnp.array(True), jnp.zeros((), jnp.int32))
    if tol is None:
        end, record = lax.scan(step, start, jnp.arange(max_steps))
    else:
        end, record = scan_until_stopped(step, start, max_steps)
    sparse = rule.sparse(data.rest(end.x), end.state)
    residuals, seen = record
    converged = ~end.running & jnp.isfinite(residuals[-1])
    return Separation(end.x, sparse, residuals, seen, end.taken, converged, end.state)


class _Carry(eqx.Module):
    x: LowRank
    state: PyTree
    running: Array
    taken: Array


def leading_factors(matrix: Float[Array, "m n"], rank: int, *, rounds: int = 4) -> LowRank:
    """The projection of a matrix on about its leading right singular vectors.

    Matrix products and ``r × r`` factorizations: rows may be sharded, and unlike an SVD it
    is differentiable as it stands.
    """
    start = jr.normal(jr.key(0), (matrix.shape[1], rank), matrix.dtype)
    basis = subspace_iteration(
        lambda v: times(matrix, v),
        lambda u: cross(matrix, u),
        start,
        steps=rounds,
        # orthonormalize counts as a constant; this can be differentiated.
        orthonormalize=lambda x: times(x, inverse_root_gram(x)),
    )
    return LowRank(times(times(matrix, basis), inverse_gram(basis)), basis)


def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(x * x))

"""The loop of both tensor fits: thresholds on the unfoldings that fall step by step.

A constant, the center of the entries, is fitted beside the part of low rank: no unfolding
has to spend a direction on it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..._progress import Meter
from ...linalg import nonzero
from ...lowrank import TuckerForm, multiply_axes, unfolded_svd
from .._median import median_between


PREFERRED = 0.93  # of the smallest error held out: what a later step must be below
POLISH = 30  # steps at the last threshold


class Path(NamedTuple):
    """The state of the loop.

    Attributes:
        cleaned: the tensor that is cut, without its gross errors and gaps.
        memory: what the rule keeps.
        core: of the low-rank part in ``factors``.
        factors: ``(n_k, d_k)``, the columns in use orthonormal, zeros beyond.
        ranks: how many are in use.
        center: the constant beside the low-rank part.
        whole: the low-rank part with the center, dense.
        penalty: one over the threshold, up to a factor for each axis.
        residual: of the last step, relative.
        steps: how many were made.
        best: the penalty of the smallest error held out.
        error: this error, the median of absolute ones.
        left: steps left at the last threshold.
    """

    cleaned: Float[Array, "*s"]
    memory: Any
    core: Float[Array, "*r"]
    factors: tuple[Float[Array, "_n _d"], ...]
    ranks: Int[Array, " d"]
    center: Float[Array, ""]
    whole: Float[Array, "*s"]
    penalty: Float[Array, ""]
    residual: Float[Array, ""]
    steps: Int[Array, ""]
    best: Float[Array, ""]
    error: Float[Array, ""]
    left: Int[Array, ""]


# (low rank with center, its change, memory, penalty) -> (cleaned, memory, growth, residual)
Rule = Callable[[Array, Array, Any, Array], tuple[Array, Any, Array, Array]]


def cut(
    cleaned: Array, levels: Array, ranks: Array, widths: tuple[int, ...]
) -> tuple[TuckerForm, Array]:
    """Keep of every unfolding the singular vectors with values above its level.

    Values far below the largest are not resolved by Gram matrices: a level down there
    keeps as many as the one before.
    """
    resolved = 3 * jnp.sqrt(jnp.finfo(cleaned.dtype).eps)
    values, vectors = unfolded_svd(cleaned)
    counts, bases = [], []
    for axis, width in enumerate(widths):
        s, level = values[axis][:width], levels[axis]
        above = jnp.sum(s > level, dtype=jnp.int32)
        counts.append(jnp.where(level > resolved * s[0], above, ranks[axis]))
        kept = jnp.arange(width) < counts[-1]
        bases.append(jnp.where(kept[None, :], vectors[axis][:, :width], 0))
    core = multiply_axes(cleaned, tuple(b.T for b in bases))
    return TuckerForm(core, bases), jnp.stack(counts)


def follow(
    start: Array,
    memory: Any,
    penalty: Array,
    scales: Array,
    widths: tuple[int, ...],
    rule: Rule,
    seen: Bool[Array, "*s"],
    held: Bool[Array, "*s"],
    tensor: Array,
    *,
    last: Array,
    tol: Array,
    max_steps: int,
    meter: Meter | None,
) -> Path:
    """Let the thresholds fall until the parts explain the tensor, or to a last one.

    Args:
        start: the first cleaned tensor.
        memory: the first memory of the rule.
        penalty: the first penalty; the threshold of axis k is ``scales[k] / penalty``.
        scales: ``(d,)``.
        widths: the largest ranks.
        rule: what follows from a low-rank part.
        seen: entries that the rule sees, which have the center as their mean.
        held: entries that it does not see, on which the steps are judged.
        tensor: what is observed.
        last: the largest penalty.
        tol: stop at this residual.
        max_steps: at most as many steps.
        meter: is told the residuals.
    """
    count, all_seen = jnp.sum(held), jnp.sum(seen)

    def step(state: Path) -> Path:
        levels = scales / state.penalty
        found, ranks = cut(state.cleaned - state.center, levels, state.ranks, widths)
        low_rank = found.materialize()
        rest = jnp.sum(jnp.where(seen, state.cleaned - low_rank, 0))
        center = rest / jnp.maximum(all_seen, 1)
        whole = low_rank + center
        cleaned, memory, growth, residual = rule(
            whole, whole - state.whole, state.memory, state.penalty
        )
        error = median(jnp.where(held, jnp.abs(tensor - whole), 0), count)
        if meter is not None:
            meter.at(state.steps, residual)
        better = (error < PREFERRED * state.error) & jnp.any(ranks > 0)
        return Path(
            cleaned,
            memory,
            found.core,
            found.factors,
            ranks,
            center,
            whole,
            jnp.minimum(growth * state.penalty, last),
            residual,
            state.steps + 1,
            jnp.where(better, state.penalty, state.best),
            jnp.where(better, error, state.error),
            jnp.where(state.penalty < last, POLISH, state.left - 1),
        )

    def unfinished(state: Path) -> Array:
        going = (state.residual > tol) & (state.left > 0)  # false for NaN
        return (state.steps < max_steps) & going

    dtype, d = start.dtype, start.ndim
    first = Path(
        start,
        memory,
        jnp.zeros(widths, dtype),
        tuple(jnp.zeros(f, dtype) for f in zip(start.shape, widths, strict=True)),
        jnp.zeros(d, jnp.int32),
        jnp.zeros((), dtype),
        jnp.zeros_like(start),
        jnp.minimum(penalty, last),
        jnp.full((), jnp.inf, dtype),
        jnp.zeros((), jnp.int32),
        last,
        jnp.full((), jnp.inf, dtype),
        jnp.full((), POLISH, jnp.int32),
    )
    end = lax.while_loop(unfinished, step, first)
    if meter is not None:
        meter.end(end.steps)
    return end


def median(errors: Array, count: Array) -> Array:
    """The median of the ``count`` largest, the others being zeros."""
    is_above = lambda c: jnp.sum(errors > c) > 0.5 * count
    top = jnp.max(errors)
    found = median_between(jnp.zeros_like(top), top, is_above)
    return jnp.where(count > 0, found, jnp.inf)


def norm(x: Array) -> Array:
    """The Frobenius norm."""
    return jnp.sqrt(jnp.sum(x * x))


def relative_norm(x: Array, y: Array) -> Array:
    """``‖x‖ / ‖y‖``."""
    return norm(x) / nonzero(norm(y))

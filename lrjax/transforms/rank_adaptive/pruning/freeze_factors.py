from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Int, PyTree

from ...._arguments import checks_trees
from ...._batching import any_member
from ...._matrices import check_real
from ...._tree import check_alike, check_has_nodes, check_params, named_factors, put_factors
from ....linalg import increment, order_statistic, working_dtype
from .._factors import at
from .sensitivity import Sensitivity


class FreezeFactorsState(NamedTuple):
    """The state of :func:`freeze_factors`.

    Attributes:
        count: the number of steps.
        window: the average of the samples since the last full window.
        sensitivity: running averages of full windows.
        frozen: bools ``(*b,)``, whether a factor has stopped.
        inner: the state of the optimizer.
    """

    count: Int[Array, ""]
    window: PyTree
    sensitivity: Sensitivity
    frozen: PyTree
    inner: Any


@checks_trees
def freeze_factors(
    inner: optax.GradientTransformation,
    fraction: optax.ScalarOrSchedule,
    *,
    window: int | Array = 10,
    b1: ArrayLike = 0.85,
    b2: ArrayLike = 0.95,
) -> optax.GradientTransformationExtraArgs:
    """Stop factors one after the other, those first on which the loss hangs least.

    Samples ``|sign(θ) ∘ ∇θ|`` are averaged over windows of steps, the windows into a
    :class:`lrjax.transforms.Sensitivity`. At the end of a window, of the ``n`` numbers in
    factors that still move, let ``q`` be the score of the ``⌊(1 − fraction) n⌋``-th
    smallest: a factor whose mean score is below ``q`` stops, for good. What is no factor
    of a LowRank node or of a pool that layers share moves on.

    Shapes are fixed, so that what is frozen saves no time or memory here: it keeps
    factors from overfitting.

    Args:
        inner: an optimizer, with its learning rate.
        fraction: of numbers that are kept, falling from 1 to 0, a schedule as
            ``cubic_schedule(1.0, 0.0, begin=…, end=…)``. At 0 it is acted on in every step.
        window: how many steps are averaged; may be traced.
        b1: of the running average of windows.
        b2: of the running average of their deviations.

    Returns:
        An optax transform around the inner one.

    Raises:
        ValueError: for a window below 1; at ``init``, if there is no LowRank node.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> schedule = lrjax.transforms.cubic_schedule(1.0, 0.0, begin=2, end=8)
        >>> tx = lrjax.freeze_factors(optax.sgd(0.1), schedule, window=2)
        >>> x = lrjax.LowRank(jnp.ones((4, 1)), jnp.ones((3, 1)))
        >>> state = tx.init(x)
        >>> for step in range(10):
        ...     slope = lrjax.LowRank(2 * x.left, 0.1 * x.right)
        ...     updates, state = tx.update(slope, state, x)
        ...     x = optax.apply_updates(x, updates)
        >>> bool(state.frozen.left), bool(state.frozen.right)
        (False, True)

    Reference:
        Z. Liu et al., "AFLoRA: adaptive freezing of low rank adaptation in parameter
        efficient fine-tuning of large models" (2024), arXiv:2403.13269.
    """
    if not isinstance(window, Tracer) and window < 1:
        raise ValueError(f"freeze_factors needs a window of at least 1, got {window}.")
    inner = optax.with_extra_args_support(inner)

    def init(params):
        check_real("freeze_factors", params)
        factors = named_factors(params)
        if not jax.tree.leaves(factors):
            check_has_nodes("freeze_factors", params)
        zeros = Sensitivity.zeros(factors)
        frozen = jax.tree.map(lambda x: jnp.zeros(x.shape[:-2], bool), factors)
        count = jnp.zeros((), jnp.int32)
        return FreezeFactorsState(count, zeros.mean, zeros, frozen, inner.init(params))

    def update(updates, state, params=None, **extra):
        check_params("freeze_factors", params)
        check_alike(updates, params)
        gradient, before = named_factors(updates), named_factors(params)
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        stop = lambda u, frozen: jnp.where(frozen[..., None, None], 0, u)
        moves = jax.tree.map(stop, named_factors(updates), state.frozen)

        at_start = state.count % window == 0
        once = state.sensitivity.updated(state.window, b1, b2)
        kept = lambda new, old: jnp.where(at_start, new, old)
        sensitivity = jax.tree.map(kept, once, state.sensitivity)
        seen = state.count % window
        sample = jax.tree.map(_sample, before, moves, gradient)
        mean = lambda old, new: ((old * seen + new) / (seen + 1)).astype(old.dtype)
        averages = jax.tree.map(mean, state.window, sample)

        share = jnp.asarray(at(fraction, state.count), jnp.float32)
        due = at_start | (share <= 0)
        now = lax.cond(
            any_member(due),
            lambda: _frozen(sensitivity.scores(), state.frozen, share),
            lambda: state.frozen,
        )
        # Under vmap a member may be asked before its time.
        frozen = jax.tree.map(lambda new, old: old | (due & new), now, state.frozen)
        state = FreezeFactorsState(
            increment(state.count), averages, sensitivity, frozen, inner_state
        )
        return put_factors(updates, moves), state

    return optax.GradientTransformationExtraArgs(init, update)


def _sample(x: Array, u: Array, g: Array) -> Array:
    dtype = working_dtype(x.dtype)
    return jnp.abs(jnp.sign((x + u).astype(dtype)) * g.astype(dtype))


def _frozen(scores: PyTree, frozen: PyTree, share: Array) -> PyTree:
    """Those that were, and those whose mean score is below the common order statistic."""
    moving = jax.tree.map(lambda x, f: jnp.where(f[..., None, None], 0, x), scores, frozen)
    still = lambda x, f: x.shape[-2] * x.shape[-1] * jnp.sum(~f, dtype=jnp.int32)
    count = sum(jax.tree.leaves(jax.tree.map(still, scores, frozen)))
    smaller = jnp.floor(count * (1 - share)).astype(jnp.int32)
    everything = jnp.concatenate([x.ravel() for x in jax.tree.leaves(moving)])
    level = order_statistic(everything, count - smaller + 1, axis=0)[0]
    below = lambda x, f: f | ((smaller > 0) & (jnp.mean(x, axis=(-2, -1)) < level))
    return jax.tree.map(below, scores, frozen)

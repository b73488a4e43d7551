from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from ..._batching import any_member
from ...linalg.gram import working_dtype
from ...subspaces.bases.sampled import gaussian
from ...subspaces.refresh import Plan
from ...subspaces.view import Rank, Side, is_hidden_matrix, matrix_shape
from .project_updates import Where, _plan, _working


class AccumulateGradientsState(NamedTuple):
    """The state of :func:`accumulate_gradients`.

    Attributes:
        count: the number of microbatches.
        sums: the sums of the projected gradients of this cycle.
        inner: the state of the inner transform.
    """

    count: Int[Array, ""]
    sums: PyTree
    inner: Any


def accumulate_gradients(
    inner: optax.GradientTransformation,
    rank: Rank,
    steps: int,
    *,
    side: Side = "short",
    where: Where = is_hidden_matrix,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Average the gradients of several microbatches in ``r n`` numbers instead of ``m n``.

    With a Gaussian ``P (m, r)`` of variance ``1/r``, drawn from the key for each cycle of
    ``k`` microbatches and not stored: ``C ← C + Pᵀ G_i``. After the last one the inner
    transform sees ``P C / k = P Pᵀ Ḡ``, the projection of the mean gradient and on average
    the mean gradient itself; before that the updates are zero. ``optax.MultiSteps`` does
    the same with full gradients.

    Args:
        inner: any transform or optimizer; it runs once a cycle.
        rank: an int, a fraction of ``min(m, n)`` or a callable of ``(path, (m, n))``.
        steps: ``k``.
        side: the projected axis; see :class:`lrjax.subspaces.Basis`.
        where: which leaves to compress; see :func:`lrjax.project_updates`. The sums of
            the others are kept whole.
        key: source of the random numbers; ``jax.random.key(0)`` by default.

    Returns:
        The transform.

    Raises:
        ValueError: if ``steps`` is below one, or the rank makes no sense.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.accumulate_gradients(optax.sgd(0.1), rank=2, steps=4)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})
        >>> state.sums["weight"].shape
        (2, 16)

    Reference:
        Y. Hao, Y. Cao, L. Mou, "Flora" (2024), arXiv 2402.03293.
    """
    if steps < 1:
        raise ValueError(f"accumulate_gradients needs steps >= 1, got {steps}.")
    inner = optax.with_extra_args_support(inner)
    basis = gaussian(rank, side=side)
    base = jr.key(0) if key is None else key

    def frame(plan: Plan, count):
        # One draw for all matrices of a stack; the loop over its layers draws the same.
        m, n = matrix_shape(plan.shape, plan.spec)[-2:]
        size, leaf_key = m if plan.rows else n, jr.fold_in(base, plan.leaf)
        drawn = basis.frame(count // steps, leaf_key, size, plan.rank)
        return drawn._replace(rows=plan.rows)

    def init(params):
        plans, leaves, treedef = _plan(params, basis, where)
        count = jnp.zeros((), jnp.int32)

        def zeros(plan, x):
            if plan is None:
                return jnp.zeros(x.shape, working_dtype(x.dtype))
            return frame(plan, count).down(jnp.zeros_like(_working(plan.view(x))))

        sums = treedef.unflatten(map(zeros, plans, leaves))
        return AccumulateGradientsState(count, sums, inner.init(params))

    def update(updates, state, params=None, **extra):
        plans, leaves, treedef = _plan(updates, basis, where)
        frames = [p if p is None else frame(p, state.count) for p in plans]
        first = state.count % steps == 0

        def add(plan, frame, g, old):
            g = _working(g) if plan is None else frame.down(_working(plan.view(g)))
            return jnp.where(first, 0, old) + g.astype(old.dtype)

        sums = list(map(add, plans, frames, leaves, treedef.flatten_up_to(state.sums)))

        def mean(plan, frame, g, total):
            total = total if plan is None else plan.restore(frame.up(total))
            return (total / steps).astype(g.dtype)

        def step():
            means = treedef.unflatten(map(mean, plans, frames, leaves, sums))
            out, new = inner.update(means, state.inner, params, **extra)
            return jax.tree.map(lambda u, g: u.astype(g.dtype), out, updates), new

        def wait():
            return jax.tree.map(jnp.zeros_like, updates), state.inner

        count = jnp.asarray(optax.safe_increment(state.count))
        out, new = lax.cond(any_member(count % steps == 0), step, wait)
        return out, AccumulateGradientsState(count, treedef.unflatten(sums), new)

    return optax.GradientTransformationExtraArgs(init, update)

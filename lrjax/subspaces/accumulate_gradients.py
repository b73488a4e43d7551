from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from .._arguments import checks_trees
from .._batching import any_member
from .._matrices import MatrixLeaf, Rank, Side, Where, map_matrices
from ..linalg import increment, working_dtype
from .bases import Gaussian, Projector


class AccumulateGradientsState(NamedTuple):
    """The state of :func:`accumulate_gradients`.

    Attributes:
        count: the number of microbatches.
        used: how many of this cycle are in the sums.
        sums: the sums of the projected gradients of this cycle.
        inner: the state of the inner transform.
    """

    count: Int[Array, ""]
    used: Int[Array, ""]
    sums: PyTree
    inner: Any


@checks_trees
def accumulate_gradients(
    inner: optax.GradientTransformation,
    rank: Rank,
    steps: int,
    *,
    side: Side = "short",
    where: Where | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Average the gradients of several microbatches in ``r n`` numbers instead of ``m n``.

    With a Gaussian ``P (m, r)`` of variance ``1/r``, drawn from the key for each cycle of
    ``k`` microbatches and not stored: ``C ← C + Pᵀ G_i``. After the last one the inner
    transform sees ``P C / k = P Pᵀ Ḡ``, the projection of the mean gradient and on average
    the mean gradient itself; before that the updates are zero. A microbatch whose gradient
    is not finite is left out, and the mean is that of the others. ``optax.MultiSteps``
    does the same with full gradients.

    Args:
        inner: any transform or optimizer; it runs once a cycle.
        rank: an int, a fraction of ``min(m, n)`` or a callable of ``(path, (m, n))``.
        steps: ``k``.
        side: the projected axis; see :class:`~lrjax.subspaces.Basis`.
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
        Y. Hao, Y. Cao, L. Mou, "Flora: low-rank adapters are secretly gradient
        compressors" (2024), arXiv 2402.03293.
    """
    if steps < 1:
        raise ValueError(f"accumulate_gradients needs steps >= 1, got {steps}.")
    inner = optax.with_extra_args_support(inner)
    basis = Gaussian(rank, side=side)
    base = jr.key(0) if key is None else key

    name = "accumulate_gradients"

    def projector(leaf: MatrixLeaf, count) -> Projector:
        # One draw for all matrices of a stack; the loop over its layers draws the same.
        rows = leaf.projects_rows(side)
        size, leaf_key = leaf.sides[0 if rows else 1], jr.fold_in(base, leaf.index)
        return basis.projector(count // steps, leaf_key, size, leaf.rank(rank), rows)

    def down(leaf: MatrixLeaf, g, count):
        basis = projector(leaf, count)
        g = leaf.view(g, basis.axis, leaf.rank(rank))
        return basis.project(g.astype(working_dtype(g.dtype)))

    def init(params):
        count = jnp.zeros((), jnp.int32)
        start = lambda leaf, x: (down(leaf, jnp.zeros_like(x), count),)
        whole = lambda x: (jnp.zeros_like(x, working_dtype(x.dtype)),)
        (sums,) = map_matrices(name, where, start, params, rest=whole)
        return AccumulateGradientsState(count, count, sums, inner.init(params))

    def update(updates, state, params=None, **extra):
        usable = _all_finite(updates)
        kept = jnp.where(state.count % steps == 0, 0, state.used)
        used = kept + usable.astype(kept.dtype)

        def add(g, old):
            return (
                jnp.where(kept > 0, old, 0) + jnp.where(usable, g, 0).astype(old.dtype),
            )

        one = lambda leaf, g, old: add(down(leaf, g, state.count), old)
        (sums,) = map_matrices(name, where, one, updates, state.sums, rest=add, results=1)

        def mean(g, total):
            return ((total / jnp.maximum(used, 1)).astype(g.dtype),)

        def lifted(leaf, g, total):
            return mean(g, leaf.restore(projector(leaf, state.count).lift(total), g))

        def step():
            (means,) = map_matrices(
                name, where, lifted, updates, sums, rest=mean, results=1
            )
            out, new = inner.update(means, state.inner, params, **extra)
            return jax.tree.map(lambda u, g: u.astype(g.dtype), out, updates), new

        def wait():
            return jax.tree.map(jnp.zeros_like, updates), state.inner

        count = increment(state.count)
        due = any_member((count % steps == 0) & (used > 0))
        out, new = lax.cond(due, step, wait)
        return out, AccumulateGradientsState(count, used, sums, new)

    return optax.GradientTransformationExtraArgs(init, update)


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    ok = jnp.array(True)
    for x in jax.tree.leaves(tree):
        ok &= jnp.all(jnp.isfinite(x))
    return ok

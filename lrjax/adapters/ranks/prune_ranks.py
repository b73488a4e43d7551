from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from ..._tree import check_params
from ...linalg import increment, order_statistic
from ...transforms import Sensitivity, cubic_schedule
from ..kinds.factors import Factors
from .masks import factors_of, is_factors


class PruneRanksState(NamedTuple):
    """The state of :func:`prune_ranks`.

    Attributes:
        count: the number of steps.
        sensitivity: of the numbers of each adapter with a gate, in the order of the tree.
        inner: the state of the optimizer.
    """

    count: Int[Array, ""]
    sensitivity: Sensitivity
    inner: Any


def prune_ranks(
    inner: optax.GradientTransformation,
    target: ArrayLike,
    *,
    begin: ArrayLike,
    end: ArrayLike,
    every: int | Array = 1,
    start: ArrayLike | None = None,
    b1: ArrayLike = 0.85,
    b2: ArrayLike = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """Share a falling budget of ranks among all layers, by zeros in their gates.

    After each step ``t = 0, 1, …`` of the inner optimizer, for adapters ``B diag(E) A``::

        sensitivity   samples |θ ∘ ∇θ| with the new θ, for t < end
        score of k    score(E_k) + mean_i score(A_ki) + mean_j score(B_jk)
        budget        start, then target + (start − target)(1 − (t − begin)/(end − begin))³
        E_k ← 0       unless the score of k is among as many largest as the budget,
                      for t > begin with t a multiple of every, and for all t ≥ end

    with the scores of :class:`lrjax.transforms.Sensitivity` and the budget rounded down; of
    equal scores at its edge all go. What is zero has a gradient and moments still, and
    comes back if its score rises; from ``end`` on the scores stand still, and so does the
    choice. All layers compete, those of a stack apart.

    Args:
        inner: an optimizer of the trained half of the adapters.
        target: how many triplets are left in the end, in all layers together.
        begin: the last step without pruning.
        end: the step from which the choice is fixed, the number of steps less those of the
            final phase. Later than ``begin``.
        every: how many steps lie between two choices, up to ``end``.
        start: the number of triplets at the start, by default all columns. Fewer where
            ranks are masked (:func:`lrjax.adapters.with_ranks`): masked columns have score
            zero and go first.
        b1: of the running average of sensitivities.
        b2: of the running average of their deviations.

    Returns:
        An optax transform around the inner one, which lets all else pass. Two arrays of
        state for each number of an adapter with a gate. Numbers may be traced, and budgets
        swept under ``vmap`` in one program.

    Raises:
        ValueError: for ``every`` below 1; at ``init``, if no adapter has a gate.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax, optax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> kind = lrjax.adapters.AdaLoRA(rank=4)
        >>> adapters = lrjax.adapt(model, kind, key=jax.random.key(1))
        >>> params, frozen = lrjax.partition(adapters)
        >>> tx = lrjax.adapters.prune_ranks(optax.adam(1e-2), 6, begin=5, end=15)
        >>> x = jax.random.normal(jax.random.key(2), (8, 4))
        >>> def loss(params):
        ...     bound = lrjax.bind(model, eqx.combine(params, frozen))
        ...     return jnp.mean((jax.vmap(bound)(x) - 1) ** 2)
        >>> @jax.jit
        ... def step(params, state):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> state = tx.init(params)
        >>> for _ in range(20):
        ...     params, state = step(params, state)
        >>> sum(map(int, lrjax.adapters.active_ranks(params).values()))
        6

    Reference:
        Q. Zhang et al., "AdaLoRA: adaptive budget allocation for parameter-efficient
        fine-tuning" (2023), arXiv:2303.10512. The choice of the final phase is that of
        the authors' code, which makes it anew from scores that stand still, and of PEFT,
        which keeps it.
    """
    if not isinstance(every, Tracer) and every < 1:
        raise ValueError(f"prune_ranks needs every >= 1, got {every}.")
    inner = optax.with_extra_args_support(inner)

    def init(params):
        nodes = gated(params)
        if jax.tree.leaves(params) and not nodes:
            raise ValueError(
                "prune_ranks found no adapter with a gate in the parameters: adapt the "
                "model with lrjax.adapters.AdaLoRA or SoRA, and give it the params of "
                "lrjax.partition."
            )
        sensitivity = Sensitivity.zeros(nodes)
        return PruneRanksState(jnp.zeros((), jnp.int32), sensitivity, inner.init(params))

    def update(updates, state, params: Any = None, **extra):
        check_params("prune_ranks", params)
        gradient = gated(updates)
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        new = gated(optax.apply_updates(params, updates))

        once = state.sensitivity.updated(jax.tree.map(_sample, new, gradient), b1, b2)
        moves = state.count < end
        kept = lambda new, old: jnp.where(moves, new, old)
        sensitivity = jax.tree.map(kept, once, state.sensitivity)

        scores = [triplet_scores(node) for node in sensitivity.scores()]
        whole = sum(x.size for x in scores)
        first = whole if start is None else start
        budget = cubic_schedule(first, target, begin=begin, end=end)(state.count)
        gone = whole - jnp.floor(budget).astype(jnp.int32)
        due = (state.count > begin) & (state.count % every == 0) | (state.count >= end)
        level = _smallest(scores, jnp.where(due, gone, 0))
        keep = [jnp.where(due & (gone > 0), x > level, True) for x in scores]
        state = PruneRanksState(increment(state.count), sensitivity, inner_state)
        return _without(updates, params, keep), state

    return optax.GradientTransformationExtraArgs(init, update)


def gated(tree: PyTree) -> list[Factors]:
    """The adapters of a tree that have a gate."""
    return [node for node in factors_of(tree) if node.gate is not None]


def triplet_scores(scores: Factors) -> Float[Array, "*b r"]:
    """One score for each column of an adapter, from those of all its numbers."""
    pair, gate = scores.pair, scores.gate
    assert gate is not None  # of all that gated finds
    return gate + jnp.mean(pair.left, axis=-2) + jnp.mean(pair.right, axis=-2)


def _sample(x: Array, g: Array) -> Array:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.abs(x.astype(dtype) * g.astype(dtype))


def _smallest(scores: list[Array], k: Int[Array, ""]) -> Array:
    """The k-th smallest of all numbers."""
    everything = jnp.concatenate([x.ravel() for x in scores])
    return order_statistic(everything, everything.size - k + 1, axis=0)[0]


def _without(updates: PyTree, params: PyTree, keep: list[Array]) -> PyTree:
    """Updates that make the gates zero that are not kept."""
    rest = iter(keep)

    def zero(node: Any, own: Any) -> Any:
        if not is_factors(node) or node.gate is None:
            return node
        gate = jnp.where(next(rest), node.gate, -own.gate.astype(node.gate.dtype))
        return eqx.tree_at(lambda factors: factors.gate, node, gate)

    return jax.tree.map(zero, updates, params, is_leaf=is_factors)

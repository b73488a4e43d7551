import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int, PyTree

from ..._arguments import checks_trees
from ..._batching import any_member
from ..._moments import map_moments
from ..._tree import check_has_nodes, check_params, like, map_factors, node_of
from ...linalg import cross, increment, inverse_grams, times, working_dtype
from ...lowrank import LowRank, is_low_rank


class AlternateFactorsState(NamedTuple):
    """The state of :func:`alternate_factors`.

    Attributes:
        count: the number of steps.
        inner: the states of the transform for the left factors, for the right ones, and
            for those whose partner is frozen.
        partners: those that the moments of the left factors belong to, and those of the
            right ones; empty unless they are carried.
    """

    count: Int[Array, ""]
    inner: tuple[Any, Any, Any]
    partners: tuple[PyTree, ...] = ()


@checks_trees
def alternate_factors(
    tx: optax.GradientTransformation, *, carry_moments: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Update ``left`` in the steps 0, 2, … and ``right`` in the steps 1, 3, ….

    Each factor moves with a gradient that was taken after the last move of its partner
    (Gauss-Seidel); the other one gets zeros. For ``tx`` a factor that rests is a frozen
    one: it is read, there is no work for it, and the moments of each factor only see
    its own turns. A factor whose partner is frozen has its turn in every step. Leaves
    that are no LowRank nodes pass unchanged.

    With ``carry_moments`` first moments follow the partner as it moves. For the moment
    ``M (m, r)`` of ``left``, and likewise for that of ``right``::

        M ← M rightᵀ_old right (rightᵀright)⁻¹

    so that what it does to the product, ``M rightᵀ_old``, is projected on what ``left``
    can do now. Second moments stay as they are. This takes the state of one more moment.

    Args:
        tx: any optax transform, such as ``optax.scale_by_adam()`` behind
            :func:`scale_by_gram`; with weight decay if only the factor that moves is to
            decay.
        carry_moments: whether the first moments of ``tx`` follow the partner.

    Returns:
        The transform; ``update`` needs ``params``.

    Raises:
        ValueError: in ``init``, if the tree holds no LowRank node; in ``update``, without
            ``params``, or if a node was torn apart by a leaf-wise mask.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> x = lrjax.LowRank(jnp.ones((2, 1)), jnp.ones((1, 1)))
        >>> tx = lrjax.alternate_factors(optax.scale_by_adam())
        >>> state = tx.init(x)
        >>> for _ in range(2):
        ...     step, state = tx.update(x, state, x)
        ...     print(step.left.ravel().round(2), step.right.round(2))
        [1. 1.] [[0.]]
        [0. 0.] [[1.]]

    Reference:
        The moments that follow: X. Yu et al., "AltLoRA: towards better gradient
        approximation in low-rank adaptation with alternating projections" (2025), arXiv
        2505.12455. Special case: of a transform without state it is ``tx`` with zeros for
        the factor that rests.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params):
        check_has_nodes("alternate_factors", params)
        moments = [_resting(inner.init(part(params))) for part in (_left, _right)]
        zero = lambda x: jnp.zeros_like(x, dtype=working_dtype(x.dtype))
        partners = jax.tree.map(zero, (_of_left(params), _of_right(params)))
        return AlternateFactorsState(
            jnp.zeros([], jnp.int32),
            (*moments, inner.init(_alone(params))),
            _resting(partners) if carry_moments else (),
        )

    def update(updates, state, params=None, *, frozen: Any = None, **extra):
        check_params("alternate_factors", params)
        map_factors(lambda u, _: u, updates, params)  # refuses what was masked by factor

        def move(k: int, part: Callable, rest: Callable, partner: Callable):
            moments, partners = map(list, _awake((state.inner[:2], state.partners)))
            if carry_moments:
                now = partner(params)
                moments[k] = _carried(moments[k], partners[k], now)
                as_before = lambda x, old: x.astype(old.dtype)
                partners[k] = jax.tree.map(as_before, now, partners[k])
            moved, moments[k] = inner.update(
                part(updates), moments[k], part(params), frozen=rest(params), **extra
            )
            return _with_zeros(moved, updates), *_resting((moments, tuple(partners)))

        moved, moments, partners = lax.cond(
            any_member(state.count % 2 == 0),
            lambda: move(0, _left, _right, _of_left),
            lambda: move(1, _right, _left, _of_right),
        )
        alone, last = inner.update(
            _alone(updates), state.inner[2], _alone(params), frozen=frozen, **extra
        )
        new = AlternateFactorsState(increment(state.count), (*moments, last), partners)
        return _put(updates, moved, alone), new

    return optax.GradientTransformationExtraArgs(init, update)


def _nodes(pick: Callable[[LowRank], Any], tree: PyTree, whole: bool = True) -> PyTree:
    """What ``pick`` makes of the nodes of two factors, or of one; all else masked out."""

    def of(x):
        chosen = is_low_rank(x) and (len(jax.tree.leaves(x)) == 2) == whole
        return pick(x) if chosen else optax.MaskedNode()

    return jax.tree.map(of, tree, is_leaf=is_low_rank)


_left = functools.partial(_nodes, lambda x: node_of(x.left, None))
_right = functools.partial(_nodes, lambda x: node_of(None, x.right))
_alone = functools.partial(_nodes, lambda x: x, whole=False)
# The partner in the place of the factor.
_of_left = functools.partial(_nodes, lambda x: node_of(x.right, None))
_of_right = functools.partial(_nodes, lambda x: node_of(None, x.left))


def _resting(tree: PyTree) -> PyTree:
    """As it is stored: half nodes fit the parameters, but for what is masked."""
    return _replaced(lambda x: x is None, optax.MaskedNode(), tree)


def _awake(tree: PyTree) -> PyTree:
    """As it is seen: half nodes without the factor that rests."""
    return _replaced(lambda x: isinstance(x, optax.MaskedNode), None, tree)


def _replaced(absent: Callable[[Any], bool], by: Any, tree: PyTree) -> PyTree:
    def of(x):
        if not is_low_rank(x):
            return x
        sides = (by if absent(side) else side for side in (x.left, x.right))
        return node_of(*sides)

    return jax.tree.map(of, tree, is_leaf=is_low_rank)


def _with_zeros(half: PyTree, updates: PyTree) -> PyTree:
    """The halves of nodes that moved, with zeros for those that rest."""

    def fill(u, moved):
        if isinstance(moved, optax.MaskedNode):
            return moved
        full = eqx.combine(moved, jax.tree.map(jnp.zeros_like, u))
        return like(u, full.left, full.right)

    return jax.tree.map(fill, updates, half, is_leaf=is_low_rank)


def _put(updates: PyTree, moved: PyTree, alone: PyTree) -> PyTree:
    """Updates with those of the nodes in their places."""

    def pick(u, *new):
        found = [x for x in new if not isinstance(x, optax.MaskedNode)]
        return found[0] if is_low_rank(u) and found else u

    return jax.tree.map(pick, updates, moved, alone, is_leaf=is_low_rank)


def _carried(state: PyTree, before: PyTree, now: PyTree) -> PyTree:
    """First moments times ``beforeᵀ now (nowᵀ now)⁻¹``."""
    old, structure = jax.tree.flatten(before)
    new = [x.astype(o.dtype) for x, o in zip(jax.tree.leaves(now), old, strict=True)]
    inverses = inverse_grams(*new)
    columns = zip(old, new, inverses, strict=True)
    turns = structure.unflatten([times(cross(o, x), k) for o, x, k in columns])
    carry = lambda m, t: times(m.astype(t.dtype), t).astype(m.dtype)
    follow = lambda tree, signed: jax.tree.map(carry, tree, turns) if signed else tree
    return map_moments(follow, state)

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Int, PRNGKeyArray, PyTree

from ..._arguments import checks_trees
from ..._batching import any_member
from ..._matrices import check_real
from ..._tree import check_params
from ...linalg import identity_like, increment, nonzero, outer, times, working_dtype
from ...lowrank import SVDForm, svd
from ._factors import at


class SampleDirectionsState(NamedTuple):
    """The state of :func:`sample_directions`.

    Attributes:
        count: the number of steps.
        chosen: the columns ``(*b, k)`` of each node that are trained,
            ``optax.MaskedNode()`` for each other leaf.
        inner: the state of the inner transform.
    """

    count: Int[Array, ""]
    chosen: PyTree
    inner: Any


@checks_trees
def sample_directions(
    learning_rate: optax.ScalarOrSchedule,
    columns: int,
    *,
    period: int | Array = 200,
    refactor_every: int | Array = 2000,
    inner: optax.GradientTransformation | None = None,
    warmup: ArrayLike = 1,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Train all singular values, and the singular vectors of a few drawn columns at a time.

    For a node ``W = U diag(σ) Vᵀ`` and the gradient ``G`` of ``W``, which is never formed,
    ``inner`` makes directions of::

        ∂σ_i = u_iᵀ G v_i for all i         ∂u_i = G v_i,  ∂v_i = Gᵀ u_i for those drawn

    Without the factor ``σ_i`` that plain gradients have, small directions turn as fast as
    large ones. Then ``σ ← max(σ + step, 0)``, and the columns are brought back to length
    one. Every ``period`` steps ``columns`` of the r are drawn without replacement, column
    i with the weight ``½ (1/r + σ_i/Σσ)``, and ``inner`` starts anew: its moments are those
    of the drawn columns alone. In between columns are not orthogonal; after every
    ``refactor_every`` steps an SVD makes them so, which does not move ``W``.

    Args:
        learning_rate: a number or a schedule.
        columns: how many singular vectors of each side are trained at a time.
        period: steps from one draw to the next; may be traced.
        refactor_every: steps from one SVD to the next, a new draw among them; may be
            traced.
        inner: from gradients to directions, without a learning rate; Adam by default.
        warmup: in how many steps after a draw the rate of nodes rises to what it is.
        key: of the draws.

    Returns:
        An optax transform, the last of a chain; ``update`` needs ``params``, whose nodes
        have diagonal cores, as :func:`lrjax.svd` makes them. Leaves that are no SVDForm
        nodes pass unchanged.

    Raises:
        ValueError: for fewer than one column; at ``update``, without ``params``.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
        >>> loss = lambda x: jnp.sum((x.materialize() - target) ** 2)
        >>> x = lrjax.svd(jax.random.normal(jax.random.key(0), (3, 3)))
        >>> tx = lrjax.sample_directions(0.03, 1, period=10, refactor_every=50)
        >>> step = jax.jit(lambda x, s: tx.update(jax.grad(loss)(x), s, x))
        >>> state, first = tx.init(x), loss(x)
        >>> for _ in range(200):
        ...     updates, state = step(x, state)
        ...     x = optax.apply_updates(x, updates)
        >>> print(loss(x) < first / 20)
        True

    Reference:
        J. Zhao, Y. Zhang, X. Li, H. Liu, C. V. Cannistraci, "Sparse spectral training and
        inference on Euclidean and hyperbolic neural networks" (2024), arXiv 2405.15481.
    """
    if columns < 1:
        raise ValueError(f"sample_directions needs at least 1 column, got {columns}.")
    tx = optax.with_extra_args_support(optax.scale_by_adam() if inner is None else inner)
    key = jr.key(0) if key is None else key

    def init(params):
        check_real("sample_directions", params)
        leaves, treedef = jax.tree.flatten(params, is_leaf=_is_form)
        chosen = _at_nodes(lambda x: _first(x, columns), leaves, leaves)
        here = _at_nodes(_taken, leaves, leaves, chosen)
        return SampleDirectionsState(
            jnp.zeros((), jnp.int32),
            treedef.unflatten(chosen),
            tx.init(treedef.unflatten(here)),
        )

    def update(updates, state, params=None, **extra):
        check_params("sample_directions", params)
        grads, treedef = jax.tree.flatten(updates, is_leaf=_is_form)
        old, chosen = map(treedef.flatten_up_to, (params, state.chosen))
        places = [i for i, g in enumerate(grads) if _is_node(g)]

        count = state.count
        since = jnp.minimum(count % period, count % refactor_every)
        anew = lambda first, now: jnp.where(since == 0, first, now)
        for k, i in enumerate(places):
            draw = jr.fold_in(jr.fold_in(key, k), count)
            chosen[i] = anew(_drawn(old[i], chosen[i], draw), chosen[i])
        here = treedef.unflatten(_at_nodes(_taken, grads, old, chosen))
        slopes = treedef.unflatten(_at_nodes(_slopes, grads, grads, old, chosen))
        inner_state = jax.tree.map(anew, tx.init(here), state.inner)
        steps, inner_state = tx.update(slopes, inner_state, here, **extra)

        ramp = jnp.minimum(1, (since + 1) / warmup)
        steps = jax.tree.map(lambda u: ramp * u, steps)
        goal = lambda x, u: (x - at(learning_rate, count) * u).astype(x.dtype)
        goals = treedef.flatten_up_to(jax.tree.map(goal, here, steps))
        moved = [_moved(old[i], goals[i], chosen[i]) for i in places]
        count = increment(count)
        due = any_member(count % refactor_every == 0)
        moved = lax.cond(due, lambda xs: list(map(svd, xs)), lambda xs: xs, moved)
        for i, new in zip(places, moved, strict=True):
            grads[i] = _difference(new, old[i])
        state = SampleDirectionsState(count, treedef.unflatten(chosen), inner_state)
        return treedef.unflatten(grads), state

    return optax.GradientTransformationExtraArgs(init, update)


def _is_form(x: Any) -> bool:
    return isinstance(x, SVDForm)


def _is_node(x: Any) -> bool:
    return _is_form(x) and eqx.is_array_like(x.left)


def _at_nodes(f: Callable, leaves: list, *columns: list) -> list:
    """``f`` of each row that belongs to a node; nothing for other leaves."""
    rows = zip(leaves, *columns, strict=True)
    return [f(*row) if _is_node(x) else optax.MaskedNode() for x, *row in rows]


def _wide(x: Array) -> Array:
    return x.astype(working_dtype(x.dtype))


def _values(x: SVDForm) -> Array:
    return jnp.diagonal(_wide(x.core), axis1=-2, axis2=-1)


def _picks(x: SVDForm, chosen: Array) -> Array:
    """Zeros and ones ``(*b, r, k)`` whose product takes the chosen columns.

    A product keeps the rows of a sharded factor where they are.
    """
    shape = (*chosen.shape[:-1], x.left.shape[-1], chosen.shape[-1])
    place = lax.broadcasted_iota(jnp.int32, shape, chosen.ndim - 1)
    return (place == chosen[..., None, :]).astype(working_dtype(x.dtype))


def _first(x: SVDForm, columns: int) -> Array:
    return jnp.zeros((*x.left.shape[:-2], min(columns, x.left.shape[-1])), jnp.int32)


def _with_parts(x: SVDForm, left: Array, core: Array, right: Array) -> SVDForm:
    return eqx.tree_at(lambda x: (x.left, x.core, x.right), x, (left, core, right))


def _taken(x: SVDForm, chosen: Array) -> SVDForm:
    """What is trained: columns of the sides, and for a core all values ``(*b, r)``."""
    picks = _picks(x, chosen)
    left, right = (times(_wide(side), picks) for side in (x.left, x.right))
    return _with_parts(x, left, _values(x), right)


def _slopes(g: SVDForm, x: SVDForm, chosen: Array) -> SVDForm:
    """``G v_i``, ``u_iᵀ G v_i`` and ``Gᵀ u_i``, out of gradients that are ``σ_i`` times."""
    values = _values(x)
    inverse = jnp.where(values == 0, 0, 1 / jnp.where(values == 0, 1, values))
    own = times(inverse[..., None, :], _picks(x, chosen))
    taken = _taken(g, chosen)
    return _with_parts(g, taken.left * own, taken.core, taken.right * own)


def _drawn(x: SVDForm, like: Array, key: PRNGKeyArray) -> Array:
    """Columns without replacement, with weights ``½ (1/r + σ_i/Σσ)``: Gumbel's top k."""
    values = jnp.maximum(_values(x), 0)
    total = jnp.sum(values, axis=-1, keepdims=True)
    weights = (1 / values.shape[-1] + values / nonzero(total)) / 2
    noise = jr.gumbel(key, values.shape[-1:], values.dtype)
    scores = jnp.log(weights) + noise[(None,) * (values.ndim - 1)]
    return lax.top_k(scores, like.shape[-1])[1].astype(jnp.int32)


def _moved(x: SVDForm, goal: SVDForm, chosen: Array) -> SVDForm:
    """The node with other values and columns; those that have moved get length one."""
    picks = _picks(x, chosen)
    free = 1 - jnp.sum(picks, axis=-1)[..., None, :]

    def side(old: Array, new: Array) -> Array:
        taken = times(_wide(old), picks)
        size = jnp.sqrt(jnp.sum(new**2, axis=-2, keepdims=True))
        still = jnp.all(new == taken, axis=-2, keepdims=True)
        new = jnp.where(still, taken, new / nonzero(size))
        return _wide(old) * free + outer(new, picks)

    core = _wide(x.core)
    eye = identity_like(core)
    # Not by a difference, of which rounding might leave a value below zero.
    core = core * (1 - eye) + eye * jnp.maximum(goal.core, 0)[..., None, :]
    return SVDForm(side(x.left, goal.left), core, side(x.right, goal.right), x.active)


def _difference(new: SVDForm, x: SVDForm) -> SVDForm:
    part = lambda a, b: (a - b.astype(a.dtype)).astype(b.dtype)
    left, core, right = (
        part(new.left, x.left),
        part(new.core, x.core),
        part(new.right, x.right),
    )
    return SVDForm(left, core, right, x.active)

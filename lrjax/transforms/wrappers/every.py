from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Int, PyTree

from ..._arguments import checks_trees
from ..._batching import any_member
from ..._tree import check_params
from ...linalg import increment


class EveryState(NamedTuple):
    """The state of :func:`every`.

    Attributes:
        count: the number of steps.
        inner: the state of the transform, an empty one for a function of the parameters.
    """

    count: Int[Array, ""]
    inner: Any


@checks_trees
def every(
    k: int | Array, op: optax.GradientTransformation | Callable[[PyTree], PyTree]
) -> optax.GradientTransformationExtraArgs:
    """Do something on every k-th step only, and nothing on the others.

    ``op`` is a transform, which then sees every k-th update and lets the others pass; or
    a function of the parameters, for the end of a chain: after the steps ``k, 2k, …`` the
    parameters are ``op(params)``, truncated to low rank for example. The other steps do
    not pay for it, under ``vmap`` either: its members share the count.

    Args:
        k: the period; may be traced.
        op: an optax transform, or a function from parameters to parameters.

    Returns:
        The transform.

    Raises:
        ValueError: if ``k`` is below one; at ``update``, if ``op`` is a function and no
            params are given.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> positive = lambda params: jnp.maximum(params, 0)
        >>> tx = optax.chain(optax.sgd(1.0), lrjax.every(2, positive))
        >>> w = jnp.array([0.5, 2.0])
        >>> state = tx.init(w)
        >>> for _ in range(2):
        ...     updates, state = tx.update(jnp.ones(2), state, w)
        ...     w = optax.apply_updates(w, updates)
        ...     print(w)
        [-0.5  1. ]
        [0. 0.]
    """
    if not isinstance(k, Tracer) and k < 1:
        raise ValueError(f"every needs a period of at least one step, got {k}.")
    if isinstance(op, optax.GradientTransformation):
        inner = optax.with_extra_args_support(op)
    else:
        inner = optax.stateless(lambda updates, params: _reach(op, updates, params))
        inner = optax.with_extra_args_support(inner)

    def init(params):
        return EveryState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates, state, params=None, **extra):
        count = increment(state.count)

        def run():
            new, new_state = inner.update(updates, state.inner, params, **extra)
            as_before = lambda x, old: x.astype(old.dtype)
            return jax.tree.map(as_before, new, updates), new_state

        due = any_member(count % k == 0)
        new, new_state = lax.cond(due, run, lambda: (updates, state.inner))
        return new, EveryState(count, new_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _reach(op: Callable[[PyTree], PyTree], updates: PyTree, params: PyTree) -> PyTree:
    """The update that takes the parameters to ``op`` of where they would be."""
    check_params("every", params)
    goal = op(optax.apply_updates(params, updates))
    return jax.tree.map(lambda x, p: x - p, goal, params)

from collections.abc import Callable
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, PyTree

from .._matrices import Where, decays, map_matrices
from .._tree import has_nodes, map_factors
from ..lowrank import is_low_rank
from ..transforms import scale_by_polyak, scale_by_target_level


DecayMask = PyTree[bool] | Callable[[PyTree], PyTree[bool]] | None


def finish(
    tx: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: ArrayLike,
    mask: DecayMask,
) -> optax.GradientTransformationExtraArgs:
    """Put decoupled weight decay and the learning rate behind a direction."""
    decay = decay_weights(weight_decay, mask)
    return optax.chain(tx, decay, optax.scale_by_learning_rate(learning_rate))


def decay_weights(
    weight_decay: ArrayLike, mask: DecayMask = None
) -> optax.GradientTransformationExtraArgs:
    """Decoupled weight decay, by default of matrices but biases and scales of norms."""
    # Without decay no params are asked for; the structure of the state is the same.
    none = isinstance(weight_decay, int | float) and weight_decay == 0
    weight = cast(optax.ScalarOrSchedule, weight_decay)
    decay = optax.identity() if none else optax.add_decayed_weights(weight)
    return optax.masked(decay, decays if mask is None else _of_parts(mask))


def _of_parts(mask: DecayMask) -> Any:
    """A tree of bools for all parameters, as one for any part of them.

    Recipes treat pairs and other leaves apart, and the factors of a pair in turn.
    """
    if callable(mask):
        return mask
    is_leaf = lambda x: is_low_rank(x) or isinstance(x, optax.MaskedNode)

    def pick(part: Any, own: Any) -> Any:
        if isinstance(part, optax.MaskedNode):
            return False
        if not is_low_rank(part) or not is_low_rank(own):
            return own
        sides = (part.left, own.left), (part.right, own.right)
        there = [keep for factor, keep in sides if factor is not None]
        return jax.tree.unflatten(jax.tree.structure(part), there)

    return lambda params: jax.tree.map(pick, params, mask, is_leaf=is_leaf)


UNDERFLOW = 1e-19  # the square of a smaller number is zero in float32 and in bfloat16


def adam(b1: ArrayLike, b2: ArrayLike, eps: ArrayLike) -> optax.GradientTransformation:
    """Adam with 0/0 = 0: where all gradients were zero so is the step, ``eps=0`` or not."""
    eps = jnp.maximum(eps, UNDERFLOW)
    return optax.scale_by_adam(cast(float, b1), cast(float, b2), cast(float, eps))


def elsewhere(
    fallback: optax.GradientTransformation | None, where: Where | None
) -> optax.GradientTransformationExtraArgs:
    """The transform of the leaves that ``where`` does not choose; Adam by default."""
    return optax.masked(
        optax.scale_by_adam() if fallback is None else fallback,
        lambda tree: _chosen(where, tree, False),
    )


def chosen(
    tx: optax.GradientTransformation, where: Where | None
) -> optax.GradientTransformationExtraArgs:
    """A transform of the leaves that ``where`` chooses alone."""
    return optax.masked(tx, lambda tree: _chosen(where, tree, True))


def scale_by_rms(
    factor: Callable[[Array], ArrayLike], where: Where | None
) -> optax.GradientTransformation:
    """Each matrix that ``where`` chooses times a function of its root mean square."""

    def one(leaf, u):
        a = leaf.view(u)
        size = jnp.sqrt(jnp.mean(a**2, axis=(-2, -1), keepdims=True))
        return (leaf.restore(factor(size) * a, u).astype(u.dtype),)

    return optax.stateless(lambda u, _: map_matrices("The recipe", where, one, u)[0])


def _chosen(where: Where | None, tree: PyTree, answer: bool) -> Any:
    return map_matrices(
        "The recipe",
        where,
        lambda leaf, x: (answer,),
        tree,
        rest=lambda x: (not answer,),
    )[0]


Minimum = ArrayLike | Literal["search"] | None


def known_minimum(f_min: Minimum) -> ArrayLike:
    """The smallest loss where it is given as a number; a search tells it in each step."""
    return 0.0 if f_min is None or isinstance(f_min, str) else f_min


def toward_minimum(
    direction: optax.GradientTransformation, f_min: Minimum
) -> optax.GradientTransformationExtraArgs:
    """Polyak's step for a known or a searched smallest loss along a direction.

    ``None``: the direction as it is.
    """
    if f_min is None:
        return on_nodes(direction)
    if not isinstance(f_min, str):
        return if_nodes(optax.chain(on_nodes(direction), scale_by_polyak(f_min)))
    if f_min != "search":
        raise ValueError(f'f_min must be a number, "search" or None, got {f_min!r}.')
    return if_nodes(scale_by_target_level(inner=on_nodes(direction)))


def if_nodes(
    tx: optax.GradientTransformation, there: Callable[[PyTree], bool] = has_nodes
) -> optax.GradientTransformationExtraArgs:
    """The transform on trees with a LowRank node, nothing on others.

    So a recipe is a drop-in for any tree: without a node it is the plain gradient step,
    and needs no more than that.
    """
    inner = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, **extra):
        if not there(updates):
            return updates, state
        return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def on_nodes(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The transform of the LowRank nodes of a tree; the other leaves pass unchanged."""
    return if_nodes(optax.masked(tx, pairs))


def by_kind(
    of_pairs: optax.GradientTransformation,
    of_others: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """One direction for the LowRank nodes of a tree, another one for all other leaves."""
    return optax.chain(
        on_nodes(of_pairs),
        optax.masked(of_others, others),
        optax.scale_by_learning_rate(learning_rate),
    )


def whole_nodes() -> optax.GradientTransformation:
    """Refuses factors masked one by one, which moments would in other words."""

    def check(updates, params):
        trees = (updates,) if params is None else (updates, params)
        return map_factors(lambda g, *_: g, *trees)

    return optax.stateless(check)


def pairs(tree: PyTree) -> PyTree:
    """The mask of the LowRank nodes of a tree."""
    return jax.tree.map(is_low_rank, tree, is_leaf=is_low_rank)


def others(tree: PyTree) -> PyTree:
    """The mask of the other leaves."""
    return jax.tree.map(lambda is_pair: not is_pair, pairs(tree))

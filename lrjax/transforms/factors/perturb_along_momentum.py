import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Int, PyTree

from ..._arguments import checks_trees
from ..._moments import read_moments, state_names
from ..._tree import check_has_nodes, check_params, map_nodes
from ...linalg import gram, increment, nonzero, working_dtype
from ...lowrank import LowRank, add, is_low_rank
from .._checks import check_non_negative


class PerturbAlongMomentumState(NamedTuple):
    """The state of :func:`perturb_along_momentum`.

    Attributes:
        count: the number of steps.
        sizes: the averaged norm ``(*b,)`` of the gradients of each node.
        reach: how far each node is looked at ahead of where it is, ``(*b,)``.
        inner: the state of the optimizer, with the momentum.
    """

    count: Int[Array, ""]
    sizes: PyTree
    reach: PyTree
    inner: Any


@checks_trees
def perturb_along_momentum(
    inner: optax.GradientTransformation,
    radius: ArrayLike = 0.05,
    *,
    smoothing: ArrayLike = 0.9,
    most: ArrayLike = 10.0,
    scale: ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Take gradients at a point ahead in the direction of the momentum.

    Sharpness-aware minimization without a second gradient. For a pair ``X = s left rightᵀ``
    and first moments ``M_l``, ``M_r`` that ``inner`` keeps of the gradients of its factors,
    the gradient is to be taken at the weights ``X + E``::

        M = s (M_l rightᵀ + left M_rᵀ)      E = −ρ κ M / ‖M‖_F      κ = min(most, 1/ḡ)

    of which the factors are moved alone: E is a constant, a node of width ``2r``, and never
    formed. ``ḡ`` averages ``‖s (G_l rightᵀ + left G_rᵀ)‖_F``. So the loss is called on
    :func:`perturbed_params`::

        loss(lrjax.transforms.perturbed_params(params, state), batch)

    inside the function that is differentiated by ``params``; adapters may be combined and
    bound after that. All norms come from Gram matrices, ``O((m + n) r²)``.

    Args:
        inner: an optimizer with a first moment, as ``optax.adam(1e-3)`` or
            ``optax.sgd(0.1, momentum=0.9)``; its updates are passed on.
        radius: ρ, non-negative.
        smoothing: decay of the average of the norms; it begins with the first.
        most: the largest κ, where gradients are small.
        scale: ``s`` of an adapter, ``alpha / rank``, which its pair does not hold.

    Returns:
        An optax transform; ``update`` needs ``params``, those without the perturbation,
        and ``frozen`` where a factor is frozen.

    Raises:
        ValueError: for a negative radius; in ``init``, if the tree holds no LowRank node,
            or if ``inner`` keeps no first moment of one; in ``update``, without ``params``.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> x = lrjax.LowRank(jnp.array([[1.0], [0.0]]), jnp.array([[2.0]]))
        >>> tx = lrjax.perturb_along_momentum(optax.sgd(0.0, momentum=0.9), 0.5)
        >>> grad = lrjax.LowRank(jnp.array([[0.0], [1.0]]), jnp.array([[0.0]]))
        >>> _, state = tx.update(grad, tx.init(x), x)  # ‖G rightᵀ‖ = 2, so κ = 1/2
        >>> print(lrjax.transforms.perturbed_params(x, state).materialize().T)
        [[ 2.   -0.25]]

    Reference:
        Y. Chang, C. Guo, Y. Chang, Y. Wu, "LoRA-MGPO: mitigating double descent in low-rank
        adaptation via momentum-guided perturbation optimization" (2025), arXiv 2502.14538.
        Special case: ``radius=0`` is ``inner``.
    """
    check_non_negative("perturb_along_momentum", "radius", radius)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        check_has_nodes("perturb_along_momentum", params)
        state = inner.init(params)
        _momenta(params, state)
        zeros = _at_nodes(_zero, params)
        return PerturbAlongMomentumState(jnp.zeros((), jnp.int32), zeros, zeros, state)

    def update(updates, state, params=None, *, frozen: Any = None, **extra):
        check_params("perturb_along_momentum", params)
        whole = map_nodes(lambda _, x: x, updates, params, frozen=frozen)

        def average(g: LowRank, x: LowRank, old: Array) -> Array:
            direction, unit = _first_order(g, x)
            size = jnp.multiply(scale, unit * _size(direction))
            decay = jnp.where(state.count > 0, smoothing, 0.0)
            return (decay * old + (1 - decay) * size).astype(old.dtype)

        sizes = _at_nodes(average, updates, whole, state.sizes)
        kappa = lambda size: jnp.minimum(most, 1 / (size + 1e-12))
        far = lambda size: (radius * kappa(size) / scale).astype(size.dtype)
        reach = jax.tree.map(far, sizes)
        extra["frozen"] = frozen
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        count = increment(state.count)
        return updates, PerturbAlongMomentumState(count, sizes, reach, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def perturbed_params(
    params: PyTree, state: PyTree, *, frozen: PyTree | None = None
) -> PyTree:
    """Where :func:`perturb_along_momentum` wants the gradient to be taken.

    Each LowRank node of width ``r`` becomes one of width ``3r``, its own columns first: the
    derivative by ``params`` is that at the perturbed value, the perturbation a constant. Of
    a node with a frozen factor the other one is moved, at its width. At the first step,
    without momentum, the value is that of ``params``. Adapters that have a mask, a gate or
    a vector on the rank axis are of one width and cannot be bound so.

    Args:
        params: the parameters.
        state: that of the optimizer, with the state of the transform anywhere in it.
        frozen: the other half of the parameters, where a factor is frozen.

    Returns:
        A tree for the loss.

    Raises:
        ValueError: if there is not one such state.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> x = lrjax.LowRank(jnp.ones((4, 2)), jnp.ones((3, 2)))
        >>> tx = lrjax.perturb_along_momentum(optax.adam(1e-3))
        >>> lrjax.transforms.perturbed_params(x, tx.init(x)).rank
        6
    """
    ours = lambda x: isinstance(x, PerturbAlongMomentumState)
    found = [x for x in jax.tree.leaves(state, is_leaf=ours) if ours(x)]
    if len(found) != 1:
        raise ValueError(
            "perturbed_params needs the state of one perturb_along_momentum, got a state "
            f"with {len(found)} of them: {state_names(state)}."
        )
    ahead = found[0]

    def shifted(x: LowRank, whole: LowRank, m: LowRank, reach: Array) -> LowRank:
        direction, unit = _first_order(m, whole)
        size = _size(direction)
        step = jnp.where(size > 0, -reach / nonzero(size), 0)[..., None, None]
        if None in (x.left, x.right):
            step = step / unit[..., None, None]
            move = lambda own, m: own + lax.stop_gradient(step * m).astype(own.dtype)
            return jax.tree.map(move, x, m)
        shift = LowRank(direction.left * step, direction.right)
        shift = jax.tree.map(lambda factor: factor.astype(x.dtype), shift)
        return add(x, lax.stop_gradient(shift))

    def at_node(x: Any, *own: Any) -> Any:
        return shifted(x, *own) if is_low_rank(x) and jax.tree.leaves(x) else x

    whole = map_nodes(lambda _, x: x, params, params, frozen=frozen)
    momenta = _momenta(params, ahead.inner)
    return jax.tree.map(at_node, params, whole, momenta, ahead.reach, is_leaf=is_low_rank)


def _at_nodes(f: Callable, tree: PyTree, *rest: PyTree) -> PyTree:
    """``f`` in the places of the nodes, and nothing in all others."""

    def at(x: Any, *others: Any) -> Any:
        there = is_low_rank(x) and jax.tree.leaves(x)
        return f(x, *others) if there else optax.MaskedNode()

    return jax.tree.map(at, tree, *rest, is_leaf=is_low_rank)


def _zero(x: LowRank) -> Array:
    """One zero for each matrix."""
    factor = jax.tree.leaves(x)[0]
    return jnp.zeros(factor.shape[:-2], working_dtype(factor.dtype))


def _momenta(params: PyTree, state: PyTree) -> PyTree:
    """The first moments of the nodes, inside a state."""
    treedef = jax.tree.structure(params)
    kept = [
        next((m.first for m in moments if m.first is not None), None)
        for moments in read_moments(state, treedef)
    ]
    momenta = treedef.unflatten(kept)

    def check(x: LowRank, m: LowRank) -> LowRank:
        if jax.tree.structure(x) != jax.tree.structure(m):
            raise ValueError(
                "perturb_along_momentum goes along the first moments of the optimizer "
                f"inside it, and {state_names(state)} keeps none of a LowRank node: take "
                "one with momentum, as optax.adam(1e-3) or optax.sgd(0.1, momentum=0.9)."
            )
        return m

    return _at_nodes(check, params, momenta)


def _first_order(g: LowRank, x: LowRank) -> tuple[LowRank, Array]:
    """``g_l rightᵀ + left g_rᵀ`` over the largest entry of both, and that entry."""
    dtype = working_dtype(x.dtype)
    g, x = (jax.tree.map(lambda a: a.astype(dtype), node) for node in (g, x))
    largest = lambda a: jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True)
    unit = nonzero(functools.reduce(jnp.maximum, map(largest, jax.tree.leaves(g))))
    parts = []
    if g.left is not None:
        parts.append(LowRank(g.left / unit, x.right))
    if g.right is not None:
        parts.append(LowRank(x.left, g.right / unit))
    return functools.reduce(add, parts), unit[..., 0, 0]


def _size(x: LowRank) -> Array:
    """The norm by Gram matrices; zero where the parts cancel to rounding."""
    products = gram(x.left) * gram(x.right)
    square = jnp.sum(products, axis=(-2, -1))
    rounding = 8 * jnp.finfo(products.dtype).eps * jnp.sum(jnp.abs(products), axis=(-2, -1))
    return jnp.sqrt(jnp.where(square > rounding, square, 0))

from typing import Literal

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray

from .basis import Basis, Refresh


def shared(
    base: Basis, axis: int = -3, *, choice: Literal["random", "all"] = "random"
) -> Basis:
    """One basis for all matrices along a batch axis: the heads of a layer, its experts.

    ``"random"`` refreshes it from one member, drawn anew each time among those whose
    gradient is finite and not zero, for the price of one member. ``"all"`` refreshes it
    from all of them side by side, ``[a₁ … a_h] (p, h q)``.

    Args:
        base: the rule that finds the basis.
        axis: the batch axis, from the end: -3 is the last one. A leaf without batch axes
            keeps a basis of its own. Heads fused into one axis are cut apart by
            ``MatrixSpec(blocks=heads)``.
        choice: what the basis is found from.

    Returns:
        The basis rule.

    Raises:
        ValueError: for an axis of the matrices themselves, or an unknown choice.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> basis = sub.shared(sub.randomized_svd(4))
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)

    Reference:
        "GaLore+" (2024), arXiv 2412.19820.
    """
    if axis > -3:
        raise ValueError(f"shared needs a batch axis counted from the end, got {axis}.")
    if choice not in ("random", "all"):
        raise ValueError(f"shared takes choice 'random' or 'all', got {choice!r}.")

    def rule(of):
        def apply(state, a: Array, to: Refresh):
            if a.ndim < -axis:
                return of(state, a, to)
            one = _pick(a, axis, to.key) if choice == "random" else _join(axis)
            as_one = lambda x: None if x is None else one(x)
            return of(
                state,
                one(a),
                to._replace(momentum=as_one(to.momentum), projected=as_one(to.projected)),
            )

        return apply

    def watch(of):
        return lambda state, a: of(state, a if a.ndim < -axis else _join(axis)(a))

    return base._replace(
        refresh=rule(base.refresh),
        start=None if base.start is None else rule(base.start),
        observe=None if base.observe is None else watch(base.observe),
        shared_axis=axis,
    )


def _join(axis: int):
    """All members side by side, as one matrix with many columns."""

    def one(x: Array) -> Array:
        x = jnp.moveaxis(x, axis, -2)
        return jnp.expand_dims(x.reshape(*x.shape[:-2], -1), axis)

    return one


def _pick(a: Array, axis: int, key: PRNGKeyArray):
    """One member of each group, the same one for the gradient and the momentum."""
    axis = a.ndim + axis
    energy = jnp.sum(a**2, axis=(-2, -1))
    scores = jr.uniform(key, energy.shape)
    scores = jnp.where(jnp.isfinite(energy) & (energy > 0), scores, -1)
    member = jnp.argmax(scores, axis=axis, keepdims=True)[..., None, None]
    return lambda x: jnp.take_along_axis(x, member, axis=axis)

import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool


@custom_vmap
def any_member(predicate: Bool[Array, ""]) -> Bool[Array, ""]:
    """Take a batched predicate out of the batch: true if it is for any member.

    ``lax.cond`` on a batched predicate becomes a ``select`` that runs both branches for
    every member on every call. Wrapped in this function the predicate stays a scalar
    under any nesting of ``vmap``, so that the cond stays a cond.
    """
    return predicate


@any_member.def_vmap
def _(axis_size, in_batched, predicate):
    del axis_size
    return any_member(jnp.any(predicate) if in_batched[0] else predicate), False


@custom_vmap
def max_member(x: Array) -> Array:
    """Take a batched scalar out of the batch: its largest value, NaN aside, as above."""
    return x


@max_member.def_vmap
def _(axis_size, in_batched, x):
    del axis_size
    return max_member(jnp.nanmax(x) if in_batched[0] else x), False

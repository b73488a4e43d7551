"""Sums over the gradients of single examples, a few of which exist at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree, Scalar

from ...linalg import working_dtype


def mean_over_examples(
    function: str,
    of: Callable[[PyTree], PyTree],
    loss: Callable[..., Scalar],
    params: PyTree,
    examples: tuple[Any, ...],
    batch_size: int,
) -> tuple[PyTree, int]:
    """The mean of ``of(gradients)``, trees of float32 or wider, and the number of examples.

    ``of`` gets the gradients of ``batch_size`` examples, one along the first axis each.
    """
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(examples)}
    if len(sizes) != 1 or sizes <= {(), (0,)} or batch_size < 1:
        raise ValueError(
            f"{function} needs examples along the first axis of all arrays, and a "
            f"batch_size of at least one; got first axes {sorted(sizes)} and "
            f"batch_size={batch_size}."
        )
    ((count,),) = sizes

    def add_batch(total, batch):
        grads = jax.vmap(lambda example: jax.grad(loss)(params, *example))(batch)
        wide = jax.tree.map(lambda g: g.astype(working_dtype(g.dtype)), grads)
        more = jax.tree.map(lambda x: jnp.sum(x, axis=0), of(wide))
        return jax.tree.map(jnp.add, total, more), None

    whole = count - count % batch_size
    cut = lambda x: x[:whole].reshape(-1, batch_size, *jnp.shape(x)[1:])
    like = lambda p: jnp.zeros((1, *p.shape), working_dtype(p.dtype))
    shapes = jax.eval_shape(of, jax.tree.map(like, params))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), shapes)
    total, _ = lax.scan(add_batch, zeros, jax.tree.map(cut, examples))
    if whole < count:
        total, _ = add_batch(total, jax.tree.map(lambda x: x[whole:], examples))
    return jax.tree.map(lambda t: t / count, total), count

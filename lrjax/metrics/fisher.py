from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree, Scalar

from ..linalg import working_dtype


def diagonal_fisher(
    loss: Callable[..., Scalar], params: PyTree, *examples: Any, batch_size: int = 1
) -> PyTree:
    """The diagonal of the empirical Fisher information: mean squared gradients.

    ``F_j = 1/N Σ_i (∂ loss(params, example_i)/∂θ_j)²``, of each example by itself, where
    the loss is a negative log-likelihood. With labels from the data it is the empirical
    Fisher; with labels drawn from the model's own predictions an unbiased estimate of the
    Fisher information itself. ``batch_size`` gradients exist at a time.

    Args:
        loss: ``loss(params, *example)`` of one example.
        params: a tree of floating arrays.
        *examples: trees whose leaves have the N examples along their first axis.
        batch_size: how many gradients are taken at once.

    Returns:
        A tree like ``params``, in float32 or wider.

    Raises:
        ValueError: without examples, for different numbers of them, or a ``batch_size``
            below one.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> loss = lambda w, x, y: (x @ w - y) ** 2 / 2
        >>> x, y = jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.array([1.0, -1.0])
        >>> print(lrjax.metrics.diagonal_fisher(loss, jnp.zeros(2), x, y))
        [5. 2.]

    Reference:
        J. Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks"
        (2017), arXiv 1612.00796.
    """
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(examples)}
    if len(sizes) != 1 or sizes <= {(), (0,)} or batch_size < 1:
        raise ValueError(
            "diagonal_fisher needs examples along the first axis of all arrays, and a "
            f"batch_size of at least one; got first axes {sorted(sizes)} and "
            f"batch_size={batch_size}."
        )
    ((count,),) = sizes

    def add_batch(total, batch):
        grads = jax.vmap(lambda example: jax.grad(loss)(params, *example))(batch)
        wider = lambda t, g: t + jnp.sum(g.astype(t.dtype) ** 2, axis=0)
        return jax.tree.map(wider, total, grads), None

    whole = count - count % batch_size
    cut = lambda x: x[:whole].reshape(-1, batch_size, *jnp.shape(x)[1:])
    zeros = lambda x: jnp.zeros_like(x, working_dtype(x.dtype))
    batches = jax.tree.map(cut, examples)
    total, _ = lax.scan(add_batch, jax.tree.map(zeros, params), batches)
    if whole < count:
        total, _ = add_batch(total, jax.tree.map(lambda x: x[whole:], examples))
    return jax.tree.map(lambda t: t / count, total)

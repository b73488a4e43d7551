from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree, Scalar

from ._examples import mean_over_examples


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
    squares = lambda grads: jax.tree.map(jnp.square, grads)
    found, _ = mean_over_examples(
        "diagonal_fisher", squares, loss, params, examples, batch_size
    )
    return found

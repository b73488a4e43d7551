from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from ...linalg import nonzero
from ._examples import mean_over_examples


class GradientCoherence(NamedTuple):
    """How much the gradients of single examples have in common.

    Attributes:
        coherence: ``α = ‖E g_i‖² / E ‖g_i‖²``, between zero and one.
        helped: ``m α``, of m examples: how many of them a small step down the gradient of
            one helps, itself included, on average. One: orthogonal gradients, nothing is
            shared; ``m``: all alike.
        between: the same ratio of pairs of different examples, ``(m α − 1)/(m − 1)``: it
            does not depend on the number of examples, and is zero for orthogonal ones.
        by_leaf: ``α`` of each array of parameters.
    """

    coherence: Float[Array, ""]
    helped: Float[Array, ""]
    between: Float[Array, ""]
    by_leaf: PyTree


def gradient_coherence(
    loss: Callable[..., Scalar], params: PyTree, *examples: Any, batch_size: int = 1
) -> GradientCoherence:
    """Whether examples pull the parameters the same way: the m-coherence of gradients.

    ``α = E_ij[g_i·g_j] / E_i[g_i·g_i]`` over all pairs of m examples. What many examples
    agree on is learned first and generalizes; gradients that have nothing in common, as
    those of random labels late in training, memorize. One pass, and memory for
    ``batch_size`` gradients.

    Args:
        loss: ``loss(params, *example)`` of one example.
        params: a tree of floating arrays.
        *examples: trees whose leaves have the m examples along their first axis.
        batch_size: how many gradients are taken at once.

    Returns:
        A :class:`GradientCoherence`; zero where all gradients are.

    Raises:
        ValueError: without examples, for different numbers of them, or a ``batch_size``
            below one.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> loss = lambda w, x: x @ w
        >>> alike, apart = jnp.ones((4, 4)), jnp.eye(4)
        >>> for x in (alike, apart):
        ...     found = lrjax.metrics.gradient_coherence(loss, jnp.zeros(4), x)
        ...     print(found.helped, found.between)
        4.0 1.0
        1.0 0.0

    Reference:
        S. Chatterjee, P. Zielinski, "Making coherence out of nothing at all: measuring the
        evolution of gradient alignment" (2020), arXiv 2008.01217.
    """
    squares = lambda g: jnp.sum(g**2, axis=tuple(range(1, g.ndim)))
    both = lambda grads: (grads, jax.tree.map(squares, grads))
    (mean, energy), m = mean_over_examples(
        "gradient_coherence", both, loss, params, examples, batch_size
    )
    common = jax.tree.map(lambda g: jnp.sum(g**2), mean)
    total = lambda tree: sum(jax.tree.leaves(tree), jnp.zeros(()))
    alpha = total(common) / nonzero(total(energy))
    there = (total(energy) > 0).astype(alpha.dtype)
    between = (m * alpha - there) / max(m - 1, 1)
    by_leaf = jax.tree.map(lambda c, e: c / nonzero(e), common, energy)
    return GradientCoherence(alpha, m * alpha, between, by_leaf)

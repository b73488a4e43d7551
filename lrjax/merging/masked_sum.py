from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from .._arguments import check_key
from ..linalg import nonzero
from ._changes import Weights, checked_weights, map_changes, refuse_nodes
from .weighted_sum import weighted_sum


def concrete_mask(
    logits: PyTree, *, key: PRNGKeyArray | None = None, temperature: ArrayLike = 0.5
) -> PyTree:
    """A mask between zero and one that gradients reach: a relaxed coin for each number.

        m = sigmoid((log u − log(1 − u) + x) / T),   u uniform in (0, 1)

    with the logits ``x``, which are trained. Without a key the coin is left out, ``m =
    sigmoid(x / T)``, and at a small temperature that is a decision.

    Args:
        logits: a tree of arrays; zeros keep half.
        key: of the coins.
        temperature: ``T``, positive.

    Returns:
        A tree like the logits.

    Raises:
        TypeError: for what is no key.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> lrjax.merging.concrete_mask(jnp.array([2.0, -2.0]), temperature=0.01).tolist()
        [1.0, 0.0]

    Reference:
        C. J. Maddison, A. Mnih, Y. W. Teh, "The concrete distribution: a continuous
        relaxation of discrete random variables" (2016), arXiv 1611.00712.
    """
    check_key("concrete_mask", key)
    leaves, structure = jax.tree.flatten(logits)
    keys = [None] * len(leaves) if key is None else jr.split(key, len(leaves))

    def mask(x: Array, key: PRNGKeyArray | None) -> Array:
        coin = 0 if key is None else jr.logistic(key, x.shape, x.dtype)
        return jax.nn.sigmoid((coin + x) / temperature).astype(x.dtype)

    return structure.unflatten(mask(x, k) for x, k in zip(leaves, keys, strict=True))


def masked_sum(
    changes: Sequence[PyTree], mask: PyTree, weights: Weights | None = None
) -> PyTree:
    """The weighted sum of changes in the subspace that a mask leaves.

        Δ = Σ_k w_k (m ∘ Δ_k) / mean(m),   the mean over each array

    The mask is shared by all tasks: its logits are trained on what the merged model does,
    without labels by the entropy of its predictions, through :func:`concrete_mask`.

    Args:
        changes: trees of arrays of one structure.
        mask: a tree like one of them.
        weights: ``(k,)``, ones by default.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: for nodes in factors, and as :func:`weighted_sum`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = [jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])]
        >>> lrjax.merging.masked_sum(x, jnp.array([1.0, 0.0])).tolist()
        [8.0, 0.0]

    Reference:
        A. Tang et al., "Concrete subspace learning based interference elimination for
        multi-task model fusion" (2023), arXiv 2312.06173.
    """
    why = "the mask is one of the entries of a matrix."
    weights = checked_weights("masked_sum", weights, changes)
    weights = jnp.append(weights, 0)

    def merge(path: str, leaves: list[Any], weights: Array) -> Array:
        refuse_nodes("masked_sum", why, path, leaves)
        *rest, own = leaves
        own = own / nonzero(jnp.mean(own))
        return weighted_sum([own.astype(x.dtype) * x for x in rest], weights[:-1])

    return map_changes("masked_sum", merge, [*changes, mask], weights)

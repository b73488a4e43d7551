import math

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from .._arguments import check_key


def trim(change: PyTree, density: ArrayLike) -> PyTree:
    """Keep the largest entries of every array and set the others to zero.

    Of an array with ``N`` entries the ``⌊density · N⌋`` with the largest absolute values;
    of a LowRank node of each factor. What many tasks change a little is noise to the
    others: the first step of :func:`ties`, and before a weighted sum it is magnitude
    pruning.

    Args:
        change: a tree of arrays and nodes.
        density: the share that is kept, in [0, 1]; may be traced.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: for a density out of range.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> lrjax.merging.trim(jnp.array([1.0, -4.0, 2.0, 0.5]), 0.5).tolist()
        [0.0, -4.0, 2.0, 0.0]

    Reference:
        P. Yadav et al., "TIES-merging: resolving interference when merging models" (2023),
        arXiv 2306.01708.
    """
    _check_density("trim", density)

    def keep(x: Array) -> Array:
        order = jnp.argsort(-jnp.abs(x).ravel(), stable=True)
        # A share of 0.3 of ten is three, though 0.3 · 10 rounds to less in float32.
        count = jnp.floor(density * x.size * (1 + 4 * jnp.finfo(jnp.float32).eps))
        kept = jnp.zeros(x.size, bool).at[order].set(jnp.arange(x.size) < count)
        return jnp.where(kept.reshape(x.shape), x, 0)

    return jax.tree.map(keep, change)


def drop(change: PyTree, density: ArrayLike, *, key: PRNGKeyArray) -> PyTree:
    """Drop entries at random and rescale the others, which keeps the mean of each.

    Every entry of every array, of a LowRank node of each factor, is kept with the
    probability ``density`` and divided by it, else zero.

    Args:
        change: a tree of arrays and nodes.
        density: the probability, in (0, 1]; may be traced.
        key: of the choice.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: for a density out of range.
        TypeError: for what is no key.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> kept = lrjax.merging.drop(jnp.ones(1000), 0.5, key=jax.random.key(0))
        >>> sorted(set(kept.tolist()))
        [0.0, 2.0]

    Reference:
        L. Yu et al., "Language models are super Mario: absorbing abilities from homologous
        models as a free lunch" (2023), arXiv 2311.03099.
    """
    _check_density("drop", density)
    check_key("drop", key)
    leaves, structure = jax.tree.flatten(change)

    def choose(x: Array, key: PRNGKeyArray) -> Array:
        kept = jr.bernoulli(key, density, x.shape)
        return jnp.where(kept, x / density, 0).astype(x.dtype)

    keys = jr.split(key, len(leaves))
    return structure.unflatten(choose(x, k) for x, k in zip(leaves, keys, strict=True))


def _check_density(owner: str, density: ArrayLike) -> None:
    if isinstance(density, float | int) and not (0 <= density <= 1):
        raise ValueError(f"{owner}'s density is a share in [0, 1], got {density}.")
    if owner == "drop" and isinstance(density, float | int) and math.isclose(density, 0):
        raise ValueError("drop's density must be above 0: what is kept is divided by it.")

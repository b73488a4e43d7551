from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._arguments import check_key
from ..linalg import nonzero, outer, working_dtype
from ..lowrank import LowRank
from ._changes import describe, even, map_changes


def cluster_units(
    changes: Sequence[PyTree], units: int, *, key: PRNGKeyArray, steps: int = 20
) -> PyTree:
    """Sort the columns of all factors into clusters, and keep one column for each.

    A unit is one column of both factors, ``(a, b)`` of the part ``a bᵀ`` of a product.
    Those of all nodes in one place, of any width, are clustered by k-means as vectors of
    length ``m + n``; the mean of a cluster, stretched to the mean length of its members, is
    a unit of the merge. So what several adapters have in common is there once. The product
    is scaled by the root of their mean width over ``units``. It depends on how the sizes of
    a product are split between its factors: balance them first where adapters differ in
    that.

    Args:
        changes: trees of one structure, of LowRank nodes.
        units: the width of the merge, at most the sum of the widths.
        key: of the first centers, which are drawn far from each other.
        steps: of k-means.

    Returns:
        A tree of nodes of the width ``units``.

    Raises:
        ValueError: for arrays, more units than there are, and as :func:`weighted_sum`.
        TypeError: for what is no key.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> e = jnp.eye(3)
        >>> one = lrjax.LowRank(e[:, :2], e[:, :2])
        >>> two = lrjax.LowRank(e[:, 1:], e[:, 1:])
        >>> x = lrjax.merging.cluster_units([one, two], 3, key=jax.random.key(0))
        >>> jnp.diag(x.materialize()).round(3).tolist()
        [0.816, 0.816, 0.816]

    Reference:
        Z. Zhao et al., "Merging LoRAs like playing LEGO: pushing the modularity of LoRA to
        extremes through rank-wise clustering" (2024), arXiv 2409.16167.
    """
    check_key("cluster_units", key)

    def merge(path: str, leaves: list[Any], weights: Array) -> LowRank:
        del weights
        if not all(isinstance(leaf, LowRank) for leaf in leaves):
            raise ValueError(
                f"cluster_units needs LowRank nodes, and {path or 'the root'} has "
                f"{[describe(leaf) for leaf in leaves]}."
            )
        total = sum(leaf.rank for leaf in leaves)
        if not 1 <= units <= total:
            raise ValueError(
                f"cluster_units found {total} units at {path or 'the root'}, and cannot "
                f"sort them into {units} clusters."
            )
        dtype = jnp.result_type(*(leaf.dtype for leaf in leaves))
        columns = lambda side: jnp.concatenate([getattr(x, side) for x in leaves], -1)
        whole = jnp.concatenate([columns("left"), columns("right")], axis=-2).mT
        whole = whole.astype(working_dtype(dtype))
        # Every matrix of a stack is clustered for itself.
        cluster = lambda x: _clustered(x, units, key, steps)
        for _ in range(whole.ndim - 2):
            cluster = jax.vmap(cluster)
        merged = cluster(whole).mT
        # Half of the scale, the root of √(width/units), on either factor.
        merged = merged * (total / len(leaves) / units) ** 0.25
        m = leaves[0].shape[-2]
        return LowRank(merged[..., :m, :].astype(dtype), merged[..., m:, :].astype(dtype))

    return map_changes("cluster_units", merge, changes, even(len(changes)))


def _clustered(
    x: Float[Array, "k n"], count: int, key: PRNGKeyArray, steps: int
) -> Float[Array, "c n"]:
    """The means of clusters, stretched to the mean length of their members."""
    centers = _spread_out(x, count, key)
    members = None

    def step(_, centers: Array) -> Array:
        members = _members(x, centers)
        sizes = jnp.sum(members, axis=0)[:, None]
        # A cluster that has lost its members stays where it is.
        return jnp.where(sizes > 0, members.T @ x / nonzero(sizes), centers)

    centers = lax.fori_loop(0, steps, step, centers)
    members = _members(x, centers)
    sizes = jnp.sum(members, axis=0)
    lengths = members.T @ jnp.linalg.norm(x, axis=1) / nonzero(sizes)
    own = jnp.linalg.norm(centers, axis=1)
    return jnp.where(sizes > 0, lengths / nonzero(own), 0)[:, None] * centers


def _members(x: Array, centers: Array) -> Float[Array, "k c"]:
    """One where a point is nearest to a center, else zero."""
    nearest = jnp.argmin(_squared_distances(x, centers), axis=1)
    return jax.nn.one_hot(nearest, len(centers), dtype=x.dtype)


def _squared_distances(x: Array, centers: Array) -> Float[Array, "k c"]:
    squares = lambda y: jnp.sum(y * y, axis=1)
    products = outer(x, centers)
    return squares(x)[:, None] - 2 * products + squares(centers)[None, :]


def _spread_out(x: Array, count: int, key: PRNGKeyArray) -> Float[Array, "c n"]:
    """First centers: points drawn with their squared distances to those before."""
    keys = jr.split(key, count)
    first = jr.randint(keys[0], (), 0, len(x))
    centers = jnp.zeros((count, x.shape[1]), x.dtype).at[0].set(x[first])
    gaps = jnp.sum((x - x[first][None]) ** 2, axis=1)

    def add(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        centers, gaps = state
        # Of points that coincide with centers any will do.
        logits = jnp.log(jnp.where(jnp.max(gaps) > 0, gaps, 1))
        chosen = x[jr.categorical(keys[i], logits)]
        gaps = jnp.minimum(gaps, jnp.sum((x - chosen[None]) ** 2, axis=1))
        return centers.at[i].set(chosen), gaps

    return lax.fori_loop(1, count, add, (centers, gaps))[0]

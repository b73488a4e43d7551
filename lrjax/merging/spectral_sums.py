from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..linalg import polar, svd, times, working_dtype
from ..lowrank import LowRank, svd as low_rank_svd
from ._changes import Weights, checked_weights, map_changes, materialized
from .weighted_sum import weighted_sum


def orthogonalized_sum(
    changes: Sequence[PyTree],
    weights: Weights | None = None,
    *,
    rank: int | None = None,
) -> PyTree:
    """The leading singular directions of every change, made orthogonal to each other's.

    With ``U_k Σ_k V_kᵀ`` the leading ``rank`` singular triplets of ``Δ_k``::

        Δ = polar([U_1, U_2, …]) diag(w_1 Σ_1, w_2 Σ_2, …) polar([V_1, V_2, …])ᵀ

    The polar factor has the orthonormal columns that are nearest to the given ones, all at
    once: tasks whose directions overlap stop to disturb each other. Changes on orthogonal
    subspaces are summed as they are.

    Args:
        changes: trees of one structure, of nodes and matrices ``(*b, m, n)``.
        weights: ``(k,)``, ones by default.
        rank: of each change; by default that of its node, but so that all of them together
            fit the shorter side: ``min(m, n) // k``, at least 1.

    Returns:
        A tree of LowRank nodes. Arrays with fewer than two axes, biases, are summed.

    Raises:
        ValueError: if ``k · rank`` exceeds the shorter side of a matrix, and as
            :func:`weighted_sum`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> e = jnp.eye(3)
        >>> x = [lrjax.LowRank(2 * e[:, :1], e[:, :1]), lrjax.LowRank(e[:, 1:2], e[:, 1:2])]
        >>> jnp.diag(lrjax.merging.orthogonalized_sum(x).materialize()).round(4).tolist()
        [2.0, 1.0, 0.0]

    Reference:
        A. A. Gargiulo et al., "Task singular vectors: reducing task interference in model
        merging" (2025), IEEE Conference on Computer Vision and Pattern Recognition.
    """
    weights = checked_weights("orthogonalized_sum", weights, changes)

    def merge(path: str, leaves: list[Any], weights: Array) -> Any:
        if leaves[0].ndim < 2:
            return weighted_sum(leaves, weights)
        most = max(min(leaves[0].shape[-2:]) // len(leaves), 1)
        widths = [_width(path, leaf, rank, most, len(leaves)) for leaf in leaves]
        found = [_triplets(leaf, width) for leaf, width in zip(leaves, widths, strict=True)]
        left, right = (jnp.concatenate([f[i] for f in found], axis=-1) for i in (0, 2))
        values = jnp.concatenate(
            [w.astype(f[1].dtype) * f[1] for w, f in zip(weights, found, strict=True)], -1
        )
        dtype = jnp.result_type(*(leaf.dtype for leaf in leaves))
        left = polar(left) * values[..., None, :]
        return LowRank(left.astype(dtype), polar(right).astype(dtype))

    return map_changes("orthogonalized_sum", merge, changes, weights)


def _width(path: str, leaf: Any, rank: int | None, most: int, count: int) -> int:
    own = leaf.rank if isinstance(leaf, LowRank) else min(leaf.shape[-2:])
    if rank is not None and rank > most:
        raise ValueError(
            f"orthogonalized_sum cannot make {count} · {rank} directions orthogonal in a "
            f"matrix {tuple(leaf.shape)} at {path or 'the root'}: rank may be {most} there."
        )
    return min(own, most if rank is None else rank)


def _triplets(leaf: Any, rank: int) -> tuple[Array, Array, Array]:
    """The leading singular triplets of a node or an array."""
    if isinstance(leaf, LowRank) and leaf.rank <= min(leaf.shape[-2:]):
        found = low_rank_svd(leaf)
        values = jnp.diagonal(found.core, axis1=-2, axis2=-1)
        left, right = found.left, found.right
    else:
        x = materialized(leaf)
        left, values, right = svd(x.astype(working_dtype(x.dtype)))
        right = right.mT
    return left[..., :rank], values[..., :rank], right[..., :rank]


def isotropic_sum(changes: Sequence[PyTree], weights: Weights | None = None) -> PyTree:
    """The sum of the changes with all of its singular values equal to their mean.

    With the singular value decomposition ``Σ_k w_k Δ_k = U diag(σ) Vᵀ``::

        Δ = mean(σ) U Vᵀ

    Directions that many tasks share have large singular values and drown those of one task:
    here all count the same. Of nodes the mean is over the directions that their factors
    have together, at most as many as the sum of the widths.

    Args:
        changes: trees of one structure, of nodes and matrices ``(*b, m, n)``.
        weights: ``(k,)``, ones by default.

    Returns:
        A tree of the same structure. Arrays with fewer than two axes, biases, are summed.

    Raises:
        ValueError: as :func:`weighted_sum`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = [jnp.diag(jnp.array([4.0, 0.0])), jnp.diag(jnp.array([1.0, 1.0]))]
        >>> jnp.diag(lrjax.merging.isotropic_sum(x)).round(4).tolist()
        [3.0, 3.0]

    Reference:
        D. Marczak et al., "No task left behind: isotropic model merging with common and
        task-specific subspaces" (2025), International Conference on Machine Learning.
    """
    weights = checked_weights("isotropic_sum", weights, changes)

    def merge(path: str, leaves: list[Any], weights: Array) -> Any:
        del path
        total = weighted_sum(leaves, weights)
        if total.ndim < 2:
            return total
        node = isinstance(total, LowRank)
        left, values, right = _triplets(total, min(*total.shape[-2:]))
        left = left * jnp.mean(values, axis=-1)[..., None, None]
        left, right = left.astype(total.dtype), right.astype(total.dtype)
        return LowRank(left, right) if node else times(left, right.mT)

    return map_changes("isotropic_sum", merge, changes, weights)

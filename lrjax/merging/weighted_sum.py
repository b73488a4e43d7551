from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..linalg import working_dtype
from ..lowrank import LowRank, truncate
from ._changes import Weights, checked_weights, even, map_changes, materialized


def weighted_sum(
    changes: Sequence[PyTree],
    weights: Weights | None = None,
    *,
    rank: int | None = None,
) -> PyTree:
    """``Σ_k w_k Δ_k``, exactly: factors stand beside each other, and widths add up.

        left = [w_1 left_1, w_2 left_2, …],   right = [right_1, right_2, …]

    so that ``left rightᵀ = Σ_k w_k left_k right_kᵀ``, whatever their widths. (Averages of
    the factors themselves have cross terms, ``left_1 right_2ᵀ``.) Of arrays it is the
    weighted sum: task arithmetic, where they are differences of fine-tuned models to their
    base.
    Where a node stands beside an array, the sum is an array. The weights may be traced and
    differentiated, also at zero.

    Args:
        changes: trees of one structure, of :class:`lrjax.LowRank` or
            :class:`lrjax.SVDForm` nodes ``(*b, m, n)`` and arrays.
        weights: ``(k,)``, one for each tree; by default the mean, ``1/k``.
        rank: the largest width of a node: of what is wider the best approximation,
            balanced.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: for trees that differ in structure or shapes, or another number of
            weights.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> one = {"w": lrjax.LowRank(jnp.ones((3, 1)), jnp.ones((2, 1)))}
        >>> two = {"w": lrjax.LowRank(jnp.eye(3)[:, :2], jnp.eye(2))}
        >>> both = lrjax.merging.weighted_sum([one, two], [1.0, 2.0])
        >>> both["w"].rank, both["w"].materialize().tolist()
        (3, [[3.0, 1.0], [1.0, 3.0], [1.0, 1.0]])

    Reference:
        Z. Wang et al., "FLoRA: federated fine-tuning large language models with
        heterogeneous low-rank adaptations" (2024), arXiv 2409.05976; of arrays: G.
        Ilharco et al., "Editing models with task arithmetic" (2022), arXiv 2212.04089.
    """
    weights = checked_weights("weighted_sum", weights, changes, even)

    def merge(path: str, leaves: list[Any], weights: Array) -> Any:
        del path
        if not all(isinstance(leaf, LowRank) for leaf in leaves):
            return _dense(leaves, weights)
        whole = _side_by_side(leaves, weights)
        if rank is None or whole.rank <= rank:
            return whole
        # Factors that are wider than the matrix are larger than it.
        wide = whole.rank > min(whole.shape[-2:])
        whole = whole.materialize() if wide else whole
        return truncate(whole, min(rank, *whole.shape[-2:]))

    return map_changes("weighted_sum", merge, changes, weights)


def _dense(leaves: list[Any], weights: Array) -> Array:
    arrays = [materialized(leaf) for leaf in leaves]
    dtype = jnp.result_type(*arrays)
    wide = working_dtype(dtype)
    weights = weights.astype(wide)
    # One after the other: a stack of them all may not fit the memory.
    total = sum(w * x.astype(wide) for w, x in zip(weights, arrays, strict=True))
    return jnp.asarray(total).astype(dtype)


def _side_by_side(leaves: list[LowRank], weights: Array) -> LowRank:
    dtype = jnp.result_type(*(x.dtype for x in leaves))
    left = [
        (w.astype(working_dtype(dtype)) * x.left).astype(dtype)
        for w, x in zip(weights, leaves, strict=True)
    ]
    right = [x.right.astype(dtype) for x in leaves]
    return LowRank(jnp.concatenate(left, axis=-1), jnp.concatenate(right, axis=-1))

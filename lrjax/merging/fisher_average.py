from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..linalg import nonzero, working_dtype
from ._changes import Weights, checked_weights, even, map_changes, over_stack, refuse_nodes


def fisher_average(
    params: Sequence[PyTree], fishers: Sequence[PyTree], weights: Weights | None = None
) -> PyTree:
    """The average of models, each number weighed by how sure its model is of it.

        θ_i = Σ_k w_k F_ki θ_ki / Σ_k w_k F_ki

    with the diagonal ``F_k`` of the Fisher information of model k: the minimum of the sum
    of quadratic approximations of their losses. Where no model has any, the weighted mean.

    Args:
        params: trees of arrays of one structure; or changes of one base.
        fishers: of each a tree like it, not negative.
        weights: ``(k,)``, not negative, the same for all by default. Models whose Fisher
            information is of another size count more: divide each by its norm against it.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: for nodes in factors, whose entries mean nothing without each other, as
            many trees of Fisher information as of parameters, and as :func:`weighted_sum`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> params = [jnp.array([1.0, 1.0]), jnp.array([3.0, 3.0])]
        >>> sure = [jnp.array([3.0, 0.0]), jnp.array([1.0, 0.0])]
        >>> lrjax.merging.fisher_average(params, sure).tolist()
        [1.5, 2.0]

    Reference:
        M. Matena, C. Raffel, "Merging models with Fisher-weighted averaging" (2021), arXiv
        2111.09832. Special case: equal Fisher information gives the weighted mean.
    """
    if len(params) != len(fishers):
        raise ValueError(
            f"fisher_average needs a tree of Fisher information for each of {len(params)} "
            f"trees of parameters, got {len(fishers)}."
        )
    why = "the Fisher information of a factor is not that of the product."
    weights = checked_weights("fisher_average", weights, params, even)

    def merge(path: str, leaves: list[Any], weights: Array) -> Array:
        refuse_nodes("fisher_average", why, path, leaves)
        dtype = jnp.result_type(*leaves[: len(params)])
        stack = jnp.stack([x.astype(working_dtype(dtype)) for x in leaves])
        x, fisher = stack[: len(params)], stack[len(params) :]
        weight = over_stack(weights[: len(params)].astype(x.dtype), x)
        # In units of the largest, as squares of gradients are often near the least number.
        fisher = fisher / nonzero(jnp.max(fisher))
        total = jnp.sum(weight * fisher, axis=0)
        mean = jnp.sum(weight * x, axis=0) / nonzero(jnp.sum(weight))
        sure = jnp.sum(weight * fisher * x, axis=0) / nonzero(total)
        return jnp.where(total > 0, sure, mean).astype(dtype)

    both = jnp.concatenate([weights, weights])
    return map_changes("fisher_average", merge, [*params, *fishers], both)

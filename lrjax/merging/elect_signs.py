from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from ._changes import Weights, checked_weights, map_arrays, map_changes, over_stack
from .sparsify import trim


Vote = Literal["total", "frequency"]


def elect_signs(
    changes: Sequence[PyTree], weights: Weights | None = None, *, by: Vote = "total"
) -> PyTree:
    """The mean of those changes that agree with the sign that most of them have.

    For every entry, with ``s = sign(Σ_k Δ_k)``, plus if that is zero::

        Δ = Σ_{k: sign Δ_k = s} w_k Δ_k / #{k: sign Δ_k = s},   0 if there is none.

    The vote is taken before the weights. Of LowRank nodes the factors are merged each for
    itself, as PEFT does, with ``√|w_k|`` on both: materialize them for a vote on the
    entries of the product.

    Args:
        changes: trees of one structure, of nodes of one width at each place and arrays.
        weights: ``(k,)``, ones by default.
        by: the vote: ``"total"``, of the sum; ``"frequency"``, of the number.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: for another vote, and as :func:`add_factors`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = [jnp.array([3.0, 1.0]), jnp.array([-1.0, 3.0]), jnp.array([5.0, -0.5])]
        >>> lrjax.merging.elect_signs(x).tolist()
        [4.0, 2.0]

    Reference:
        P. Yadav et al., "TIES-merging: resolving interference when merging models" (2023),
        arXiv 2306.01708.
    """
    if by not in ("total", "frequency"):
        raise ValueError(f'elect_signs votes by "total" or "frequency", got {by!r}.')

    def elect(stack: Array, weights: Array) -> Array:
        votes = stack if by == "total" else jnp.sign(stack)
        elected = jnp.where(jnp.sum(votes, axis=0) >= 0, 1, -1)
        agree = jnp.sign(stack) == elected[None]
        total = jnp.sum(jnp.where(agree, over_stack(weights, stack) * stack, 0), axis=0)
        return total / jnp.maximum(jnp.sum(agree, axis=0), 1)

    weights = checked_weights("elect_signs", weights, changes)
    leaf = partial(map_arrays, "elect_signs", elect)
    return map_changes("elect_signs", leaf, changes, weights)


def ties(
    changes: Sequence[PyTree],
    weights: Weights | None = None,
    *,
    density: ArrayLike = 0.2,
    by: Vote = "total",
) -> PyTree:
    """TIES: trim, elect signs, and average what agrees.

    ``elect_signs([trim(change, density) for change in changes], weights)``. With
    :func:`drop` in place of :func:`trim` it is DARE-TIES.

    Args:
        changes: as for :func:`elect_signs`.
        weights: ``(k,)``, ones by default.
        density: the share of the entries that are kept of each.
        by: as for :func:`elect_signs`.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: as :func:`elect_signs` and :func:`trim`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = [jnp.array([3.0, 0.1, 0.2, 0.0]), jnp.array([1.0, 0.3, -0.1, 0.2])]
        >>> lrjax.merging.ties(x, density=0.5).round(2).tolist()
        [2.0, 0.3, 0.2, 0.0]

    Reference:
        P. Yadav et al., "TIES-merging: resolving interference when merging models" (2023),
        arXiv 2306.01708.
    """
    return elect_signs([trim(change, density) for change in changes], weights, by=by)

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from jaxtyping import PyTree

from ._changes import Weights, checked_weights, map_arrays, map_changes, over_stack


def add_factors(changes: Sequence[PyTree], weights: Weights) -> PyTree:
    """The factors added, each for itself: a merge of the width of one, with cross terms.

        left = Σ_k √|w_k| left_k,   right = Σ_k sign(w_k) √|w_k| right_k

    The product is not ``Σ_k w_k left_k right_kᵀ``: it has every ``left_j right_kᵀ`` as
    well, and depends on how each product is split. It is what PEFT calls ``linear``, and of
    use where adapters started from the same factors and stayed near them; else take
    :func:`weighted_sum`. Arrays are summed.

    Args:
        changes: trees of one structure, of nodes of one width at each place and arrays.
        weights: ``(k,)``.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: for nodes of several widths in one place, and as :func:`weighted_sum`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.ones((2, 1)), jnp.ones((2, 1)))
        >>> lrjax.merging.add_factors([x, x], [0.25, 0.25]).materialize()[0, 0]
        Array(1., dtype=float32)

    Reference:
        S. Mangrulkar et al., "PEFT: state-of-the-art parameter-efficient fine-tuning
        methods" (2022), github.com/huggingface/peft.
    """
    rule = lambda stack, weights: jnp.sum(over_stack(weights, stack) * stack, axis=0)
    leaf = partial(map_arrays, "add_factors", rule)
    weights = checked_weights("add_factors", weights, changes)
    return map_changes("add_factors", leaf, changes, weights)

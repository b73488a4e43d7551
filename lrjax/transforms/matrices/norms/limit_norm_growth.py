from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike, PyTree

from ...._arguments import checks_trees
from ...._matrices import check_real
from ...._moments import register_moments
from ....subspaces import limit_growth
from ._layers import layer_norm, zeros_like_layers


class LimitNormGrowthState(NamedTuple):
    """The state of :func:`limit_norm_growth`: the last norm of each layer."""

    norm: PyTree


# No moment, and nothing that a change of basis would touch.
register_moments(LimitNormGrowthState)


@checks_trees
def limit_norm_growth(max_growth: ArrayLike = 1.01) -> optax.GradientTransformation:
    """Limit the step-to-step growth of each layer's update norm.

    ``U ← U · min(1, γ ‖U_last‖ / ‖U‖)`` for each matrix, ``U_last`` as limited. The first
    update, and one after a zero update, passes as it is. Unlike clipping it follows the
    scale of the updates, and only takes the edge off sudden jumps.

    Args:
        max_growth: ``γ``, the largest ratio of one norm to the last.

    Returns:
        The transform. Its state is one number a layer: the last two axes of a leaf, the
        axes before them being a stack of layers.

    Raises:
        TypeError: for complex leaves.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.limit_norm_growth(1.5)
        >>> _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
        >>> print(tx.update(jnp.array([30.0, 40.0]), state)[0])
        [4.5 6. ]

    Reference:
        X. Chen et al., "Fira: can we achieve full-rank training of LLMs under low-rank
        constraint?" (2024), arXiv 2410.01623.
    """

    def init(params):
        check_real("limit_norm_growth", params)
        return LimitNormGrowthState(zeros_like_layers(params))

    def update(updates, state, params=None):
        del params
        norms = jax.tree.map(layer_norm, updates)
        factors = jax.tree.map(
            lambda n, o: limit_growth(n, o, max_growth), norms, state.norm
        )
        new = jax.tree.map(
            lambda n, f, o: (n * f).astype(o.dtype), norms, factors, state.norm
        )
        limited = jax.tree.map(
            lambda u, f: (u * f).astype(jnp.result_type(u)), updates, factors
        )
        return limited, LimitNormGrowthState(new)

    return optax.GradientTransformation(init, update)

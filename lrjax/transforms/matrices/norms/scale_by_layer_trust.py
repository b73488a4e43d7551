from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Int

from ...._arguments import checks_trees
from ...._matrices import check_real
from ...._tree import check_params
from ....linalg import increment
from ._layers import layer_norm


class ScaleByLayerTrustState(NamedTuple):
    """The state of :func:`scale_by_layer_trust`: the number of steps."""

    count: Int[Array, ""]


@checks_trees
def scale_by_layer_trust(
    coefficient: ArrayLike | Callable[[Array], ArrayLike] = 1e-3,
    *,
    max_norm: ArrayLike = jnp.inf,
) -> optax.GradientTransformation:
    """Scale the update of each layer in proportion to its weights, by a schedule.

    ``U ← η_t · ‖W‖/‖U‖ · U``, norms cut at ``max_norm``; unchanged where a norm is zero.
    With a constant ``η`` that is LARS, which wants a warm-up of the learning rate. One that
    starts high and decays needs none (TVLARS)::

        optax.chain(
            optax.add_decayed_weights(5e-4),
            lrjax.scale_by_layer_trust(
                lambda t: 1 / (0.1 + jnp.exp(1e-3 * (t + 1))), max_norm=10
            ),
            optax.trace(0.9),
            optax.scale_by_learning_rate(1e-3),
        )

    Args:
        coefficient: ``η``, a number or a schedule.
        max_norm: where the norms are cut.

    Returns:
        The transform. A layer is the last two axes of a leaf, the axes before them being
        a stack of layers.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.scale_by_layer_trust(0.1)
        >>> w, g = jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0])
        >>> print(tx.update(g, tx.init(w), w)[0])
        [0.  0.5]

    Reference:
        Y. You, I. Gitman, B. Ginsburg, "Large batch training of convolutional networks"
        (2017), arXiv 1708.03888; K. Do, D. Nguyen, H. Nguyen, L. Tran-Thanh, N.-H. Tran,
        Q.-V. Pham, "Revisiting LARS for large batch training generalization of neural
        networks" (2023), arXiv 2309.14053.
    """

    def init(params):
        check_real("scale_by_layer_trust", params)
        return ScaleByLayerTrustState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        check_params("scale_by_layer_trust", params)
        rate = coefficient(state.count) if callable(coefficient) else coefficient

        def scale(u, w):
            size, weight = (jnp.minimum(layer_norm(x), max_norm) for x in (u, w))
            both = (size > 0) & (weight > 0)
            ratio = rate * weight / jnp.where(both, size, 1)
            return (u * jnp.where(both, ratio, 1)).astype(u.dtype)

        scaled = jax.tree.map(scale, updates, params)
        return scaled, ScaleByLayerTrustState(increment(state.count))

    return optax.GradientTransformation(init, update)

from collections.abc import Mapping

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from ...linalg import order_statistic
from ..kinds.factors import Factors
from ..protocol import Adapters, map_adapters
from .masks import map_factors


def prune_inputs(
    adapters: Adapters, norms: Mapping[str, Array], *, fraction: ArrayLike = 0.5
) -> Adapters:
    """Zero those numbers of ``A`` that meet the least of the input.

    In each row k of ``A (r, in)`` the share of numbers with the smallest
    ``|A_kj| · ‖x_j‖`` becomes zero, where ``‖x_j‖`` is the norm of input j over a batch, or
    a running average of it. The zeros are values, no mask: the optimizer moves on from
    them. To be done every so many steps.

    Args:
        adapters: all of them, or the trained half.
        norms: ``{path: (*b, in)}``; adapters of other paths stay as they are.
        fraction: the share that becomes zero.

    Returns:
        Adapters with zeros in their right factors.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> layer = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(layer, lrjax.LoRA(1), key=jax.random.key(1))
        >>> right = jnp.array([[1.0], [-2.0], [3.0], [4.0]])
        >>> adapters = eqx.tree_at(lambda a: a.layers[""].pair.right, adapters, right)
        >>> norms = {"": jnp.array([9.0, 1.0, 1.0, 1.0])}
        >>> sparse = lrjax.adapters.prune_inputs(adapters, norms)
        >>> print(sparse[""].pair.right[:, 0])
        [1. 0. 0. 4.]

    Reference:
        N. Benedek, L. Wolf, "PRILoRA: pruned and rank-increasing low-rank adaptation"
        (2024), arXiv:2401.11316.
    """

    def prune(path, adapter):
        if path not in norms:
            return adapter
        return map_factors(lambda node: _pruned(node, norms[path], fraction), adapter)

    return map_adapters(prune, adapters)


def _pruned(factors: Factors, norms: Float[Array, "*b n"], fraction: ArrayLike) -> Factors:
    right = factors.pair.right
    size = right.shape[-2]
    met = jnp.abs(right.astype(norms.dtype)) * norms[..., :, None]
    # Rounding must not make 20 a 19.
    gone = jnp.floor(jnp.asarray(fraction, jnp.float32) * size * (1 + 1e-5))
    level = order_statistic(met, size - gone.astype(jnp.int32), axis=-2)
    kept = jnp.where(met >= level, right, 0)
    return eqx.tree_at(lambda a: a.pair.right, factors, kept)

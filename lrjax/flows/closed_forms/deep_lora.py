"""What adapters in every layer of a deep linear network can express."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from ...linalg import singular_values, svd, times, working_dtype
from ...lowrank import LowRank


def deep_lora_floor(
    weights: Sequence[Float[Array, "_ _"]], target: Float[Array, "m n"], rank: int
) -> Scalar:
    """The least :func:`deep_lora_loss` of adapters of rank R in each of L layers.

    They change the product by a matrix of rank RL at most, and any such change is theirs::

        min ½‖M − (W_L + X_L) ⋯ (W_1 + X_1)‖² = ½ Σ_{i > RL} σ_i(M − W_L ⋯ W_1)²

    Args:
        weights: the frozen ``W_1`` to ``W_L``, the first layer first, of full rank and with
            hidden layers that are no narrower than both ends.
        target: ``M``.
        rank: ``R``, static.

    Returns:
        The loss.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> target = jnp.diag(jnp.array([4.0, 3.0, 2.0]))
        >>> float(lrjax.flows.deep_lora_floor([jnp.eye(3), jnp.eye(3)], target, 1))
        0.5

    Reference:
        Y. Zeng, K. Lee, "The expressive power of low-rank adaptation" (2023), arXiv
        2310.17513.
    """
    values = singular_values(target - _product(weights))
    return 0.5 * jnp.sum(values[rank * len(weights) :] ** 2)


def deep_lora_optimum(
    weights: Sequence[Float[Array, "_ _"]], target: Float[Array, "m n"], rank: int
) -> list[LowRank]:
    """Adapters of a deep linear network that reach :func:`deep_lora_floor`.

    The singular triples of ``M − W_L ⋯ W_1`` are dealt out, R to each layer. With ``S`` the
    product of the layers behind and ``Q`` that of the adapted ones before, layer l takes
    ``X_l = S⁺ U_l Σ_l V_lᵀ Q⁺``, which adds ``U_l Σ_l V_lᵀ`` to the product.

    Args:
        weights: as in :func:`deep_lora_floor`. What the first layers have reached, ``W_L ⋯
            W_1 + Σ U_l Σ_l V_lᵀ``, must have full rank, too; that of random weights does.
        target: ``M``.
        rank: ``R``, static.

    Returns:
        ``X_1`` to ``X_L``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> weights, target = [jnp.eye(2), jnp.eye(2)], jnp.diag(jnp.array([4.0, 3.0]))
        >>> adapters = lrjax.flows.deep_lora_optimum(weights, target, 1)
        >>> print(lrjax.flows.deep_lora_loss(adapters, weights, target).round(4))
        0.0

    Reference:
        Y. Zeng, K. Lee, "The expressive power of low-rank adaptation" (2023), arXiv
        2310.17513. For hidden layers that are wider than both ends derived here.
    """
    dtype = target.dtype
    weights = [weight.astype(working_dtype(dtype)) for weight in weights]
    u, values, vt = svd(target - _product(weights))
    beyond = max(rank * len(weights) - len(values), 0)
    root = jnp.sqrt(values)
    left, right = (
        jnp.pad(side * root[None, :], ((0, 0), (0, beyond))) for side in (u, vt.T)
    )
    adapters, adapted = [], []
    for l, weight in enumerate(weights):
        mine = slice(l * rank, (l + 1) * rank)
        before = [reached.T for reached in reversed(adapted)]
        x = LowRank(
            _undone(weights[l + 1 :], left[:, mine]), _undone(before, right[:, mine])
        )
        adapted.append(weight + x.materialize())
        adapters.append(LowRank(x.left.astype(dtype), x.right.astype(dtype)))
    return adapters


def _undone(weights: Sequence[Array], side: Array) -> Array:
    """The least ``Y`` with ``W_k ⋯ W_1 Y = side``."""
    return times(jnp.linalg.pinv(_product(weights)), side) if weights else side


def _product(weights: Sequence[Array]) -> Array:
    product = weights[0]
    for weight in weights[1:]:
        product = times(weight, product)
    return product

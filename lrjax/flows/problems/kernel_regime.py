"""Networks in the place of which their linearization may stand."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from ..._sharding import einsum
from ...lowrank import LowRank


def linearized_loss(
    x: LowRank,
    jacobian: Float[Array, "k m n"],
    residual: Float[Array, " k"],
    nuclear_weight: ArrayLike = 0.0,
) -> Scalar:
    """LoRA in the kernel regime, ``½Σ(⟨J_k, X⟩ − y_k)² + ½λ(‖left‖² + ‖right‖²)``.

    The network is replaced by its linearization at the frozen weight. The last term is,
    by its smallest value over all factorizations, ``λ`` times the nuclear norm. Once
    ``r(r + 1)/2`` exceeds the number k of numbers to fit, a generic problem has no
    spurious local minimum.

    Args:
        x: the factors.
        jacobian: of each of the k outputs (all examples and classes) with respect to the
            weight.
        residual: ``y``, what the outputs lack.
        nuclear_weight: ``λ``, the weight decay of the factors.

    Returns:
        The loss.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.ones((1, 1)), jnp.ones((1, 1)))
        >>> jacobian, residual = jnp.ones((1, 1, 1)), jnp.array([3.0])
        >>> float(lrjax.flows.linearized_loss(x, jacobian, residual, 1.0))
        3.0

    Reference:
        U. Jang, J. Lee, E. Ryu, "LoRA training in the NTK regime has no spurious local
        minima" (2024), arXiv 2402.11867.
    """
    outputs = einsum("kmn,mr,nr->k", jacobian, x.left, x.right)
    squares = jnp.sum(x.left**2) + jnp.sum(x.right**2)
    return 0.5 * jnp.sum((outputs - residual) ** 2) + 0.5 * nuclear_weight * squares


def lazy_loss(function: Callable[..., Array]) -> Callable[..., Scalar]:
    """Least squares of any model whose outputs are scaled: the larger, the lazier.

    ::

        loss(params, start, inputs, targets, scale) = ‖α (f(θ, x) − f(θ₀, x)) − y‖² / 2α²

    By the factor ``α⁻²`` the outputs take the same time for every α. As α grows the
    parameters and the tangent kernel move by ``O(1/α)`` of themselves, and the outputs ``α
    (f(θ) − f(θ₀))`` come to those of :func:`kernel_flow`; as it shrinks, features are
    learnt.

    Args:
        function: ``f(params, inputs)``. One function object gives one loss: make it once.

    Returns:
        The loss, for ``gradient_flow(loss, params, start, inputs, targets, scale)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> loss = lrjax.flows.lazy_loss(lambda w, x: x * w**2)
        >>> one = jnp.ones(1)
        >>> float(loss(2 * one, one, one, 5 * one, 1.0))
        2.0

    Reference:
        L. Chizat, E. Oyallon, F. Bach, "On lazy training in differentiable programming"
        (2018), arXiv 1812.07956.
    """

    def loss(
        params: PyTree, start: PyTree, inputs: PyTree, targets: Array, scale: ArrayLike
    ) -> Scalar:
        moved = function(params, inputs) - function(start, inputs)
        return 0.5 * jnp.sum((moved - targets / scale) ** 2)

    return loss

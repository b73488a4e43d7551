import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from ..linalg import cross, gram, nonzero
from ..lowrank import LowRank


def imbalance(x: LowRank) -> Float[Array, "*batch r r"]:
    """How unequal two factors are: ``D = leftᵀleft − rightᵀright``.

    Every gradient flow conserves D if its loss depends on the factors through their
    product alone: also that of an adapter inside a nonlinear network. Gradient descent
    moves it by O(learning rate²) a step.

    Args:
        x: factors ``(*batch, m, r)`` and ``(*batch, n, r)``.

    Returns:
        The symmetric matrices D, zero for balanced factors.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.full((2, 1), 2.0), jnp.ones((3, 1)))
        >>> lrjax.metrics.imbalance(x).tolist()
        [[5.0]]

    Reference:
        S. Arora, N. Cohen, E. Hazan, "On the optimization of deep networks: implicit
        acceleration by overparameterization" (2018), arXiv 1802.06509; S. Du, W. Hu,
        J. Lee, "Algorithmic regularization in learning deep homogeneous models: layers
        are automatically balanced" (2018), arXiv 1806.00900.
    """
    return cross(x.left, x.left) - cross(x.right, x.right)


def relative_imbalance(x: LowRank, *, ratio: ArrayLike = 1.0) -> Float[Array, "*batch"]:
    """How far the Gram matrices of two factors are from a ratio, between zero and one.

    ``‖rightᵀright − ρ leftᵀleft‖_F / (‖rightᵀright‖_F + ρ ‖leftᵀleft‖_F)``: zero for
    balanced factors, one if one of them is zero, whatever the size of both. Of a LoRA pair,
    ``left = B (m, r)`` and ``rightᵀ = A``, activations keep their variance through widths
    where it is small at ``ρ = r/m``.

    Args:
        x: factors ``(*batch, m, r)`` and ``(*batch, n, r)``.
        ratio: ρ, positive.

    Returns:
        ``(*batch,)``; zero where both factors are.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.full((2, 1), 2.0), jnp.ones((3, 1)))
        >>> print(lrjax.metrics.relative_imbalance(x).round(3))  # |3 − 8| / (3 + 8)
        0.455

    Reference:
        Z. Zhu, Y. Wu, Q. Gu, V. Cevher, "Imbalance-regularized LoRA: a plug-and-play method
        for improving fine-tuning of foundation models" (2024), NeurIPS workshop.
    """
    right, left = gram(x.right), ratio * gram(x.left)
    size = lambda matrix: jnp.linalg.norm(matrix, axis=(-2, -1))
    return size(right - left) / nonzero(size(right) + size(left))


def balance_drift(x: LowRank, start: LowRank) -> Float[Array, "*batch"]:
    """How far the imbalance has moved since the start: ``‖D − D₀‖_F``.

    For an integrator of a gradient flow it is an error gauge that needs no exact
    solution; for gradient descent it measures how far from the flow it is.

    Args:
        x: the factors now; may have more batch axes (the times of a trajectory).
        start: the factors at the start.

    Returns:
        ``(*batch,)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.ones((2, 1)), jnp.ones((3, 1)))
        >>> y = lrjax.LowRank(2 * jnp.ones((2, 1)), jnp.ones((3, 1)))
        >>> float(lrjax.metrics.balance_drift(y, x))
        6.0
    """
    now, before = imbalance(x), imbalance(start)
    before = before.reshape((1,) * (now.ndim - before.ndim) + before.shape)
    return jnp.linalg.norm(now - before, axis=(-2, -1))

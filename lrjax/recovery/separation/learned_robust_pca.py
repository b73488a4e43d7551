import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from ...linalg import soft_threshold
from ...lowrank import LowRank
from .alternation import (
    Observer,
    Rule,
    Separation,
    alternate,
    check_rank,
    leading_factors,
    observed,
)
from .scaled_descent import scaled_step


class DescentLayers(eqx.Module):
    """The numbers of :func:`learned_robust_pca`: one threshold and one rate a layer.

    A pytree of arrays, made to be trained: take logarithms first, the thresholds span
    several decades and must stay positive.

    Attributes:
        first: the threshold before the start, in the units of the matrix.
        thresholds: ``(depth,)``, in the units of the matrix.
        rates: ``(depth,)``, the step sizes.
    """

    first: Float[Array, ""]
    thresholds: Float[Array, " depth"]
    rates: Float[Array, " depth"]

    def transfer(
        self,
        *,
        size: tuple[ArrayLike, ArrayLike],
        rank: tuple[ArrayLike, ArrayLike] = (1, 1),
    ) -> "DescentLayers":
        """The layers for matrices of another size and rank: thresholds ∝ rank / size.

        It holds for matrices whose factors have columns of a length that does not
        change with the size: their entries fall as the size grows.

        Args:
            size: the side of the matrices, trained on and to come.
            rank: their rank, trained on and to come.

        Returns:
            Layers with the same rates.
        """
        factor = (size[0] / size[1]) * (rank[1] / rank[0])
        return DescentLayers(self.first * factor, self.thresholds * factor, self.rates)


def geometric_layers(
    depth: int, *, first: ArrayLike, decay: ArrayLike = 0.5, rate: ArrayLike = 0.5
) -> DescentLayers:
    """Layers to train from: thresholds that fall geometrically, equal rates.

    Args:
        depth: the number of layers.
        first: the threshold of the first layer and before the start; about the size of
            the largest entries of the low-rank part.
        decay: the ratio of one threshold to the one before.
        rate: the step size.

    Returns:
        The layers.

    Example:
        >>> from lrjax import recovery
        >>> print(recovery.geometric_layers(3, first=4.0).thresholds)
        [4. 2. 1.]
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}.")
    first = jnp.asarray(first, jnp.result_type(first, jnp.float32))
    powers = jnp.asarray(decay, first.dtype) ** jnp.arange(depth, dtype=first.dtype)
    return DescentLayers(first, first * powers, jnp.full_like(powers, rate))


def learned_robust_pca(
    matrix: Real[Array, "..."],
    layers: DescentLayers,
    rank: int,
    *,
    mask: Bool[Array, "..."] | None = None,
    observe: Observer | None = None,
) -> Separation:
    """Robust PCA by an unrolled scaled descent whose thresholds and rates are trained.

    Layer t, with ``X = left @ right.T``::

        S ← soft threshold of (matrix − X) at ζ_t,   E = matrix − X − S
        left ← left + η_t E right (rightᵀright)⁻¹,   right likewise with Eᵀ

    from the leading singular vectors of the matrix less its soft threshold at ``first``.
    One ``lax.scan`` over the layers, differentiable from end to end in the layers and in
    the matrix. On data like those of the training it needs a fraction of the steps of
    :func:`scaled_descent`, and is not told the fraction of outliers.

    Args:
        matrix: real ``(m, n)``; entries that are not finite count as missing.
        layers: thresholds and rates.
        rank: of the low-rank part.
        mask: true where an entry is observed.
        observe: called with a :class:`SolveState` before every layer; its loss is the
            relative residual.

    Returns:
        A :class:`Separation`, its ``state`` the number of layers.

    Raises:
        ValueError: for a matrix without entries or axes, a mask of another shape, or a
            rank out of range.

    Example:
        Train the logarithms by Adam, here on a single matrix:

        >>> import jax, optax
        >>> from lrjax import recovery
        >>> problem = recovery.robust_pca(jax.random.key(0), (40, 40), 2, 0.1)
        >>> def loss(logs):
        ...     layers = jax.tree.map(jax.numpy.exp, logs)
        ...     fit = recovery.learned_robust_pca(problem.targets, layers, 2)
        ...     return problem.relative_error(fit.low_rank)
        >>> logs = jax.tree.map(jax.numpy.log, recovery.geometric_layers(5, first=1.0))
        >>> tx, value_and_grad = optax.adam(0.1), jax.jit(jax.value_and_grad(loss))
        >>> state, losses = tx.init(logs), []
        >>> for _ in range(20):
        ...     value, grads = value_and_grad(logs)
        ...     updates, state = tx.update(grads, state)
        ...     logs = optax.apply_updates(logs, updates)
        ...     losses.append(value)
        >>> bool(losses[-1] < 0.5 * losses[0])
        True

    Reference:
        H. Cai, J. Liu, W. Yin, "Learned robust PCA: a scalable deep unfolding approach
        for high-dimensional outlier detection" (2021), arXiv 2110.05649.
    """
    data = observed("learned_robust_pca", matrix, mask)
    check_rank("learned_robust_pca", rank, data.matrix.shape)
    dtype = data.matrix.dtype
    depth = layers.thresholds.shape[0]
    rates = layers.rates.astype(dtype) / data.share()

    def sparse(rest: Array, layer: Array) -> Array:
        # After the last layer its own threshold serves once more.
        return soft_threshold(rest, layers.thresholds[jnp.minimum(layer, depth - 1)])

    def low_rank(x: LowRank, error: Array, layer: Array):
        return scaled_step(x, error, rates[layer]), layer + 1

    trimmed = data.matrix - soft_threshold(data.matrix, layers.first)
    start = leading_factors(trimmed / data.share(), rank)
    layer = jnp.zeros((), jnp.int32)
    return alternate(
        data, start, layer, Rule(sparse, low_rank), max_steps=depth, observe=observe
    )

"""Where a flow starts; a pair ``W + B A`` has ``left = B``, ``right = Aᵀ``."""

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from .._sharding import einsum
from ..linalg import orthonormalize, truncated_svd
from ..lowrank import LowRank


def standard_start(key: PRNGKeyArray, shape: tuple[int, int], rank: int) -> LowRank:
    """LoRA's own start: ``left = 0``, ``right`` uniform in ``±1/sqrt(n)``.

    Args:
        key: for ``right``.
        shape: ``(m, n)``, outputs by inputs.
        rank: the width.

    Returns:
        Factors with product zero.

    Example:
        >>> import jax, lrjax
        >>> x = lrjax.flows.standard_start(jax.random.key(0), (3, 4), 2)
        >>> bool((abs(x.right) <= 0.5).all()), float(abs(x.left).max())
        (True, 0.0)

    Reference:
        E. Hu et al., "LoRA" (2021), arXiv 2106.09685; the scale is that of PEFT.
    """
    m, n = shape
    edge = n**-0.5
    right = jr.uniform(key, (n, rank), minval=-edge, maxval=edge)
    return LowRank(jnp.zeros((m, rank), right.dtype), right)


def small_start(
    key: PRNGKeyArray, shape: tuple[int, int], rank: int, alpha: ArrayLike
) -> LowRank:
    """Both factors normal, with standard deviation α: next to the saddle at zero.

    Args:
        key: for both factors.
        shape: ``(m, n)``.
        rank: the width.
        alpha: the size of the numbers.

    Returns:
        The factors.

    Example:
        >>> import jax, lrjax
        >>> x = lrjax.flows.small_start(jax.random.key(0), (3, 4), 2, 1e-3)
        >>> bool(abs(x.left).max() < 0.01)
        True
    """
    alpha = jnp.asarray(alpha)
    kl, kr = jr.split(key)
    left, right = jr.normal(kl, (shape[0], rank)), jr.normal(kr, (shape[1], rank))
    return LowRank(alpha * left, alpha * right)


def orthogonal_start(
    key: PRNGKeyArray, shape: tuple[int, int], rank: int, alpha: ArrayLike = 0.1
) -> LowRank:
    """Both factors random and not zero, yet their product is zero.

    The columns of an orthogonal matrix are dealt out to the two sides alternately.

    Args:
        key: for the factors.
        shape: ``(m, n)``.
        rank: the width, even.
        alpha: the size of the numbers.

    Returns:
        The factors.

    Raises:
        ValueError: if the rank is odd.

    Example:
        >>> import jax, lrjax
        >>> x = lrjax.flows.orthogonal_start(jax.random.key(0), (3, 4), 2)
        >>> bool(abs(x.materialize()).max() < 1e-8)
        True

    Reference:
        The "orthogonal" initialization of PEFT.
    """
    if rank % 2:
        raise ValueError(f"orthogonal_start needs an even rank, got {rank}.")
    alpha = jnp.asarray(alpha)
    kq, kl, kr = jr.split(key, 3)
    q = orthonormalize(jr.normal(kq, (rank, rank)))
    left = jr.normal(kl, (shape[0], rank // 2)) @ q[0::2]
    right = jr.normal(kr, (shape[1], rank // 2)) @ q[1::2]
    return LowRank(alpha * left, alpha * right)


def spectral_start(
    matrix: Float[Array, "m n"],
    rank: int,
    *,
    alpha: ArrayLike = 1.0,
    power: float = 0.5,
) -> LowRank:
    """Along the leading singular vectors of a matrix: ``αU Σ^power`` and ``αV Σ^power``.

    Of the residual, with the defaults: the best approximation of this rank, balanced. Of
    the negative gradient with respect to the product, with a small α and ``power=0``:
    the directions into which a small random start would turn by itself.

    Args:
        matrix: the residual, or minus the gradient.
        rank: the width.
        alpha: the scale of both factors.
        power: the power of the singular values in each factor.

    Returns:
        Balanced factors.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.flows.spectral_start(jnp.diag(jnp.array([4.0, 1.0])), 1)
        >>> print(x.materialize().round(4))
        [[4. 0.]
         [0. 0.]]
    """
    found = truncated_svd(matrix, rank)
    size = alpha * found.values[None, :] ** power
    return LowRank(found.left * size, found.right * size)


def balanced_start(
    key: PRNGKeyArray, shape: tuple[int, int], values: Float[Array, " r"]
) -> LowRank:
    """Balanced factors with given singular values and random singular vectors.

    ``left = U Σ^½ Q``, ``right = V Σ^½ Q`` with an orthogonal Q, so that
    ``leftᵀleft = rightᵀright`` is not diagonal either.

    Args:
        key: for the vectors and the rotation.
        shape: ``(m, n)``.
        values: the singular values of the product; their number is the width.

    Returns:
        The factors.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> x = lrjax.flows.balanced_start(jax.random.key(0), (5, 4), jnp.array([2.0, 1.0]))
        >>> print(lrjax.metrics.singular_values(x).round(3))
        [2. 1.]
    """
    ku, kv, kq = jr.split(key, 3)
    r = len(values)
    u, v, q = (
        orthonormalize(jr.normal(k, (size, r), values.dtype))
        for k, size in ((ku, shape[0]), (kv, shape[1]), (kq, r))
    )
    root = jnp.sqrt(values)
    sides = (einsum("mi,i,ij->mj", basis, root, q) for basis in (u, v))
    return LowRank(*sides)

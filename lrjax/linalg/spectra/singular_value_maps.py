"""Matrices with other singular values and the same singular vectors."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ..._sharding import placed_like
from .._numerics import rounding, times, working_dtype
from ..decompositions import svd


def map_singular_values(
    f: Callable[[Float[Array, "*b k"]], Float[Array, "*b k"]], x: Float[Array, "*b m n"]
) -> Float[Array, "*b m n"]:
    """The spectral function ``U diag(f(σ)) Vᵀ`` of ``x = U diag(σ) Vᵀ``.

    With :func:`soft_threshold` for ``f`` it is the proximal map of the nuclear norm, with
    :func:`hard_threshold` that of the rank, with ``σ > 0`` the polar factor.

    Args:
        f: from the singular values ``(*b, k)``, falling, ``k = min(m, n)``, to others.
        x: matrices ``(*b, m, n)``.

    Returns:
        ``(*b, m, n)`` in the dtype of ``x``, computed in float32 or wider. Not
        differentiated through.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.array([[0.0, 3.0], [1.0, 0.0]])
        >>> shrunk = lambda values: lrjax.linalg.soft_threshold(values, 2.0)
        >>> print(lrjax.linalg.map_singular_values(shrunk, x).round(4) + 0.0)
        [[0. 1.]
         [0. 0.]]
    """
    u, values, vt = svd(lax.stop_gradient(x).astype(working_dtype(x.dtype)))
    new = f(values).astype(values.dtype)
    return placed_like(times(u * new[..., None, :], vt).astype(x.dtype), x)


def energy_mask(
    values: Float[Array, "*b k"], energy: ArrayLike = 1.0
) -> Bool[Array, "*b k"]:
    """Which singular values hold a share of the energy ``Σσ²``: the fewest leading ones.

    Args:
        values: singular values, falling.
        energy: the share, in (0, 1]. At 1 all are in that are above rounding.

    Returns:
        ``(*b, k)``; none for the zero matrix.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.linalg.energy_mask(jnp.array([3.0, 1.0, 0.1]), 0.95))
        [ True  True False]
    """
    values = lax.stop_gradient(values)
    largest = values[..., :1]
    squares = (values / jnp.where(largest > 0, largest, 1)) ** 2
    # What is left from the k-th on, summed from the small end: no small share is lost.
    rest = jnp.flip(jnp.cumsum(jnp.flip(squares, -1), axis=-1), -1)
    allowed = (1 - jnp.asarray(energy, values.dtype)) * rest[..., :1]
    return (rest > allowed) & (values > rounding(values.dtype, values.shape[-1]) * largest)


def penalized_rank(
    values: Float[Array, "*b k"], shape: tuple[int, ...], rank_weight: ArrayLike
) -> Int[Array, "*b"]:
    """The rank at which parameters and error together cost the least.

    ``argmin_r rank_weight · r (m + n) + ½ Σ_{i>r} σ_i²``, the smallest of equal ones.

    Args:
        values: all singular values, falling.
        shape: ``(*b, m, n)`` of the matrix.
        rank_weight: what a parameter of the factors costs.

    Returns:
        ``(*b,)``, from 0 to ``k``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> values = jnp.array([3.0, 2.0, 1.0])
        >>> print(lrjax.linalg.penalized_rank(values, (3, 4), 0.1))  # keeps σ² > 1.4
        2

    Reference:
        Y. Idelbayev, M. Á. Carreira-Perpiñán, "Low-rank compression of neural nets:
        learning the rank of each layer" (2020), CVPR.
    """
    m, n = shape[-2:]
    # A further rank costs the same each time and takes away less each time.
    price = jnp.asarray(rank_weight, values.dtype) * (m + n)
    return jnp.sum(values**2 / 2 > price, axis=-1, dtype=jnp.int32)

"""Random projections of any size without a matrix, by Hadamard transforms."""

from typing import NamedTuple

import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..._arguments import check_key
from .._numerics import working_dtype


# Bits that one product with a Hadamard matrix takes: 128 × 128, the size of a matrix unit.
_BITS = 7


def walsh_hadamard(x: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """The Walsh-Hadamard transform ``H x``, ``H = [[1, 1], [1, −1]] ⊗ …``, not normalized.

    ``H H = n I``. In O(n log n): one product with a small Hadamard matrix for every seven
    factors of two.

    Args:
        x: ``(*b, n)``, ``n`` a power of two.

    Returns:
        ``(*b, n)``.

    Raises:
        ValueError: for another length.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.linalg.walsh_hadamard(jnp.array([1.0, 0.0, 0.0, 2.0])))
        [ 3. -1. -1.  3.]
    """
    n = x.shape[-1]
    bits = n.bit_length() - 1
    if n != 1 << bits:
        raise ValueError(f"walsh_hadamard needs a power of two of numbers, got {n}.")
    batch = x.shape[:-1]
    while bits > 0:
        some = min(bits, _BITS)
        # The last axis is transformed and goes to the front: at the end all are in turn.
        x = x.reshape(*batch, n >> some, 1 << some)
        x = jnp.matmul(
            _hadamard(some, x.dtype), x.mT, precision=lax.Precision.HIGHEST
        ).reshape(*batch, n)
        bits -= some
    return x


def _hadamard(bits: int, dtype) -> Array:
    """``H`` of ``2^bits``, from the parity of the bits that row and column share."""
    index = jnp.arange(1 << bits, dtype=jnp.int32)
    shared = lax.population_count(index[:, None] & index[None, :])
    return (1 - 2 * (shared % 2)).astype(dtype)


class Fastfood(NamedTuple):
    """The random numbers of a :func:`fastfood` map, drawn once and kept.

    Attributes:
        signs: B, ``(n,)``.
        order: Π, ``(n,)``.
        scales: G, ``(n,)``.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> key, x = jax.random.key(0), jnp.array([3.0, 4.0])
        >>> drawn = lrjax.linalg.Fastfood.draw(5000, key=key)
        >>> print(jnp.abs(drawn(x, 5000) - lrjax.linalg.fastfood(x, 5000, key=key)).max())
        0.0
    """

    signs: Float[Array, " n"]
    order: Int[Array, " n"]
    scales: Float[Array, " n"]

    @classmethod
    def draw(cls, size: int, *, key: PRNGKeyArray, dtype: DTypeLike = float) -> "Fastfood":
        """The numbers of a map from and into at most ``size`` dimensions."""
        n = 1 << (size - 1).bit_length()
        k_sign, k_order, k_scale = jr.split(key, 3)
        signs, scales = jr.rademacher(k_sign, (n,), dtype), jr.normal(k_scale, (n,), dtype)
        return cls(signs, jr.permutation(k_order, n), scales)

    def __call__(self, x: Float[Array, "*b d"], size: int) -> Float[Array, "*b size"]:
        """``P x``, in the dtype of the numbers."""
        signs, order, scales = self
        lead = (None,) * (x.ndim - 1)
        widths = [(0, 0)] * (x.ndim - 1) + [(0, len(signs) - x.shape[-1])]
        y = walsh_hadamard(jnp.pad(x.astype(signs.dtype), widths) * signs[lead])
        # The gradient puts back what is taken: no place is taken twice.
        y = y.at[..., order].get(unique_indices=True, mode="promise_in_bounds")
        y = walsh_hadamard(y * scales[lead])
        return y[..., :size] / jnp.sqrt(size * jnp.sum(scales**2))


def fastfood(
    x: Float[Array, "*b d"], size: int, *, key: PRNGKeyArray
) -> Float[Array, "*b size"]:
    """A random linear map into ``size`` dimensions, ``P x``, without its matrix.

    ``P x = H G Π H B pad(x)``, cut to ``size`` numbers and over ``√(size Σ g²)``: signs B,
    a shuffle Π, Gaussian numbers G, and Hadamard transforms H of the next power of two.
    The columns of P have norms near one and are nearly orthogonal. O(n log n) time and no
    memory: all of it comes from the key, the same for every ``x``.

    With ``θ = θ_0 + P z`` a model of ``size`` numbers is trained in ``d`` of them:
    :func:`lrjax.random_subspace`.

    Args:
        x: ``(*b, d)``.
        size: the number of dimensions to map to.
        key: which map.

    Returns:
        ``(*b, size)`` in the dtype of ``x``, computed in float32 or wider.

    Raises:
        TypeError: if ``key`` is none.
        ValueError: for a ``size`` below 1.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> y = lrjax.linalg.fastfood(jnp.array([3.0, 4.0]), 5000, key=jax.random.key(0))
        >>> print(y.shape, jnp.linalg.norm(y).round(0))
        (5000,) 5.0

    Reference:
        Q. Le, T. Sarlós, A. Smola, "Fastfood: approximating kernel expansions in loglinear
        time" (2013), ICML; for training in subspaces: C. Li, H. Farkhoor, R. Liu,
        J. Yosinski, "Measuring the intrinsic dimension of objective landscapes" (2018),
        arXiv 1804.08838.
    """
    check_key("fastfood", key)
    if size < 1:
        raise ValueError(f"fastfood needs a size of at least 1, got {size}.")
    drawn = Fastfood.draw(max(size, x.shape[-1]), key=key, dtype=working_dtype(x.dtype))
    return drawn(x, size).astype(x.dtype)

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._numerics import cross, working_dtype
from ..orthonormalize import orthonormalize


def subspace_overlap(
    x: Float[Array, "*b n r"], y: Float[Array, "*b k s"]
) -> Float[Array, "*b"]:
    """The share of the smaller of two subspaces that lies in the larger one.

    ``‖QₓᵀQ_y‖²_F / min(r, s)`` with orthonormal bases, the mean of ``cos²`` of the
    principal angles: one if the one holds the other, zero if they are orthogonal. Two
    random subspaces have ``max(r, s) / n`` on average.

    Args:
        x: ``(*b, n, r)``; columns need not be orthonormal.
        y: ``(*b, n, s)``.

    Returns:
        ``(*b,)`` numbers in [0, 1].

    Raises:
        ValueError: if the two have different ambient dimensions.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x, y = jnp.eye(3)[:, :2], jnp.array([[1.0], [0.0], [1.0]])
        >>> print(lrjax.linalg.subspace_overlap(x, y).round(4))
        0.5

    Reference:
        G. Gur-Ari, D. Roberts, E. Dyer, "Gradient descent happens in a tiny subspace"
        (2018), arXiv 1812.04754.
    """
    if x.shape[-2] != y.shape[-2]:
        raise ValueError(
            "subspace_overlap needs two subspaces of one space: got columns of length "
            f"{x.shape[-2]} and {y.shape[-2]} (shapes {x.shape} and {y.shape})."
        )
    dtype = working_dtype(jnp.promote_types(x.dtype, y.dtype))
    overlap = cross(orthonormalize(x.astype(dtype)), orthonormalize(y.astype(dtype)))
    share = jnp.sum(overlap**2, axis=(-2, -1)) / min(overlap.shape[-2:])
    return jnp.minimum(share, 1)

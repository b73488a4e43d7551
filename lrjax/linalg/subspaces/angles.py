import jax.numpy as jnp
from jaxtyping import Array, Float

from .._numerics import cross, times, working_dtype
from ..decompositions import singular_values
from ..orthonormalize import orthonormalize


def principal_angles(
    x: Float[Array, "*b n r"], y: Float[Array, "*b k s"]
) -> Float[Array, "*b d"]:
    """The principal angles between the column spaces of two matrices, in radians.

    With orthonormal bases ``Q_x``, ``Q_y``: cosines are the singular values of
    ``Q_xᵀQ_y`` and sines those of ``Q_y − Q_x Q_xᵀ Q_y``. Cosines cannot resolve an
    angle below ``sqrt(eps)``, sines none near π/2, so each angle is taken from the
    accurate one.

    Args:
        x: ``(*b, n, r)``.
        y: ``(*b, n, s)``.

    Returns:
        ``(*b, min(r, s))`` angles in ``[0, π/2]``, ascending.

    Raises:
        ValueError: if the two have different ambient dimensions.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x, y = jnp.array([[1.0], [0.0]]), jnp.array([[1.0], [1.0]])
        >>> print(lrjax.linalg.principal_angles(x, y).round(4))
        [0.7854]

    Reference:
        Å. Björck, G. H. Golub, "Numerical methods for computing angles between linear
        subspaces" (1973), Mathematics of Computation.
    """
    if x.shape[-2] != y.shape[-2]:
        raise ValueError(
            "principal_angles needs two subspaces of one space: got columns of length "
            f"{x.shape[-2]} and {y.shape[-2]} (shapes {x.shape} and {y.shape})."
        )
    if x.shape[-1] < y.shape[-1]:
        x, y = y, x
    dtype = working_dtype(jnp.promote_types(x.dtype, y.dtype))
    qx, qy = orthonormalize(x.astype(dtype)), orthonormalize(y.astype(dtype))
    overlap = cross(qx, qy)
    cosines = singular_values(overlap)
    rest = qy - times(qx, overlap)
    sines = singular_values(rest)[..., ::-1]
    cosines, sines = jnp.clip(cosines, 0, 1), jnp.clip(sines, 0, 1)
    return jnp.where(sines < cosines, jnp.arcsin(sines), jnp.arccos(cosines))

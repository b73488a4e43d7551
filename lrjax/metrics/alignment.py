import jax.numpy as jnp
from jaxtyping import Array, Float

from ..linalg import principal_angles


def misalignment(
    x: Float[Array, "*batch n r"], y: Float[Array, "*batch n s"]
) -> Float[Array, "*batch"]:
    """How far two column spaces are from each other: ``1 − cos`` of their largest angle.

    Computed as ``2 sin²(θ/2)``, so that it is right down to 1e-30 and does not stop at
    the rounding error of a cosine. Where the widths differ it is the largest of the
    ``min(r, s)`` principal angles: zero if one space holds the other.

    Args:
        x: ``(*batch, n, r)`` of full column rank.
        y: ``(*batch, n, s)`` of full column rank.

    Returns:
        ``(*batch,)`` in ``[0, 1]``.

    Raises:
        ValueError: if the two have different ambient dimensions.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x, y = jnp.array([[1.0], [0.0]]), jnp.array([[1.0], [1e-8]])
        >>> print(lrjax.metrics.misalignment(x, y) < 1e-15)
        True
    """
    angles = principal_angles(x, y)
    return 2 * jnp.sin(angles[..., -1] / 2) ** 2

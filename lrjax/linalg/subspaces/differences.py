from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._numerics import cross, nonzero, rounding, times, working_dtype
from ..decompositions import procrustes, svd
from ..orthonormalize import orthonormalize


class SubspaceDifference(NamedTuple):
    """Two subspaces of one dimension: what lies between them, and what tells them apart.

    With the principal vectors ``u_i``, ``v_i`` at the angles ``θ_i``, the sum of both
    projectors has the eigenvalues ``1 + cos θ_i`` at ``u_i + v_i`` and ``1 − cos θ_i`` at
    ``v_i − u_i``.

    Attributes:
        middle: orthonormal columns ``(u_i + v_i) / ‖·‖``: the subspace in the middle of the
            geodesic, the mean of both.
        directions: orthonormal columns ``(v_i − u_i) / ‖·‖`` of the difference subspace;
            zeros where the angle is zero to rounding.
        angles: ``θ_i`` in radians, falling.
    """

    middle: Float[Array, "*b n k"]
    directions: Float[Array, "*b n k"]
    angles: Float[Array, "*b k"]

    @property
    def magnitude(self) -> Float[Array, "*b"]:
        """``Σ_i ‖v_i − u_i‖² = 2 Σ_i (1 − cos θ_i)``, for small angles ``Σ_i θ_i²``."""
        return jnp.sum(4 * jnp.sin(self.angles / 2) ** 2, axis=-1)


def subspace_difference(
    x: Float[Array, "*b n k"], y: Float[Array, "*b m r"]
) -> SubspaceDifference:
    """The directions by which one subspace differs from another: the velocity of a path.

    Of orthonormal bases, the one is turned to lie nearest the other, ``XᵀY`` symmetric and
    positive. Then sum and difference are orthogonal to each other, and have the singular
    values ``2 cos(θ_i/2)`` and ``2 sin(θ_i/2)``: no angle between 0 and π/2 is lost to
    rounding in them.

    Args:
        x: a basis of the first; columns need not be orthonormal.
        y: of the second, as many columns.

    Returns:
        A :class:`SubspaceDifference`; ``magnitude`` is its length, squared.

    Raises:
        ValueError: for bases of two shapes.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x, y = jnp.array([[1.0], [0.0]]), jnp.array([[1.0], [1.0]])
        >>> found = lrjax.linalg.subspace_difference(x, y)
        >>> print(found.angles.round(4), abs(found.directions.T).round(4))
        [0.7854] [[0.3827 0.9239]]

    Reference:
        K. Fukui, P. H. V. Valois, L. Souza, T. Kobayashi, "Second-order difference
        subspace" (2024), arXiv 2409.08563.
    """
    if x.shape != y.shape:
        raise ValueError(
            "subspace_difference needs bases of one shape (…, n, k), of subspaces of one "
            f"dimension; got {x.shape} and {y.shape}."
        )
    dtype = working_dtype(jnp.promote_types(x.dtype, y.dtype))
    x, y = orthonormalize(x.astype(dtype)), orthonormalize(y.astype(dtype))
    x = times(x, procrustes(cross(x, y)))
    directions, lengths, vt = svd(y - x)
    middle = times(x + y, vt.mT)
    there = lengths > rounding(dtype, x.shape[-2])
    return SubspaceDifference(
        middle=middle / nonzero(jnp.sqrt(jnp.sum(middle**2, axis=-2, keepdims=True))),
        directions=jnp.where(there[..., None, :], directions, 0),
        angles=2 * jnp.arcsin(jnp.minimum(lengths / 2, 0.5**0.5)),
    )


def subspace_acceleration(
    x: Float[Array, "*b n k"], y: Float[Array, "*b n k"], z: Float[Array, "*b n k"]
) -> SubspaceDifference:
    """The second difference of three subspaces in a row: by how much a path is bent.

    ``y`` beside the middle of ``x`` and ``z``, as ``y − (x + z)/2`` of vectors: it is
    nothing for three equally spaced points of a geodesic.

    Args:
        x: a basis of the first; columns need not be orthonormal.
        y: of the second, as many columns.
        z: of the third.

    Returns:
        The :class:`SubspaceDifference` from that middle to ``y``.

    Raises:
        ValueError: for bases of several shapes.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> line = lambda angle: jnp.array([[jnp.cos(angle)], [jnp.sin(angle)]])
        >>> found = lrjax.linalg.subspace_acceleration(line(0.1), line(0.2), line(0.5))
        >>> print(found.angles.round(4))
        [0.1]

    Reference:
        K. Fukui, P. H. V. Valois, L. Souza, T. Kobayashi, "Second-order difference
        subspace" (2024), arXiv 2409.08563.
    """
    return subspace_difference(subspace_difference(x, z).middle, y)

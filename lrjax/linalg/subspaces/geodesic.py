import jax.numpy as jnp
from jaxtyping import Array, Float

from .._numerics import cross, outer, times, working_dtype
from ..decompositions import eigh


def geodesic(
    basis: Float[Array, "*b n k"], direction: Float[Array, "*b n k"]
) -> Float[Array, "*b n k"]:
    """The end of a geodesic of the Grassmann manifold: a subspace turned into others.

    With the part ``Δ = (I − S Sᵀ) D`` of the direction that leaves the subspace, and its
    singular value decomposition ``Δ = U Σ Vᵀ``::

        S' = (S V cos Σ + U sin Σ) Vᵀ

    so that the principal angles between ``S`` and ``S'`` are ``Σ``, in radians. In the
    functions ``cos √H`` and ``sin √H / √H`` of ``H = ΔᵀΔ (k, k)``, both of them smooth,
    this has no division: also where ``Δ`` has dependent columns, or is zero. For ``S Q``
    and ``D Q`` with an orthogonal ``Q`` it is ``S' Q``.

    Args:
        basis: orthonormal columns ``S``.
        direction: ``D``.

    Returns:
        Orthonormal columns ``S'``, in float32 or wider.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> s = jnp.array([[1.0], [0.0]])
        >>> print(lrjax.linalg.geodesic(s, jnp.array([[9.0], [jnp.pi / 6]])).T.round(4))
        [[0.866 0.5  ]]

    Reference:
        A. Edelman, T. A. Arias, S. T. Smith, "The geometry of algorithms with
        orthogonality constraints" (1998), arXiv physics/9806030.
    """
    dtype = working_dtype(jnp.result_type(basis, direction))
    basis, direction = basis.astype(dtype), direction.astype(dtype)
    delta = direction - times(basis, cross(basis, direction))
    # Once more: what is left of a long direction is orthogonal to rounding errors of its
    # own length.
    delta = delta - times(basis, cross(basis, delta))
    squares, v = eigh(cross(delta, delta))
    angles = jnp.sqrt(jnp.maximum(squares, 0))[..., None, :]
    of = lambda values: outer(v * values, v)
    return times(basis, of(jnp.cos(angles))) + times(delta, of(jnp.sinc(angles / jnp.pi)))

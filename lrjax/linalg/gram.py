import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from ._numerics import cross, identity_like, times, together, working_dtype


def cholesky(g: Float[Array, "*b r r"]) -> Float[Array, "*b r r"]:
    """The Cholesky factor in the lower triangle; what is above it is undefined.

    In float32 or wider.

    ``lax.linalg.cholesky`` also clears the upper triangle, which triangular solves never
    read: that costs a third of the time to compile, and fails on stacks that an
    Explicit mesh shards by layer.
    """
    return lax.linalg.cholesky_p.bind(g.astype(working_dtype(g.dtype)))


def gram(x: Float[Array, "*b n r"]) -> Float[Array, "*b r r"]:
    """The Gram matrix ``xᵀ x`` of the columns of ``x``.

    Args:
        x: tall matrices ``(*b, n, r)``; ``n`` may be sharded.

    Returns:
        ``(*b, r, r)``, in float32 or wider, replicated over the mesh axes of ``n``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> lrjax.linalg.gram(jnp.ones((3, 2))).tolist()
        [[3.0, 3.0], [3.0, 3.0]]
    """
    x = x.astype(working_dtype(x.dtype))
    return cross(x, x)


def _damped_factor(
    g: Float[Array, "*b r r"], damping: ArrayLike, relative: bool
) -> Float[Array, "*b r r"]:
    """``C`` of ``C Cᵀ = xᵀx + λI``, λ never below the rounding error of ``g = xᵀx``.

    In the lower triangle; what is above it is undefined.
    """
    identity = identity_like(g)
    trace = jnp.sum(g * identity, axis=(-2, -1))  # compiles faster than jnp.trace
    damping = jnp.asarray(damping, g.dtype)
    if relative:
        damping = damping * trace / g.shape[-1]
    # Rounding perturbs the eigenvalues of g by a few eps·trace; with less than that on
    # the diagonal a rank-deficient g has no Cholesky factor.
    damping = jnp.maximum(damping, 8 * jnp.finfo(g.dtype).eps * trace)
    # A zero factor has the pseudo-inverse zero: an infinite damping, short of overflow.
    damping = jnp.where(trace + damping > 0, damping, jnp.finfo(g.dtype).max)
    return cholesky(g + damping[..., None, None] * identity)


def _inverse_factor(
    g: Float[Array, "*b r r"], damping: ArrayLike, relative: bool
) -> Float[Array, "*b r r"]:
    """``C⁻¹``."""
    return _inverse_triangle(_damped_factor(g, damping, relative))


def _inverse_triangle(lower: Array) -> Array:
    identity = identity_like(lower)
    return lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)


def inverse_gram(
    x: Float[Array, "*b n r"], damping: ArrayLike = 0.0, *, relative: bool = True
) -> Float[Array, "*b r r"]:
    """The damped inverse ``(xᵀx + λI)⁻¹``, finite for every finite ``x``.

    ``λ = damping · tr(xᵀx)/r`` if ``relative`` (a dimensionless number: the result
    scales as ``x⁻²``), else ``λ = damping`` (in units of ``x²``). λ is never smaller
    than the rounding error of the Gram matrix, so that ``damping=0`` is safe for
    repeated columns; for ``x = 0`` and ``damping=0`` the result is the pseudo-inverse,
    zero. The inverse is a replicated ``r × r`` matrix: apply it with a matmul, which
    keeps the sharding of the tall factor it multiplies.

    Args:
        x: tall matrices ``(*b, n, r)``.
        damping: λ, or its ratio to the mean squared column norm. Non-negative.
        relative: if True, ``damping`` multiplies ``tr(xᵀx)/r``; if False it is λ itself.

    Returns:
        ``(*b, r, r)`` symmetric positive semi-definite, in float32 or wider.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> lrjax.linalg.inverse_gram(x).round(4).tolist()
        [[1.0, 0.0], [0.0, 0.25]]
    """
    return _inverse(gram(x), damping, relative)


def inverse_grams(
    *xs: Float[Array, "..."], damping: ArrayLike = 0.0, relative: bool = True
) -> list[Float[Array, "..."]]:
    """:func:`inverse_gram` of several factors, whose small matrices are one batch."""
    return together(lambda g: _inverse(g, damping, relative), list(map(gram, xs)))


def _inverse(g: Array, damping: ArrayLike, relative: bool) -> Array:
    half = _inverse_factor(g, damping, relative)
    return cross(half, half)


def inverse_root_gram(
    x: Float[Array, "*b n r"], damping: ArrayLike = 0.0, *, relative: bool = True
) -> Float[Array, "*b r r"]:
    """A root ``K`` of the damped inverse Gram matrix: ``K Kᵀ = (xᵀx + λI)⁻¹``.

    ``K = C⁻ᵀ`` with the Cholesky factor ``xᵀx + λI = C Cᵀ``. It whitens: the columns
    of ``x K`` are orthonormal up to the damping. Arguments, the floor under λ and the
    zero case are those of :func:`inverse_gram`.

    Args:
        x: tall matrices ``(*b, n, r)``.
        damping: λ, or its ratio to the mean squared column norm. Non-negative.
        relative: as for :func:`inverse_gram`.

    Returns:
        ``(*b, r, r)`` upper triangular, in float32 or wider.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.array([[3.0], [4.0]])
        >>> print((x @ lrjax.linalg.inverse_root_gram(x)).round(4).ravel())
        [0.6 0.8]
    """
    return _inverse_factor(gram(x), damping, relative).mT


def inverse_root_grams(
    *xs: Float[Array, "..."], damping: ArrayLike = 0.0, relative: bool = True
) -> list[Float[Array, "..."]]:
    """:func:`inverse_root_gram` of several factors, whose small matrices are one batch."""
    return together(lambda g: _inverse_factor(g, damping, relative).mT, list(map(gram, xs)))


def orthonormalizers(
    *xs: Float[Array, "..."], damping: ArrayLike = 0.0, relative: bool = True
) -> list[tuple[Float[Array, "..."], Float[Array, "..."]]]:
    """For each x two factors ``K B = (xᵀx + λI)⁻¹``; the first one orthonormalizes.

    The columns of ``x K`` are orthonormal whatever λ is, up to the floor under it, which
    shortens those of a rank-deficient ``x``; so ``K`` gives coordinates in a frame of the
    span, and ``B = K⁻¹ (xᵀx + λI)⁻¹`` brings them back, damped: what ``λ = 0`` makes of it
    is ``Kᵀ``. Of ``x = 0`` both are zero to rounding.

    Args:
        *xs: tall matrices ``(*b, n, r)``.
        damping: as for :func:`inverse_gram`.
        relative: as for :func:`inverse_gram`.

    Returns:
        For each ``x`` the pair ``K``, upper triangular, and ``B``, ``(*b, r, r)``, in
        float32 or wider.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.array([[3.0], [4.0]])
        >>> ((k, b),) = lrjax.linalg.orthonormalizers(x, damping=3.0)
        >>> print((x @ k).round(4).ravel(), (k @ b).round(4))  # 1 / (25 + 3 · 25)
        [0.6 0.8] [[0.01]]
    """

    def maps(g: Array) -> Array:
        lower = _damped_factor(g, 0.0, True)
        there = jnp.any(g != 0, axis=(-2, -1), keepdims=True)
        back = times(
            jnp.where(there, jnp.tril(lower), 0).mT, _inverse(g, damping, relative)
        )
        return jnp.concatenate([_inverse_triangle(lower).mT, back], axis=-1)

    both = together(maps, list(map(gram, xs)))
    return [(x[..., : x.shape[-2]], x[..., x.shape[-2] :]) for x in both]

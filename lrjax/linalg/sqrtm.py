"""Square roots of positive definite matrices from products alone, with their gradients."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._numerics import identity_like, nonzero, times, working_dtype


Method = Literal["newton", "pade", "taylor"]

# Of √(1 − z): the [5/5] Padé approximant in partial fractions, 1 − Σ a z / (1 − b z), ...
_ANGLES = [j * math.pi / 11 for j in range(1, 6)]
PADE_WEIGHTS = tuple(2 / 11 * math.sin(angle) ** 2 for angle in _ANGLES)
PADE_POLES = tuple(math.cos(angle) ** 2 for angle in _ANGLES)
# ... and the first terms of its Taylor series after the one, as Σ t zᵏ.
TAYLOR = tuple(
    (-1) ** k * math.prod((0.5 - i) / (i + 1) for i in range(k)) for k in range(1, 11)
)


def sqrtm(
    a: Float[Array, "*b n n"], *, method: Method = "newton"
) -> Float[Array, "*b n n"]:
    """The square root of a symmetric positive definite matrix, from matrix products.

    With ``A' = A/‖A‖_F`` and ``Z = I − A'``:

    - ``"pade"``: ``√A' ≈ I − Σ_j a_j Z (I − b_j Z)⁻¹``, the [5/5] Padé approximant. Its
      error is 5e-9 for eigenvalues of ``A'`` of ½, 6e-5 for 1/6 and .06 for 1e-3.
    - ``"taylor"``: ten terms of the series, without a linear system: 7e-6, 4e-3, .15.
    - ``"newton"``: both roots by Newton-Schulz steps from the Padé approximant, ``T =
      (3I − K Y)/2``, ``Y ← Y T``, ``K ← T K``, until ``K Y`` is the identity to rounding:
      the root to about ``eps √κ`` and its inverse to ``eps κ`` of their norms, for
      condition numbers κ up to ``1/(eps √n)``. Smaller eigenvalues count as that.

    The gradient is that of the exact root, whatever the method: with ``S = √A`` it solves
    ``S X + X S = G``, again by products. First derivatives in reverse mode only.

    Args:
        a: ``(*b, n, n)``, symmetric positive definite. Add a multiple of the identity to
            what may be singular.
        method: one of the above.

    Returns:
        ``(*b, n, n)``, symmetric, in the dtype of ``a``, computed in float32 or wider.

    Raises:
        ValueError: for a matrix that is not square, or an unknown method.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.linalg.sqrtm(jnp.array([[5.0, 4.0], [4.0, 5.0]])).round(4))
        [[2. 1.]
         [1. 2.]]

    Reference:
        Y. Song, N. Sebe, W. Wang, "Fast differentiable matrix square root" (2022), arXiv
        2201.08663; N. J. Higham, "Functions of matrices: theory and computation", chapter
        6 (2008), SIAM.
    """
    _check("sqrtm", a, method)
    return jnp.asarray(_root(_lifted(a), method), a.dtype)


def inverse_sqrtm(
    a: Float[Array, "*b n n"], *, method: Method = "newton"
) -> Float[Array, "*b n n"]:
    """The inverse square root of a symmetric positive definite matrix, from products.

    Methods and gradient as those of :func:`sqrtm`; ``"pade"`` and ``"taylor"`` solve one
    linear system with the root that they find.

    Args:
        a: ``(*b, n, n)``, symmetric positive definite.
        method: as of :func:`sqrtm`.

    Returns:
        ``(*b, n, n)``, symmetric, in the dtype of ``a``, computed in float32 or wider.

    Raises:
        ValueError: for a matrix that is not square, or an unknown method.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> whiten = lrjax.linalg.inverse_sqrtm(jnp.diag(jnp.array([4.0, 25.0])))
        >>> print(jnp.diag(whiten).round(4))
        [0.5 0.2]

    Reference:
        Y. Song, N. Sebe, W. Wang, "Fast differentiable matrix square root and inverse
        square root" (2022), arXiv 2201.12543.
    """
    _check("inverse_sqrtm", a, method)
    return jnp.asarray(_inverse_root(_lifted(a), method), a.dtype)


def _check(function: str, a: Array, method: str) -> None:
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(
            f"{function} needs square matrices (*b, n, n), got shape {a.shape}."
        )
    if method not in ("newton", "pade", "taylor"):
        raise ValueError(f"method must be 'newton', 'pade' or 'taylor', got {method!r}.")


def _lifted(a: Array) -> Array:
    """The matrix with what rounding may have pushed below zero, where no root is real."""
    floor = float(jnp.finfo(a.dtype).eps) * a.shape[-1] ** 0.5
    a = a.astype(working_dtype(a.dtype))
    size = lax.stop_gradient(jnp.linalg.norm(a, axis=(-2, -1), keepdims=True))
    return a + floor * size * identity_like(a)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _root(a: Array, method: Method) -> Array:
    return _roots(a, method)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _inverse_root(a: Array, method: Method) -> Array:
    return _roots(a, method)[1]


def _roots(a: Array, method: Method) -> tuple[Array, Array]:
    """The root and its inverse; of zero, both are zero."""
    norm = jnp.linalg.norm(a, axis=(-2, -1), keepdims=True)
    identity = identity_like(a)
    a = _symmetric(a / nonzero(norm))
    root = _taylor(a, identity) if method == "taylor" else _pade(a, identity)
    inverse = _symmetric(jnp.linalg.solve(root, identity))
    if method == "newton":
        # Y = A K at the start makes the two approach the roots of A together.
        root, inverse = _newton(_symmetric(times(a, inverse)), inverse, identity)
    scale = jnp.sqrt(norm)
    return root * scale, jnp.where(norm > 0, inverse / nonzero(scale), 0)


def _symmetric(x: Array) -> Array:
    return (x + x.mT) / 2


def _pade(a: Array, identity: Array) -> Array:
    z = identity - a
    weights, poles = jnp.array(PADE_WEIGHTS, a.dtype), jnp.array(PADE_POLES, a.dtype)

    def add_term(k, total):
        term = jnp.linalg.solve(identity - poles[k] * z, z)
        return total - weights[k] * term

    return _symmetric(lax.fori_loop(0, len(PADE_WEIGHTS), add_term, identity))


def _taylor(a: Array, identity: Array) -> Array:
    z, terms = identity - a, jnp.array(TAYLOR, a.dtype)

    def horner(k, total):
        return times(z, total + terms[len(TAYLOR) - 1 - k] * identity)

    return _symmetric(identity + lax.fori_loop(0, len(TAYLOR), horner, 0 * identity))


def _most_steps(dtype) -> int:
    """Enough for condition numbers of ``1/eps``: products of roots grow by 9/4 a step."""
    return 4 + math.ceil(-math.log(float(jnp.finfo(dtype).eps)) / math.log(2.25))


def _newton(root: Array, inverse: Array, identity: Array) -> tuple[Array, Array]:
    bound = 4 * jnp.finfo(root.dtype).eps * root.shape[-1]

    def far(carry):
        step, change, *_ = carry
        return (step < _most_steps(root.dtype)) & jnp.any(change > bound)

    def advance(carry):
        step, _, root, inverse = carry
        product = times(inverse, root)
        turn = (3 * identity - product) / 2
        change = jnp.max(jnp.abs(identity - product), axis=(-2, -1))
        return (
            step + 1,
            change,
            _symmetric(times(root, turn)),
            _symmetric(times(turn, inverse)),
        )

    first = jnp.full(root.shape[:-2], jnp.inf, root.dtype)
    return lax.while_loop(far, advance, (0, first, root, inverse))[2:]


def _lyapunov(s: Array, g: Array) -> Array:
    """``X`` of ``S X + X S = G`` for a positive definite S: the sign of a block matrix.

    Newton-Schulz on ``[[S, G], [0, −S]]``, whose sign is ``[[I, 2X], [0, −I]]``.
    """
    size = nonzero(jnp.linalg.norm(s, axis=(-2, -1), keepdims=True))
    identity = identity_like(s)
    bound = 4 * jnp.finfo(s.dtype).eps * s.shape[-1]
    # A step multiplies what is small by 3/2, not by its square.
    most = 2 * _most_steps(s.dtype)

    def far(carry):
        step, change, *_ = carry
        return (step < most) & jnp.any(change > bound)

    def advance(carry):
        step, _, b, c = carry
        square = times(b, b)
        rest = 3 * identity - square
        c = (times(times(b, c), b) + times(c, rest) - times(square, c)) / 2
        change = jnp.max(jnp.abs(identity - square), axis=(-2, -1))
        return step + 1, change, _symmetric(times(b, rest) / 2), c

    first = jnp.full(s.shape[:-2], jnp.inf, s.dtype)
    *_, c = lax.while_loop(far, advance, (0, first, s / size, g / size))
    return c / 2


def _root_forward(a, method):
    root = _root(a, method)
    return root, root


def _root_backward(method, root, g):
    return (_lyapunov(root, _symmetric(g)),)


def _inverse_forward(a, method):
    inverse = _inverse_root(a, method)
    return inverse, inverse


def _inverse_backward(method, inverse, g):
    # d(A⁻¹) = K dK + dK K = −A⁻¹ dA A⁻¹ with K = A^(−1/2).
    square = times(inverse, inverse)
    return (-times(square, times(_lyapunov(inverse, _symmetric(g)), square)),)


_root.defvjp(_root_forward, _root_backward)
_inverse_root.defvjp(_inverse_forward, _inverse_backward)

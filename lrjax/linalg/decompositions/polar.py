from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..._sharding import einsum, placed_like
from .._numerics import nonzero, times, working_dtype
from ..gram import gram
from ..newton_schulz import NEWTON_SCHULZ, Polynomials, iterate_polynomials
from .svd_and_eigh import eigh, svd


def polar(
    x: Float[Array, "*b m n"],
    *,
    method: Literal["cubic", "muon", "polar_express", "gram", "svd"] = "svd",
    steps: int | None = None,
    precision: lax.PrecisionLike = lax.Precision.HIGHEST,
) -> Float[Array, "*b m n"]:
    """The polar factor ``U Vᵀ`` of ``x = U Σ Vᵀ``, also called the matrix sign.

    Directions with a zero singular value stay zero, so that ``polar(0) = 0``.

    - ``"svd"``: exact, one SVD.
    - ``"gram"``: exact up to the square of the condition, ``x (xᵀx)^{-1/2}`` by an
      eigendecomposition on the short side; tall ``x`` meets only matmuls.
    - ``"cubic"``, ``"muon"``, ``"polar_express"``: Newton-Schulz iterations, matmuls
      only. For ``σ ∈ [10⁻³, 1]·‖x‖_F``: ``polar_express`` is exact to rounding in 8
      steps, ``muon`` reaches ``[0.68, 1.13]`` for ``σ >= 10⁻² ‖x‖_F`` in 5 steps,
      ``cubic`` needs ``log_{1.5}(‖x‖_F/σ) + 4`` steps.

    Args:
        x: matrices ``(*b, m, n)``.
        method: algorithm, one of the above.
        steps: iterations of the Newton-Schulz methods, when not their own number. Fewer
            cut the list of polynomials, more repeat its last one.
        precision: of the products of the Newton-Schulz methods; None for the one in force.

    Returns:
        ``(*b, m, n)`` in the dtype of ``x``, computed in float32 or wider.

    Raises:
        ValueError: for an unknown method, or ``steps`` with a method without steps.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> lrjax.linalg.polar(jnp.array([[3.0, 0.0], [0.0, -0.1]])).tolist()
        [[1.0, 0.0], [0.0, -1.0]]

    Reference:
        N. J. Higham, "Functions of matrices: theory and computation", chapter 8 (2008),
        SIAM; K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks"
        (2024), kellerjordan.github.io/posts/muon; N. Amsel, D. Persson, C. Musco,
        R. M. Gower, "The Polar Express: optimal matrix sign methods and their application
        to the Muon algorithm" (2025), arXiv 2505.16932.
    """
    if x.shape[-2] < x.shape[-1]:
        return polar(x.mT, method=method, steps=steps, precision=precision).mT
    check_polar_method(method, steps)
    a = x.astype(working_dtype(x.dtype))
    # Frobenius scaling puts every singular value in [0, 1]; scaling by the largest entry
    # first keeps the squares from overflowing or vanishing.
    largest = jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True)
    a = a / nonzero(largest)
    norm = jnp.sqrt(jnp.sum(a * a, axis=(-2, -1), keepdims=True))
    a = a / nonzero(norm)
    if method == "svd":
        out = _polar_svd(a)
    elif method == "gram":
        out = _polar_gram(a)
    else:
        out = _newton_schulz(a, NEWTON_SCHULZ[method], steps, precision)
    return placed_like(out.astype(x.dtype), x)


def _polar_svd(x: Array) -> Array:
    u, s, vt = svd(x)
    keep = s > max(x.shape[-2:]) * jnp.finfo(s.dtype).eps * s[..., :1]
    return times(u * keep[..., None, :], vt)


def _polar_gram(x: Array) -> Array:
    values, vectors = eigh(gram(x))
    keep = values > x.shape[-1] * jnp.finfo(values.dtype).eps * values[..., -1:]
    root = jnp.where(keep, lax.rsqrt(jnp.where(keep, values, 1)), 0)
    inverse_root = einsum("...rk,...k,...sk->...rs", vectors, root, vectors)
    return times(x, inverse_root)


def _newton_schulz(
    x: Array, polynomials: Polynomials, steps: int | None, precision
) -> Array:
    if steps is not None:
        polynomials = polynomials[:steps] + polynomials[-1:] * (steps - len(polynomials))
    return iterate_polynomials(x, polynomials, precision)


def check_polar_method(method: str, steps: int | None) -> None:
    """Refuse methods that :func:`polar` does not know, and steps where there are none."""
    if method not in (*NEWTON_SCHULZ, "gram", "svd"):
        accepted = ", ".join(map(repr, (*NEWTON_SCHULZ, "gram", "svd")))
        raise ValueError(f"polar method must be one of {accepted}; got {method!r}.")
    if steps is not None and method not in NEWTON_SCHULZ:
        raise ValueError(f"polar method {method!r} is not iterative: drop steps={steps}.")

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._sharding import einsum
from .gram import gram, working_dtype


# Coefficients (a, b, c) of the odd polynomials x ← a x + b x xᵀx + c x (xᵀx)². "cubic" is
# Newton-Schulz proper. "muon" repeats one polynomial that is steep at 0 and leaves the
# singular values anywhere in [0.68, 1.13]. "polar_express" composes the minimax
# polynomials of the intervals that [1e-3, 1] is mapped to, one after the other.
NEWTON_SCHULZ = {
    "cubic": ((1.5, -0.5, 0.0),) * 20,
    "muon": ((3.4445, -4.7750, 2.0315),) * 5,
    "polar_express": (
        (8.4703288038, -25.1080747067, 18.6292755991),
        (4.1828341833, -3.1087011099, 0.5806066814),
        (3.9618572790, -2.9540637464, 0.5629761180),
        (3.2865862170, -2.4647201345, 0.5073576939),
        (2.2737499944, -1.6446603679, 0.4161909275),
        (1.8887161974, -1.2651572253, 0.3765189256),
        (1.8750008860, -1.2500009845, 0.3750000986),
        (1.875, -1.25, 0.375),
    ),
}


def polar(
    x: Float[Array, "*b m n"],
    *,
    method: Literal["cubic", "muon", "polar_express", "gram", "svd"] = "svd",
    steps: int | None = None,
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
        method: how.
        steps: iterations of the Newton-Schulz methods, when not their own number. Fewer
            cut the list of polynomials, more repeat its last one.

    Returns:
        ``(*b, m, n)`` in the dtype of ``x``, computed in float32 or wider.

    Raises:
        ValueError: for an unknown method, or ``steps`` with a method without steps.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> lrjax.linalg.polar(jnp.array([[3.0, 0.0], [0.0, -0.1]])).tolist()
        [[1.0, 0.0], [0.0, -1.0]]

    Reference:
        N. J. Higham, "Functions of Matrices", chapter 8 (2008); K. Jordan et al.,
        "Muon" (2024); N. Amsel, D. Persson, C. Musco, R. M. Gower, "The Polar Express"
        (2025), arXiv 2505.16932.
    """
    if x.shape[-2] < x.shape[-1]:
        return polar(x.mT, method=method, steps=steps).mT
    check_method(method, steps)
    a = x.astype(working_dtype(x.dtype))
    # Frobenius scaling puts every singular value in [0, 1]; scaling by the largest entry
    # first keeps the squares from overflowing or vanishing.
    largest = jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True)
    a = a / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(a * a, axis=(-2, -1), keepdims=True))
    a = a / jnp.where(norm > 0, norm, 1)
    if method == "svd":
        out = _polar_svd(a)
    elif method == "gram":
        out = _polar_gram(a)
    else:
        out = _newton_schulz(a, NEWTON_SCHULZ[method], steps)
    return out.astype(x.dtype)


def _polar_svd(x: Array) -> Array:
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    keep = s > max(x.shape[-2:]) * jnp.finfo(s.dtype).eps * s[..., :1]
    return einsum("...mr,...rn->...mn", u * keep[..., None, :], vt)


def _polar_gram(x: Array) -> Array:
    values, vectors = jnp.linalg.eigh(gram(x))
    keep = values > x.shape[-1] * jnp.finfo(values.dtype).eps * values[..., -1:]
    root = jnp.where(keep, lax.rsqrt(jnp.where(keep, values, 1)), 0)
    inverse_root = einsum("...rk,...k,...sk->...rs", vectors, root, vectors)
    return einsum("...mr,...rs->...ms", x, inverse_root)


def _newton_schulz(x: Array, polynomials, steps: int | None) -> Array:
    if steps is not None:
        polynomials = polynomials[:steps] + polynomials[-1:] * (steps - len(polynomials))
    for a, b, c in polynomials:
        g = einsum("...mr,...ms->...rs", x, x)
        p = b * g + c * einsum("...rs,...st->...rt", g, g) if c else b * g
        x = a * x + einsum("...mr,...rs->...ms", x, p)
    return x


def check_method(method: str, steps: int | None) -> None:
    """Refuse methods that :func:`polar` does not know, and steps where there are none."""
    if method not in (*NEWTON_SCHULZ, "gram", "svd"):
        accepted = ", ".join(map(repr, (*NEWTON_SCHULZ, "gram", "svd")))
        raise ValueError(f"polar method must be one of {accepted}; got {method!r}.")
    if steps is not None and method not in NEWTON_SCHULZ:
        raise ValueError(f"polar method {method!r} is not iterative: drop steps={steps}.")

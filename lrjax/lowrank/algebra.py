from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from ..linalg import (
    cross,
    identity_like,
    orthonormalize,
    outer,
    procrustes,
    product_svd,
    times,
    working_dtype,
)
from .nodes import LowRank, Matrix, SVDForm, factors_of
from .truncation import check_not_wider, truncate


def svd(x: Matrix) -> SVDForm:
    """The singular value decomposition of a factorized matrix, in O((m + n) r²).

    With ``left = Q_l R_l`` and ``right = Q_r R_r`` only the ``r × r`` core ``R_l R_rᵀ``
    is decomposed.

    Args:
        x: ``(*batch, m, n)`` of width ``r <= min(m, n)``; or a dense matrix.

    Returns:
        An :class:`SVDForm` with a diagonal core in descending order.

    Raises:
        ValueError: if the width is larger than one side of the matrix.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.array([[3.0], [4.0]]), jnp.array([[2.0], [0.0]]))
        >>> lrjax.svd(x).core.round(4).tolist()
        [[10.0]]
    """
    x = factors_of("svd", x)
    check_not_wider("svd", x)
    # Householder QR: the vectors of null directions have to be orthonormal too.
    left, s, right = product_svd(x.left, None, x.right, x.rank, method="qr")
    core = identity_like(s[..., :, None] * s[..., None, :]) * s[..., :, None]
    return SVDForm(*(a.astype(x.dtype) for a in (left, core, right)))


def balance(x: Matrix) -> LowRank:
    """The same value with balanced factors: ``leftᵀleft = rightᵀright = Σ``.

    Among all factorizations of the value this one has the smallest
    ``½(‖left‖² + ‖right‖²)``, which equals the nuclear norm.

    Args:
        x: ``(*batch, m, n)``.

    Returns:
        A :class:`LowRank` of the same width.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.array([[8.0], [0.0]]), jnp.array([[0.5]]))
        >>> lrjax.balance(x).right.round(4).tolist()
        [[2.0]]
    """
    x = factors_of("balance", x)
    return truncate(x, x.rank)


def refactor(
    x: Matrix,
    mode: Literal["balanced", "nearest", "left", "right"] = "balanced",
    *,
    scale: ArrayLike = 1.0,
) -> LowRank:
    """The same value with other factors: balanced, or all of the spectrum on one side.

    - ``"balanced"``: ``left = c U Σ^½``, ``right = V Σ^½ / c``, with ``c = scale``;
    - ``"nearest"``: ``left = c U Σ^½ Q``, ``right = V Σ^½ Q / c`` with the rotation that
      brings the balanced factors nearest to the old ones;
    - ``"left"``: ``left = c Q`` with orthonormal columns Q that span those of the old
      left factor; the right factor takes the rest;
    - ``"right"``: the other way around.

    Imbalance can be a good thing: factors that are wider than the rank slow gradient
    descent down the more, the better they are balanced. One ``"left"`` step with ``c``
    about the root of a singular value, when the error is small, makes it linear.

    Args:
        x: ``(*batch, m, n)``.
        mode: which factorization.
        scale: ``c``, a positive number.

    Returns:
        A :class:`LowRank` of the same width.

    Raises:
        ValueError: for another mode, or factors wider than the side that they span.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.array([[8.0], [0.0]]), jnp.array([[0.5]]))
        >>> print(lrjax.refactor(x, "left", scale=0.5).right.round(4))
        [[8.]]

    Reference:
        N. Xiong, L. Ding, S. Du, "How over-parameterization slows down gradient descent in
        matrix sensing" (2024), arXiv 2310.01769.
    """
    x = factors_of("refactor", x)
    if mode in ("balanced", "nearest"):
        even = balance(x)
        if mode == "nearest":
            even = turned_to(even, x)
        return LowRank(even.left * scale, even.right / scale)
    if mode == "right":
        return refactor(x.T, "left", scale=scale).T
    if mode != "left":
        raise ValueError(
            f"mode must be 'balanced', 'nearest', 'left' or 'right', got {mode!r}."
        )
    if x.rank > x.shape[-2]:
        raise ValueError(
            f"refactor needs a {mode} factor with no more columns than rows, got "
            f"{x.rank} columns and {x.shape[-2]} rows."
        )
    dtype = working_dtype(x.dtype)
    left, right = x.left.astype(dtype), x.right.astype(dtype)
    basis = orthonormalize(left)
    right = outer(right, cross(basis, left)) / scale
    return LowRank((basis * scale).astype(x.dtype), right.astype(x.dtype))


def turned_to(x: LowRank, old: LowRank) -> LowRank:
    """Balanced factors, rotated within their freedom towards old ones."""
    dtype = working_dtype(x.dtype)
    share = lambda a, b: cross(a.astype(dtype), b.astype(dtype))
    turn = procrustes(share(x.left, old.left) + share(x.right, old.right))
    turned = lambda factor: times(factor.astype(dtype), turn).astype(x.dtype)
    return LowRank(turned(x.left), turned(x.right))


def inner(x: Matrix, y: Matrix) -> Float[Array, "*batch"]:
    """The Frobenius inner product ``tr(xᵀy)``, in O((m + n) r²).

    Args:
        x: ``(*batch, m, n)``.
        y: ``(*batch, m, n)``, of any width.

    Returns:
        ``(*batch,)``.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.ones((2, 1)), jnp.ones((3, 1)))
        >>> float(lrjax.inner(x, x))
        6.0
    """
    x, y = factors_of("inner", x), factors_of("inner", y)
    _check_same_shape("inner", x, y)
    products = cross(x.left, y.left) * cross(x.right, y.right)
    return jnp.sum(products, axis=(-2, -1))


def norm(x: Matrix) -> Float[Array, "*batch"]:
    """The Frobenius norm of the value.

    Computed from orthonormal bases, not as ``sqrt(inner(x, x))``: that would lose half of
    the digits when the columns cancel, as in a difference of near matrices.

    Args:
        x: ``(*batch, m, n)``, in factors or dense.

    Returns:
        ``(*batch,)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> float(lrjax.norm(lrjax.LowRank(jnp.ones((2, 1)), jnp.ones((8, 1)))).round(4))
        4.0
    """
    y = factors_of("norm", x)
    if y.rank >= min(y.shape[-2:]):
        dense = x.materialize() if isinstance(x, LowRank | SVDForm) else x
        return jnp.linalg.norm(dense, axis=(-2, -1))
    dtype = working_dtype(y.dtype)
    inside = lambda z: cross(orthonormalize(z, method="cholesky"), z)
    core = outer(inside(y.left.astype(dtype)), inside(y.right.astype(dtype)))
    return jnp.linalg.norm(core, axis=(-2, -1)).astype(y.dtype)


def add(x: LowRank | SVDForm, y: LowRank | SVDForm) -> LowRank:
    """The sum of two factorized matrices; the widths add up, :func:`truncate` cuts them.

    Args:
        x: ``(*batch, m, n)`` of width ``r``.
        y: ``(*batch, m, n)`` of width ``s``.

    Returns:
        A :class:`LowRank` of width ``r + s``.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.ones((2, 1)), jnp.ones((3, 1)))
        >>> lrjax.add(x, x).rank
        2
    """
    for name, matrix in {"x": x, "y": y}.items():
        if not isinstance(matrix, LowRank | SVDForm):
            raise TypeError(
                f"add stacks the factors of two nodes, got {type(matrix)} for {name}: take "
                "x.materialize() + y for a dense sum, or the factors of a part of it, "
                "lrjax.truncate(y, rank)."
            )
    x, y = factors_of("add", x), factors_of("add", y)
    _check_same_shape("add", x, y)
    return LowRank(
        lax.concatenate([x.left, y.left], x.left.ndim - 1),
        lax.concatenate([x.right, y.right], x.right.ndim - 1),
    )


def _check_same_shape(what: str, x: LowRank, y: LowRank) -> None:
    if x.shape != y.shape:
        raise ValueError(
            f"{what} needs two matrices of one shape, got {x.shape} and {y.shape}."
        )

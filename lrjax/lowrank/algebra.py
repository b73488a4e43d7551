from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from .._sharding import einsum
from ..linalg.gram import identity_like, working_dtype
from ..linalg.orthonormalize import orthonormalize
from .nodes import LowRank, SVDForm


def _core_svd(x: LowRank, method: Literal["qr", "cholesky"]) -> tuple[Array, Array, Array]:
    """Singular triplets ``(*b, m, r), (*b, r), (*b, n, r)`` from the SVD of a small core.

    Householder QR gives orthonormal vectors also for null directions, Cholesky-QR keeps
    sharded rows where they are.
    """
    dtype = working_dtype(x.dtype)
    left, right = x.left.astype(dtype), x.right.astype(dtype)
    ql = orthonormalize(left, method=method)
    qr = orthonormalize(right, method=method)
    small_left = einsum("...mr,...ms->...rs", ql, left)
    small_right = einsum("...nr,...ns->...rs", qr, right)
    core = einsum("...rk,...sk->...rs", small_left, small_right)
    u, s, vt = jnp.linalg.svd(core, full_matrices=False)
    return einsum("...mr,...rs->...ms", ql, u), s, einsum("...nr,...sr->...ns", qr, vt)


def svd(x: LowRank) -> SVDForm:
    """The singular value decomposition of a factorized matrix, in O((m + n) r²).

    With ``left = Q_l R_l`` and ``right = Q_r R_r`` only the ``r × r`` core ``R_l R_rᵀ``
    is decomposed.

    Args:
        x: ``(*batch, m, n)`` of width ``r <= min(m, n)``.

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
    _check_not_wider("svd", x)
    left, s, right = _core_svd(x, "qr")
    core = identity_like(s[..., :, None] * s[..., None, :]) * s[..., :, None]
    return SVDForm(*(a.astype(x.dtype) for a in (left, core, right)))


def truncate(x: LowRank | SVDForm, rank: int) -> LowRank:
    """The best approximation of a factorized matrix of a smaller rank.

    Args:
        x: ``(*batch, m, n)`` of width at least ``rank``.
        rank: the width of the result.

    Returns:
        A balanced :class:`LowRank`: ``leftᵀleft = rightᵀright`` is diagonal.

    Raises:
        ValueError: if ``rank`` is not between 1 and the width of ``x``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(2))
        >>> lrjax.truncate(x, 1).materialize().round(4).tolist()
        [[4.0, 0.0], [0.0, 0.0]]

    Reference:
        C. Eckart, G. Young, "The approximation of one matrix by another of lower rank"
        (1936).
    """
    if isinstance(x, SVDForm):
        x = x.to_low_rank()
    if not 1 <= rank <= x.rank:
        raise ValueError(f"rank must be between 1 and the width {x.rank}, got {rank}.")
    _check_not_wider("truncate", x)
    left, values, right = _core_svd(x, "cholesky")
    left, right = left[..., :rank], right[..., :rank]
    root = jnp.sqrt(values)[..., None, :rank]
    # Singular vectors have a common sign to choose; the sum of both is symmetric in them.
    total = jnp.sum(left, axis=-2, keepdims=True) + jnp.sum(right, axis=-2, keepdims=True)
    root = jnp.where(total < 0, -root, root)
    return LowRank((left * root).astype(x.dtype), (right * root).astype(x.dtype))


def balance(x: LowRank) -> LowRank:
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
    return truncate(x, x.rank)


def refactor(
    x: LowRank,
    mode: Literal["balanced", "left", "right"] = "balanced",
    *,
    scale: ArrayLike = 1.0,
) -> LowRank:
    """The same value with other factors: balanced, or all of the spectrum on one side.

    - ``"balanced"``: ``left = c U Σ^½``, ``right = V Σ^½ / c``, with ``c = scale``;
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
    if mode == "balanced":
        even = balance(x)
        return LowRank(even.left * scale, even.right / scale)
    if mode == "right":
        return refactor(x.T, "left", scale=scale).T
    if mode != "left":
        raise ValueError(f"mode must be 'balanced', 'left' or 'right', got {mode!r}.")
    if x.rank > x.shape[-2]:
        raise ValueError(
            f"refactor needs a {mode} factor with no more columns than rows, got "
            f"{x.rank} columns and {x.shape[-2]} rows."
        )
    dtype = working_dtype(x.dtype)
    left, right = x.left.astype(dtype), x.right.astype(dtype)
    basis = orthonormalize(left)
    small = einsum("...mr,...ms->...rs", basis, left)
    right = einsum("...ns,...rs->...nr", right, small) / scale
    return LowRank((basis * scale).astype(x.dtype), right.astype(x.dtype))


def inner(x: LowRank, y: LowRank) -> Float[Array, "*batch"]:
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
    _check_same_shape("inner", x, y)
    lefts = einsum("...mr,...ms->...rs", x.left, y.left)
    rights = einsum("...nr,...ns->...rs", x.right, y.right)
    return jnp.sum(lefts * rights, axis=(-2, -1))


def norm(x: LowRank) -> Float[Array, "*batch"]:
    """The Frobenius norm of the value.

    Computed from orthonormal bases, not as ``sqrt(inner(x, x))``: that would lose half of
    the digits when the columns cancel, as in a difference of near matrices.

    Args:
        x: ``(*batch, m, n)``.

    Returns:
        ``(*batch,)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> float(lrjax.norm(lrjax.LowRank(jnp.ones((2, 1)), jnp.ones((8, 1)))).round(4))
        4.0
    """
    if x.rank >= min(x.shape[-2:]):
        return jnp.linalg.norm(x.materialize(), axis=(-2, -1))
    _, values, _ = _core_svd(x, "cholesky")
    return jnp.linalg.norm(values, axis=-1).astype(x.dtype)


def add(x: LowRank, y: LowRank) -> LowRank:
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
    _check_same_shape("add", x, y)
    return LowRank(
        lax.concatenate([x.left, y.left], x.left.ndim - 1),
        lax.concatenate([x.right, y.right], x.right.ndim - 1),
    )


def _check_not_wider(what: str, x: LowRank) -> None:
    if x.rank > min(x.shape[-2:]):
        raise ValueError(
            f"{what} needs factors no wider than the matrix: shape {x.shape}, width "
            f"{x.rank}."
        )


def _check_same_shape(what: str, x: LowRank, y: LowRank) -> None:
    if x.shape != y.shape:
        raise ValueError(
            f"{what} needs two matrices of one shape, got {x.shape} and {y.shape}."
        )

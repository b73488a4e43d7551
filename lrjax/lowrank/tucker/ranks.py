"""How the ranks of a Tucker form grow and shrink, axis by axis, at fixed shapes."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from ...linalg import cross, extend_basis, svd, times, working_dtype
from ..truncation import tail_rank
from .form import TuckerForm, multiply_axes, over_batch, unfold


def tucker_augment(
    x: TuckerForm,
    directions: Sequence[Array | None],
    *,
    widths: tuple[int, ...] | None = None,
    method: Literal["qr", "cholesky"] = "qr",
) -> TuckerForm:
    """The same tensor on wider orthonormal bases, that hold given directions as well.

    On each axis with directions ``D_k``, and with those on all others left as they are::

        U_k' = orth([U_k | D_k])        C' = C ×_k (U_k'ᵀ U_k)

    so that the value stays as it is, and the new part of the core is zero until a step
    fills it. Of a masked form with ranks ``r_k`` the first ``r_k`` columns of ``U_k`` and
    of ``D_k`` are taken: the gradient of the factors has no others.

    Args:
        x: a form with orthonormal factors ``(*batch, n_k, w_k)``.
        directions: for each axis ``(*batch, n_k, s_k)``, or ``None``.
        widths: of the result, at most; ``w_k + s_k`` by default. Directions that have no
            room are left out, the last ones first.
        method: how the bases are found, see :func:`lrjax.linalg.orthonormalize`.

    Returns:
        A form no wider than its axes are long, in the dtype of ``x``; masked, if ``x`` is.
        Directions count as constants.

    Raises:
        ValueError: if there are not as many directions as axes, or they do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrjax.lowrank import TuckerForm, tucker_augment
        >>> eye = jnp.eye(3)[:, :1]
        >>> x = TuckerForm(jnp.full((1, 1), 5.0), (eye, eye))
        >>> wide = tucker_augment(x, (jnp.ones((3, 1)), None))
        >>> wide.ranks, wide.core.ravel().tolist()
        ((2, 1), [5.0, 0.0])

    Reference:
        G. Ceruti, C. Lubich, "An unconventional robust integrator for dynamical low-rank
        approximation" (2022), arXiv 2010.02022; G. Ceruti, J. Kusch, C. Lubich, "A
        rank-adaptive robust integrator for dynamical low-rank approximation" (2022),
        arXiv 2104.05247.
    """
    fits = len(directions) == len(x.factors) and all(
        d is None or d.shape[:-1] == u.shape[:-1]
        for u, d in zip(x.factors, directions, strict=True)
    )
    if not fits:
        raise ValueError(
            "tucker_augment needs directions (*batch, n_k, s_k), or None, for each factor "
            f"of shapes {[u.shape for u in x.factors]}; got "
            f"{[None if d is None else d.shape for d in directions]}."
        )
    one = lambda x, directions: _augment(x, directions, widths, method)
    return over_batch(one, x.core.ndim - len(x.factors))(x, tuple(directions))


def _augment(x: TuckerForm, directions, widths, method) -> TuckerForm:
    dtype = working_dtype(x.dtype)
    old = tuple(u.astype(dtype) for u in x.factors)
    masked = x.active is not None
    ranks: list[Any] = list(x.ranks)
    bases = list(old)
    for axis, (u, d) in enumerate(zip(old, directions, strict=True)):
        if d is None:
            continue
        width = u.shape[-1] + d.shape[-1] if widths is None else widths[axis]
        counts = {}
        if masked:
            used = jnp.minimum(ranks[axis], d.shape[-1])
            counts = {"active": ranks[axis], "used": used}
            ranks[axis] = jnp.minimum(ranks[axis] + used, min(width, u.shape[-2]))
        d = d.astype(dtype)
        bases[axis] = extend_basis(u, d, width=width, method=method, **counts)
    core = multiply_axes(x.masked_core().astype(dtype), tuple(map(cross, bases, old)))
    return _in_dtype(x.dtype, core, bases, jnp.stack(ranks) if masked else None)


def tucker_truncate(
    x: TuckerForm,
    ranks: tuple[int, ...] | None = None,
    *,
    tol: ArrayLike | Sequence[ArrayLike] | None = None,
    energy: ArrayLike | Sequence[ArrayLike] | None = None,
    widths: tuple[int, ...] | None = None,
) -> TuckerForm:
    """A Tucker form of smaller ranks: each axis keeps its leading singular vectors.

    With the singular values ``σ_1 ≥ σ_2 ≥ …`` and left vectors ``P_k`` of each unfolding
    of the core, ``U_k ← U_k P_k[:, :r_k]`` and ``C ← C ×_k P_k[:, :r_k]ᵀ``: the truncated
    higher-order SVD, on the core alone. One of three rules says how many are kept::

        ranks     r_k as given, if there are so many
        tol       the fewest with (Σ_{j > r_k} σ_j²)^½ ≤ tol · (Σ_j σ_j²)^½, at least one
        energy    tol = (1 − energy)^½

    The squared error is at most the sum of the squared tails over all axes, and no less
    than the largest of them. ``tol`` and ``energy`` may be traced, and one number or
    ``(d,)``, a number for each axis: with ``tol`` zero an axis is left as it is.

    Args:
        x: a form with orthonormal factors.
        ranks: what is kept of each axis; these are also the new widths.
        tol: relative to the norm of the tensor.
        energy: the share of the squared norm that each axis keeps.
        widths: of the new factors, for the last two; those of ``x`` by default. No axis
            keeps more.

    Returns:
        A form with orthonormal factors and zeros in the core where it is not in use;
        masked, unless ``ranks`` are given and ``x`` is not masked. Its core is
        ``all-orthogonal``: the rows of every unfolding are orthogonal, in falling order.

    Raises:
        ValueError: unless one rule is given; for ranks or widths out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrjax.lowrank import TuckerForm, tucker_truncate
        >>> x = TuckerForm(jnp.diag(jnp.array([4.0, 3.0, 0.1])), (jnp.eye(3), jnp.eye(3)))
        >>> tucker_truncate(x, tol=0.1).ranks.tolist()
        [2, 2]

    Reference:
        L. De Lathauwer, B. De Moor, J. Vandewalle, "A multilinear singular value
        decomposition" (2000), SIAM Journal on Matrix Analysis and Applications; in
        training: E. Zangrando et al., "Geometry-aware training of factorized layers in
        tensor Tucker format" (2023), arXiv 2305.19059.
    """
    given = [rule is not None for rule in (ranks, tol, energy)]
    if sum(given) != 1 or (ranks is not None and widths is not None):
        raise ValueError(
            "tucker_truncate needs one rule, ranks or tol or energy, and widths with the "
            "last two alone."
        )
    widths = _checked_widths(x, widths if ranks is None else ranks)
    masked = ranks is None or x.active is not None
    level = 1 - jnp.asarray(1.0 if energy is None else energy)
    level = level if tol is None else jnp.square(jnp.asarray(tol))
    level = jnp.broadcast_to(level, (len(widths),))
    one = lambda x: _truncate(x, level, widths, masked)
    return over_batch(one, x.core.ndim - len(widths))(x)


def _truncate(
    x: TuckerForm, level: Float[Array, " d"], widths: tuple[int, ...], masked: bool
) -> TuckerForm:
    dtype = working_dtype(x.dtype)
    core = lax.stop_gradient(x.masked_core()).astype(dtype)
    turns, ranks = [], []
    for axis, width in enumerate(widths):
        vectors, values, _ = svd(unfold(core, axis))
        turns.append(vectors[:, :width])
        most = width if x.active is None else jnp.minimum(x.active[axis], width)
        ranks.append(jnp.minimum(tail_rank(values, level[axis]), most))
    core = multiply_axes(core, tuple(turn.T for turn in turns))
    factors = [
        times(u.astype(dtype), turn) for u, turn in zip(x.factors, turns, strict=True)
    ]
    new = _in_dtype(x.dtype, core, factors, jnp.stack(ranks) if masked else None)
    return TuckerForm(new.masked_core(), new.factors, new.active)


def _checked_widths(x: TuckerForm, widths: tuple[int, ...] | None) -> tuple[int, ...]:
    old = x.widths
    size = math.prod(old)
    # An unfolding has no more vectors than the other axes together have numbers.
    most = tuple(min(w, size // w) for w in old)
    widths = most if widths is None else tuple(widths)
    fits = len(widths) == len(most)
    if not fits or any(not 1 <= w <= m for w, m in zip(widths, most, strict=True)):
        raise ValueError(
            f"tucker_truncate of a form of widths {old} gives widths between 1 and {most}, "
            f"got {widths}."
        )
    return widths


def _in_dtype(dtype, core: Array, factors: Sequence[Array], ranks) -> TuckerForm:
    return TuckerForm(core.astype(dtype), [u.astype(dtype) for u in factors], ranks)

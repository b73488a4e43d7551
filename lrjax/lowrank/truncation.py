"""Back to a smaller rank, chosen by a number or by the spectrum; spectra within bounds."""

from typing import Literal, overload

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

from ..linalg import (
    TruncatedSVD,
    identity_like,
    nonzero,
    product_svd,
    svd,
    times,
    working_dtype,
)
from .nodes import LowRank, Matrix, SVDForm, factors_of


@overload
def truncate(x: Matrix, rank: int) -> LowRank: ...
@overload
def truncate(
    x: Matrix,
    rank: int | None = None,
    *,
    tol: ArrayLike | None = None,
    energy: ArrayLike | None = None,
    budget: ArrayLike | None = None,
) -> SVDForm: ...
def truncate(x, rank=None, *, tol=None, energy=None, budget=None):
    """The best approximation of a factorized matrix of a smaller rank.

    The rank is a number, or the smallest that a rule allows, at least one. With singular
    values ``σ`` and their tails ``t_r = (Σ_{i>r} σ_i²)^½``:

    - ``tol``: ``t_r ≤ tol · t_0``, a bound on the relative error;
    - ``energy``: ``Σ_{i≤r} σ_i² ≥ energy · t_0²``;
    - ``budget``: ``r (m + n) ≤ budget``, the numbers in two factors, where the largest is
      taken.

    A rule may be traced, and each matrix of a batch has its own rank: the result has a
    static width, of which the columns beyond the rank are not in use.

    Args:
        x: ``(*batch, m, n)``; or a dense matrix.
        rank: the width of the result; with a rule the largest rank, by default the width
            of ``x``.
        tol: a number, or one for each matrix of the batch.
        energy: likewise, at most one.
        budget: likewise.

    Returns:
        With a rank alone a balanced :class:`LowRank`: ``leftᵀleft = rightᵀright`` is
        diagonal. With a rule an :class:`SVDForm` with a diagonal core in falling order and
        its rank.

    Raises:
        ValueError: if ``rank`` is not between 1 and the width of ``x``; for no rule and no
            rank, or two rules.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(2))
        >>> lrjax.truncate(x, 1).materialize().round(4).tolist()
        [[4.0, 0.0], [0.0, 0.0]]
        >>> [int(lrjax.truncate(x, tol=tol).rank) for tol in (0.2, 0.3)]  # 1/√17 is 0.24
        [2, 1]

    Reference:
        C. Eckart, G. Young, "The approximation of one matrix by another of lower rank"
        (1936), Psychometrika.
    """
    rules = {"tol": tol, "energy": energy, "budget": budget}
    given = [name for name, value in rules.items() if value is not None]
    width = x.left.shape[-1] if isinstance(x, SVDForm) else factors_of("truncate", x).rank
    if len(given) > 1 or (not given and rank is None):
        raise ValueError(
            "truncate needs a rank, or one of tol, energy and budget, got "
            f"{' and '.join(given) or 'nothing'}."
        )
    rank = width if rank is None else rank
    if not 1 <= rank <= width:
        raise ValueError(f"rank must be between 1 and the width {width}, got {rank}.")
    if not given:
        return _balanced(factors_of("truncate", x), rank)
    left, values, right = _triplets(x, rank)
    if budget is not None:
        most = jnp.asarray(budget) // (x.shape[-2] + x.shape[-1])
        active = jnp.clip(most.astype(jnp.int32), 1, rank)
    else:
        share = 1 - jnp.asarray(energy) if tol is None else jnp.square(tol)
        active = jnp.minimum(tail_rank(values, share), rank)
    triplets = TruncatedSVD(left, values[..., :rank], right)
    return diagonal_form(triplets, active, x.dtype)


def _balanced(x: LowRank, rank: int) -> LowRank:
    check_not_wider("truncate", x)
    left, values, right = product_svd(x.left, None, x.right, rank)
    root = jnp.sqrt(values)[..., None, :]
    # Singular vectors have a common sign to choose; the sum of both is symmetric in them.
    total = jnp.sum(left, axis=-2, keepdims=True) + jnp.sum(right, axis=-2, keepdims=True)
    root = jnp.where(total < 0, -root, root)
    return LowRank((left * root).astype(x.dtype), (right * root).astype(x.dtype))


def _triplets(x: Matrix, rank: int) -> TruncatedSVD:
    """The leading singular vectors and all values; of an SVDForm from its core alone."""
    if not isinstance(x, SVDForm):
        x = factors_of("truncate", x)
        check_not_wider("truncate", x)
        left, values, right = product_svd(x.left, None, x.right, x.rank, method="qr")
        return TruncatedSVD(left[..., :rank], values, right[..., :rank])
    core = x.masked_core().astype(working_dtype(x.dtype))
    u, values, vt = svd(lax.stop_gradient(core))
    turned = lambda side, turn: times(side.astype(turn.dtype), turn[..., :rank])
    return TruncatedSVD(turned(x.left, u), values, turned(x.right, vt.mT))


def tail_rank(values: Float[Array, "*b k"], share: ArrayLike) -> Int[Array, "*b"]:
    """The smallest rank whose tail has no more than a share of all squares, at least one.

    Args:
        values: singular values in falling order.
        share: of the sum of squares that may be left out; ``tol²``, or ``1 − energy``.

    Returns:
        ``(*b,)`` int32.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> values = jnp.array([3.0, 2.0, 1.0, 0.0])
        >>> [int(lrjax.lowrank.tail_rank(values, share)) for share in (0, 1 / 13, 0.5)]
        [3, 2, 1]
    """
    squares = (values / nonzero(values[..., :1])) ** 2
    tails = jnp.cumsum(squares[..., ::-1], axis=-1)[..., ::-1]
    allowed = jnp.asarray(share, values.dtype) * tails[..., 0]
    count = jnp.sum(tails > allowed[..., None], axis=-1, dtype=jnp.int32)
    return jnp.maximum(count, 1)


def diagonal_form(
    triplets: TruncatedSVD, active: Int[Array, "*b"] | None, dtype
) -> SVDForm:
    """Singular triplets as a node; beyond the rank the core is zero."""
    left, values, right = (a.astype(dtype) for a in triplets)
    core = identity_like(values[..., :, None] * values[..., None, :])
    x = SVDForm(left, core * values[..., None, :], right, active)
    return SVDForm(left, x.masked_core(), right, active)


def clamp_spectrum(
    x: SVDForm, condition: ArrayLike, *, reference: Literal["mean", "rms"] = "mean"
) -> SVDForm:
    """Bring the singular values near each other: a condition number of at most ``τ``.

    With ``s`` the mean of the singular values, or the root of the mean of their squares::

        σ ← clip(σ, 2 s / (τ + 1), 2 τ s / (τ + 1))

    so that ``σ_1 / σ_r ≤ τ``; at ``τ = 1`` all are ``s``. The bases of the core's singular
    vectors do not change: the node keeps its outer factors.

    Args:
        x: ``(*batch, m, n)``; singular values of columns in use, those that are zero too.
        condition: ``τ``, at least one; may be traced.
        reference: what ``s`` is.

    Returns:
        An :class:`SVDForm` with the same outer factors.

    Raises:
        ValueError: for a number below one, or an unknown reference.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> eye = jnp.eye(3)
        >>> x = lrjax.SVDForm(eye, jnp.diag(jnp.array([5.0, 3.0, 1.0])), eye)
        >>> print(jnp.diag(lrjax.lowrank.clamp_spectrum(x, 2.0).core).round(4))
        [4. 3. 2.]

    Reference:
        D. Savostianova, E. Zangrando, G. Ceruti, F. Tudisco, "Robust low-rank training via
        approximate orthonormal constraints" (2023), arXiv 2306.01485, for the mean.
    """
    if isinstance(condition, int | float) and condition < 1:
        raise ValueError(f"condition must be at least one, got {condition}.")
    if reference not in ("mean", "rms"):
        raise ValueError(f"reference must be 'mean' or 'rms', got {reference!r}.")
    core = lax.stop_gradient(x.masked_core().astype(working_dtype(x.dtype)))
    identity = identity_like(core)
    unused = identity - x.mask_columns(identity)
    size = jnp.sum(jnp.abs(core), axis=(-2, -1), keepdims=True)
    # Larger than all others, and so in no common space with a zero that is in use.
    u, values, vt = svd(core + unused * (1 + 2 * size))
    each = lambda number: jnp.broadcast_to(number, values.shape[:-1])[..., None]
    count = each(x.rank)
    place = lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    used = jnp.where(place >= values.shape[-1] - count, values, 0)
    power = 1 if reference == "mean" else 2
    mean = jnp.sum(used**power, axis=-1, keepdims=True) / count.astype(values.dtype)
    condition = each(jnp.asarray(condition, values.dtype))
    low = 2 * mean ** (1 / power) / (condition + 1)
    values = jnp.clip(values, low, condition * low)
    core = times(u * values[..., None, :], vt).astype(x.dtype)
    clamped = SVDForm(x.left, core, x.right, x.active)
    return SVDForm(x.left, clamped.masked_core(), x.right, x.active)


def check_not_wider(what: str, x: LowRank | SVDForm) -> None:
    """Refuse factors that are wider than the matrix."""
    width = x.left.shape[-1]
    if width > min(x.shape[-2:]):
        raise ValueError(
            f"{what} needs factors no wider than the matrix: shape {x.shape}, width "
            f"{width}."
        )

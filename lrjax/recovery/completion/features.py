"""What is known of rows and columns beside the entries."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float

from ...linalg import cross, eigh, gram, orthonormalize, times
from .._inputs import as_numbers
from .grouped import Grouped, Reduce, back_project, identity


FARTHEST = 2.0  # standard deviations from the mean that a pattern may be
PATTERN_STEPS = 4  # of the power iteration on the pattern


def check_features(
    side: str, features: ArrayLike | None, count: int, wanted: int | None = None
) -> Float[Array, "count p"]:
    """Features as a matrix of which the first column is one.

    Args:
        side: "row" or "column".
        features: ``(count, p)`` or ``(count,)``, or none.
        count: the number of rows or columns.
        wanted: how many there have to be.
    """
    if features is None:
        features = jnp.zeros((count, 0))
    features = jnp.asarray(as_numbers("fit_completion", features, f"the {side}s' features"))
    if features.ndim == 1:
        features = features[:, None]
    if features.ndim != 2 or len(features) != count:
        raise ValueError(
            f"the features of {count} {side}s are a matrix with as many rows, got shape "
            f"{features.shape}."
        )
    if wanted is not None and features.shape[1] != wanted:
        raise ValueError(
            f"the fit knows {wanted} features of each {side}, got {features.shape[1]}: "
            "give transform those of the new rows, in the same order."
        )
    if not isinstance(features, Tracer) and not np.all(np.isfinite(np.asarray(features))):
        raise ValueError(
            f"the features of {side}s have to be finite: what is not known of some, fill "
            "in, with the mean say."
        )
    features = features.astype(jnp.result_type(features.dtype, jnp.float32))
    return jnp.pad(features, ((0, 0), (1, 0)), constant_values=1)


class Units(NamedTuple):
    """Center and scale of features: a row ``x`` counts as ``(x - center) / scale``.

    That is cut off at ``most``: a row without entries is far from all that have some.
    """

    center: Float[Array, " p"]
    scale: Float[Array, " p"]
    most: Float[Array, " p"]

    def __call__(self, features: Float[Array, "count p"]) -> Float[Array, "count p"]:
        """Features in these units."""
        features = (features - self.center[None, :]) / self.scale[None, :]
        return jnp.clip(features, -self.most[None, :], self.most[None, :])


def units_of(
    features: Float[Array, "count p"],
    seen: Bool[Array, " count"],
    pattern: int,
    reduce: Reduce,
) -> Units:
    """Those in which the features of rows with entries have mean zero and size one.

    ``pattern`` of them, the last ones, are of the pattern, and cut off.
    """
    weight = seen[:, None].astype(features.dtype)
    count = jnp.maximum(reduce(jnp.sum(weight)), 1)
    constant = jnp.arange(features.shape[1]) == 0
    mean = reduce(jnp.sum(weight * features, axis=0)) / count
    center = jnp.where(constant, 0, mean)
    away = weight * (features - center[None, :])
    square = reduce(jnp.sum(away**2, axis=0)) / count
    least = (1e-4 * mean) ** 2
    scale = jnp.where(constant | (square <= least), 1, jnp.sqrt(square))
    own = jnp.arange(len(mean)) < len(mean) - pattern
    most = jnp.where(own, jnp.finfo(mean.dtype).max, FARTHEST)
    return Units(center, scale, most.astype(mean.dtype))


def first_precision(features: Float[Array, "count p"], f: int) -> Float[Array, "p f"]:
    """Nothing is known of the constant; other coefficients have the size of one."""
    known = (jnp.arange(features.shape[1]) > 0).astype(features.dtype)
    return jnp.broadcast_to(known[:, None], (len(known), f))


def prior_mean(
    features: Float[Array, "m p"],
    factor: Float[Array, "m f"],
    real: Float[Array, " m"],
    precision: Float[Array, "p f"],
    d: int,
    reduce: Reduce,
) -> tuple[Float[Array, "p f"], Float[Array, "p f"]]:
    """The regression of rows of unit variance on their features, and its new precision.

    A feature's coefficients have one precision for the d columns of the factor and
    another for the effects, those of largest evidence: what does not help fades out.
    """
    seen = features * real[:, None]
    square, product = reduce(cross(seen, features)), reduce(cross(seen, factor))
    p, f = precision.shape
    lost = jnp.where(jnp.diagonal(square) > 0, 0, 1).astype(square.dtype)
    one = jnp.eye(p, dtype=square.dtype)
    a = square[None] + (precision.T + lost[None, :])[:, :, None] * one[None]
    inverse = jnp.linalg.inv(a)
    mean = jnp.einsum("fpq,qf->pf", inverse, product, precision=lax.Precision.HIGHEST)
    # How much of each coefficient the data have decided: MacKay's fixed point.
    decided = 1 - precision * jnp.diagonal(inverse, axis1=1, axis2=2).T
    block = (jnp.arange(f) >= d).astype(square.dtype)
    same = (block[:, None] == block[None, :]).astype(square.dtype)
    new = jnp.maximum(decided @ same, 1e-6) / jnp.maximum((mean**2) @ same, 1e-20)
    new = jnp.clip(new, 1e-6, 1e8)
    return mean, jnp.where(precision > 0, new, 0)


def pattern_basis(
    by_row: Grouped, by_col: Grouped, width: int, reduce: Reduce
) -> tuple[Float[Array, "m k"], Float[Array, "n k"]]:
    """Leading singular vectors of the pattern of the observed entries.

    Of ``M_ij / sqrt((1 + m_i) (1 + n_j))``, M being one where there is an entry and m, n
    the numbers of entries; those of the rows over ``sqrt(1 + m_i)``, those of the columns
    likewise: for :func:`pattern_features` of the other side.
    """
    dtype = by_row.values.dtype
    by_row, by_col = _ones(by_row), _ones(by_col)
    row_root = jnp.sqrt(1 + _counts(by_row, dtype))
    col_root = jnp.sqrt(1 + reduce(_counts(by_col, dtype)))
    orthonormal = functools.partial(orthonormalize, method="cholesky")
    basis = orthonormal(jr.normal(jr.key(0), (len(col_root), width), dtype))
    over = lambda x, root: x / root[:, None]

    def left(v):
        return over(back_project(by_row, over(v, col_root)), row_root)

    def power(_, v):
        return orthonormal(
            over(reduce(back_project(by_col, over(left(v), row_root))), col_root)
        )

    basis = lax.fori_loop(0, PATTERN_STEPS, power, basis)
    rows = left(basis)
    _, turn = eigh(reduce(gram(rows)))
    return over(times(rows, turn), row_root), over(times(basis, turn), col_root)


def pattern_features(
    entries: Grouped, basis: Float[Array, "n k"], reduce: Reduce = identity
) -> Float[Array, "m 1+k"]:
    """What the places of its entries tell of a row: how many there are, and which."""
    entries = _ones(entries)
    counts = reduce(_counts(entries, basis.dtype))[:, None]
    which = reduce(back_project(entries, basis)) / jnp.sqrt(1 + counts)
    return jnp.concatenate([jnp.log1p(counts), which], axis=1)


def _ones(entries: Grouped) -> Grouped:
    return entries._replace(values=jnp.ones_like(entries.values))


def _counts(entries: Grouped, dtype) -> Float[Array, " m"]:
    return jnp.diff(entries.starts).astype(dtype)

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from .._numerics import working_dtype


# Where the means of 400 draws of several spectra stay within a tenth of the expansion: see
# benchmarks/subspace_statistics.py. The first bounds the turn of one pair of vectors.
PAIR, SHARE = 0.015, 0.15


class SubspaceError(NamedTuple):
    """How far samples turn a subspace of principal components.

    Attributes:
        square: ``E‖P̂ − P‖²_F``, twice the sum of ``sin²`` of the principal angles.
        angle: ``√(square / 2 rank)``, the root mean square of the sines of the angles.
        trusted: whether the samples are enough for the expansion, of first order, to be
            right within a tenth.
    """

    square: Float[Array, "*b"]
    angle: Float[Array, "*b"]
    trusted: Bool[Array, "*b"]


def subspace_error(
    values: Float[Array, "*b d"],
    rank: int,
    samples: ArrayLike,
    *,
    kurtosis: ArrayLike = 3.0,
) -> SubspaceError:
    """The error bar of a subspace of principal components, from the spectrum alone.

        E‖P̂ − P‖²_F ≈ (2 / n) Σ_{i ≤ rank < j} λ_i λ_j / (λ_i − λ_j)²

    for the projector ``P̂`` on the leading eigenvectors of the covariance of ``n`` samples.
    Two principal angles that differ by less than this are the same as far as data can tell.
    The sum is that of the first order in ``1/√n``: infinite where the gap closes, and
    ``trusted`` where the angles are small.

    Args:
        values: the eigenvalues ``λ`` of the covariance, falling, all of them: those of the
            truth, or of a sample in their place.
        rank: of the subspace, fewer than there are values.
        samples: ``n``, independent ones.
        kurtosis: of a coordinate, ``E x⁴ / (E x²)²``: three for a normal distribution. For
            elliptical ones with heavier tails the error is ``kurtosis / 3`` times as large.

    Returns:
        A :class:`SubspaceError`.

    Raises:
        ValueError: for a rank that is not between 1 and ``d − 1``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> values = jnp.array([4.0, 1.0, 1.0])
        >>> found = lrjax.linalg.subspace_error(values, 1, 1000)
        >>> print(found.square.round(5), found.angle.round(4), found.trusted)
        0.00178 0.0298 True

    Reference:
        T. W. Anderson, "Asymptotic theory for principal component analysis" (1963), The
        Annals of Mathematical Statistics.
    """
    d = values.shape[-1]
    if not 1 <= rank < d:
        raise ValueError(
            f"subspace_error needs a rank between 1 and {d - 1}, fewer than the {d} "
            f"eigenvalues; got {rank}."
        )
    values = values.astype(working_dtype(values.dtype))
    inside, outside = values[..., :rank, None], values[..., None, rank:]
    # A rotation of zero weight needs no gap: where nothing is outside, nothing turns.
    weight, gap = inside * outside, inside - outside
    gap = jnp.where(weight > 0, gap, 1)
    pairs = jnp.asarray(kurtosis) / 3 * weight / gap**2 / samples
    square = 2 * jnp.sum(pairs, axis=(-2, -1))
    most = 2 * rank * (1 - rank / d)  # of a subspace that knows nothing
    trusted = (jnp.max(pairs, axis=(-2, -1)) <= PAIR) & (square <= SHARE * most)
    return SubspaceError(square, jnp.sqrt(square / (2 * rank)), trusted)

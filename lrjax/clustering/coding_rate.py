"""How many bits samples take, as a smooth measure of their rank."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from ..linalg import cross, outer
from ._samples import as_samples


def coding_rate(
    samples: Float[ArrayLike, "n d"],
    *,
    distortion: ArrayLike = 0.1,
    member: Float[ArrayLike, " n"] | None = None,
) -> Float[Array, ""]:
    """The rate of a Gaussian code: a smooth, scale-aware measure of rank.

    ``½ log det(I + d / (m ε²) Σ_i w_i z_i z_iᵀ)`` with weights w, in nats a sample of d
    numbers known to ε; ``m = Σ w``, ``n`` without weights. Equal to
    ``½ Σ_i log(1 + d σ_i² / (m ε²))`` of the singular values of ``diag(√w) Z``. Concave in
    the squares, so that at a given energy it is largest where directions share it
    equally: to maximize it spreads samples, to minimize it lowers their rank.

    By a determinant on the shorter side, differentiable anywhere: at samples that are zero
    and at equal singular values, where an SVD is not.

    Args:
        samples: Z, ``(n, d)``, one in a row; usually of length one.
        distortion: ε, in units of the samples.
        member: weights w, how much of a sample belongs to the group; by default one.

    Returns:
        A number; zero where no sample belongs to the group.

    Raises:
        ValueError: for samples that are no matrix of at least two rows.
        TypeError: for complex samples.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> z = jnp.eye(2)  # ½ · 2 · log(1 + 2 / (2 ε²))
        >>> print(lrjax.clustering.coding_rate(z, distortion=1.0))
        0.693147
        >>> bool(jnp.isfinite(jax.grad(lrjax.clustering.coding_rate)(0 * z)).all())
        True

    Reference:
        Y. Ma, H. Derksen, W. Hong, J. Wright, "Segmentation of multivariate mixed data via
        lossy data coding and compression" (2007), IEEE Transactions on Pattern Analysis
        and Machine Intelligence. Special case: the singular values.
    """
    z = as_samples("coding_rate", samples)
    if member is None:
        return _rate(z, jnp.ones(len(z), z.dtype), distortion)
    return _rate(z, jnp.asarray(member, z.dtype), distortion)


def coding_rate_reduction(
    samples: Float[ArrayLike, "n d"],
    members: Float[ArrayLike, "m k"],
    *,
    distortion: ArrayLike = 0.1,
) -> Float[Array, ""]:
    """Maximal coding rate reduction: what groups save, to be maximized.

    ``R(Z) − Σ_k (m_k / n) R(Z; w_k)`` with :func:`coding_rate` of all samples and of each
    group, whose weights ``w_k`` are a column of ``members`` and add up to ``m_k``. Large
    where all samples together are spread and each group is of low rank, and groups are
    orthogonal. Not negative, where the weights of a sample add up to one.

    Args:
        samples: Z, ``(n, d)``, one in a row, of length one: without that it has no
            maximum.
        members: ``(n, k)``, the share of each sample that is in each group.
        distortion: ε, as for :func:`coding_rate`.

    Returns:
        A number.

    Raises:
        ValueError: as :func:`coding_rate`, or for members of other samples.
        TypeError: for complex samples.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> z = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> gain = lambda *labels: lrjax.clustering.coding_rate_reduction(
        ...     z, jnp.eye(2)[jnp.array(labels)])
        >>> right, wrong = gain(0, 0, 1, 1), gain(0, 1, 0, 1)
        >>> print(right.round(2), abs(wrong.round(2)))
        1.96 0.0

    Reference:
        Y. Yu, K. H. R. Chan, C. You, C. Song, Y. Ma, "Learning diverse and discriminative
        representations via the principle of maximal coding rate reduction" (2020), arXiv
        2006.08558; for clustering: T. Ding, S. Tong, K. H. R. Chan, X. Dai, Y. Ma, B. D.
        Haeffele, "Unsupervised manifold linearizing and clustering" (2023), arXiv
        2301.01805. Special case: zero for a single group.
    """
    z = as_samples("coding_rate_reduction", samples)
    members = jnp.asarray(members, z.dtype)
    if members.ndim != 2 or len(members) != len(z):
        raise ValueError(
            f"coding_rate_reduction takes members (n, k) of {len(z)} samples, got shape "
            f"{members.shape}: labels are to be one-hot, jax.nn.one_hot(labels, k)."
        )
    each = jax.vmap(lambda w: _rate(z, w, distortion))(members.T)
    shares = jnp.sum(members, axis=0) / len(z)
    return _rate(z, jnp.ones(len(z), z.dtype), distortion) - jnp.sum(shares * each)


def _rate(z: Array, weights: Array, distortion: ArrayLike) -> Array:
    n, d = z.shape
    count = jnp.sum(weights)
    scale = d / jnp.where(count > 0, count, 1) / jnp.asarray(distortion, z.dtype) ** 2
    weighted = weights[:, None] * z
    # The determinant of I + w z zᵀ is that of I + √w z zᵀ √w, and has a slope at zero.
    products = cross(z, weighted) if d <= n else outer(weighted, z)
    matrix = jnp.eye(min(n, d), dtype=z.dtype) + scale * products
    return jnp.linalg.slogdet(matrix)[1] / 2

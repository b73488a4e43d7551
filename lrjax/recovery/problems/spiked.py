from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ..._arguments import check_key
from ...linalg import nonzero, orthonormalize
from ...lowrank import LowRank


class SpikedModel(NamedTuple):
    """A low-rank matrix in noise, and what its singular values become in the limit.

    Attributes:
        matrix: ``(m, n)``, what is observed.
        truth: the low-rank matrix, with singular values ``strengths``.
        values: ``(r,)``, the limits of the singular values of ``matrix``; at and below the
            threshold the edge of the noise.
        left_overlap: ``(r,)``, the limits of the squared cosines between the left singular
            vectors of matrix and truth; zero at and below the threshold.
        right_overlap: ``(r,)``, those of the right ones.
        threshold: the strength below which nothing is to be found.
    """

    matrix: Float[Array, "m n"]
    truth: LowRank
    values: Float[Array, " r"]
    left_overlap: Float[Array, " r"]
    right_overlap: Float[Array, " r"]
    threshold: Float[Array, ""]


def spiked_model(
    key: PRNGKeyArray,
    shape: tuple[int, int],
    strengths: ArrayLike | Sequence[float],
    *,
    noise: ArrayLike = 1.0,
    dtype=jnp.float32,
) -> SpikedModel:
    """A matrix of known singular values in Gaussian noise, with its exact asymptotics.

    ``Y = Σ θ_i u_i v_iᵀ + noise · Z/√n``, Z standard normal. With ``β = m/n`` and t = θ
    over the noise, in the limit of large m and n a spike is seen if ``t > β^¼``: then

        σ(Y) → noise · sqrt((1 + t²)(β + t²))/t,
        ⟨u, û⟩² → 1 − β(1 + t²)/(t²(t² + β)),   ⟨v, v̂⟩² → 1 − (β + t²)/(t²(t² + 1)).

    Below, the singular value is lost at the edge ``noise · (1 + √β)`` of the noise and its
    vectors say nothing (the transition of Baik, Ben Arous and Péché). With strengths on
    both sides of the threshold, of several sizes, a choice of rank has an exact answer.

    Args:
        key: for the vectors and the noise.
        shape: ``(m, n)``.
        strengths: ``(r,)``, the θ.
        noise: its size: entries have standard deviation ``noise/√n``.
        dtype: of all arrays.

    Returns:
        A :class:`SpikedModel`.

    Raises:
        ValueError: for more strengths than the shorter side.

    Example:
        >>> import jax, lrjax
        >>> key = jax.random.key(0)
        >>> model = lrjax.recovery.spiked_model(key, (100, 400), [3.0, 0.5])
        >>> float(model.threshold.round(4)), model.values.round(3).tolist()
        (0.7071, [3.206, 1.5])

    Reference:
        F. Benaych-Georges, R. R. Nadakuditi, "The singular values and vectors of low rank
        perturbations of large rectangular random matrices" (2012), arXiv 1103.2221.
    """
    check_key("spiked_model", key)
    m, n = shape
    theta = jnp.asarray(strengths, dtype)
    if theta.ndim != 1 or len(theta) > min(m, n):
        raise ValueError(
            f"strengths must be a vector of at most {min(m, n)} numbers for a matrix of "
            f"shape {shape}, got shape {theta.shape}."
        )
    k_left, k_right, k_noise = jr.split(key, 3)
    left = orthonormalize(jr.normal(k_left, (m, len(theta)), dtype))
    right = orthonormalize(jr.normal(k_right, (n, len(theta)), dtype))
    truth = LowRank(left * theta[None, :], right)
    noise = jnp.asarray(noise, dtype)
    matrix = truth.materialize() + noise * jr.normal(k_noise, shape, dtype) / n**0.5
    beta = m / n
    square = (theta / nonzero(noise)) ** 2
    seen = square > beta**0.5
    safe = jnp.where(seen, square, 1)
    value = jnp.sqrt((1 + safe) * (beta + safe) / safe)
    left_overlap = 1 - beta * (1 + safe) / (safe * (safe + beta))
    right_overlap = 1 - (beta + safe) / (safe * (safe + 1))
    return SpikedModel(
        matrix,
        truth,
        noise * jnp.where(seen, value, 1 + beta**0.5),
        jnp.where(seen, left_overlap, 0),
        jnp.where(seen, right_overlap, 0),
        noise * beta**0.25,
    )

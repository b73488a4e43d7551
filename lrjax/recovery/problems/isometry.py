from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ..._arguments import check_key
from ...linalg import orthonormalize, singular_values, times
from ...lowrank import LowRank
from .operators import Operator


class MixedNormRIP(NamedTuple):
    """What the l1 norm of measurements makes of random matrices of a rank and norm 1.

    Attributes:
        lower: the smallest ``‖A(X)‖₁/‖X‖_F``.
        upper: the largest: the Lipschitz constant of the l1 loss.
        mean: their mean.
        std: their standard deviation.
        sharpness: the smallest ``(‖A_Sᶜ(X)‖₁ − ‖A_S(X)‖₁)/‖X‖_F`` for outliers on S:
            around the truth the l1 loss grows at least as fast. Equal to ``lower``
            without outliers.
    """

    lower: Float[Array, ""]
    upper: Float[Array, ""]
    mean: Float[Array, ""]
    std: Float[Array, ""]
    sharpness: Float[Array, ""]


def mixed_norm_rip(
    operator: Operator,
    rank: int,
    *,
    key: PRNGKeyArray,
    trials: int = 100,
    outliers: Bool[Array, "..."] | None = None,
) -> MixedNormRIP:
    """Estimate the constants of the mixed-norm restricted isometry property.

    ``δ₁ ‖X‖_F <= ‖A(X)‖₁ <= δ₂ ‖X‖_F`` for all X of a rank. Random matrices show how the
    ratio is distributed: the extremes over all matrices lie further out, so ``lower``
    is an upper bound of δ₁ and ``upper`` a lower bound of δ₂. Subgradient methods take
    about ``(upper/sharpness)²`` steps a digit, and recover if the sharpness is
    positive. For m dense Gaussian measurements with entries of variance ``1/m`` the
    mean is ``sqrt(2m/π)``, its standard deviation 0.6028, and with a share p of
    outliers the sharpness is around ``(1 − 2p)`` of it.

    Args:
        operator: what is measured.
        rank: of the matrices; for recovery at width d of rank r it is ``d + r``.
        key: for the matrices.
        trials: how many of them.
        outliers: true for the measurements that are grossly wrong.

    Returns:
        A :class:`MixedNormRIP`.

    Raises:
        ValueError: for less than one trial.

    Example:
        >>> import jax, lrjax
        >>> problem = lrjax.matrix_sensing(jax.random.key(0), (12, 10), 1, 900)
        >>> rip = lrjax.recovery.mixed_norm_rip(problem.operator, 2, key=jax.random.key(1))
        >>> bool(abs(rip.mean - (2 * 900 / 3.1416) ** 0.5) < 0.5)
        True

    Reference:
        T. Tong, C. Ma, Y. Chi, "Low-rank matrix recovery with scaled subgradient methods:
        fast and robust convergence without the condition number" (2021), arXiv
        2010.13364.
    """
    check_key("mixed_norm_rip", key)

    def ratio(key):
        sizes = jnp.abs(operator(_unit_matrix(key, operator, rank)))
        wrong = 0.0 if outliers is None else jnp.sum(jnp.where(outliers, sizes, 0))
        return jnp.sum(sizes), jnp.sum(sizes) - 2 * wrong

    ratios, sharpness = jax.lax.map(ratio, _keys(key, trials))
    return MixedNormRIP(
        jnp.min(ratios),
        jnp.max(ratios),
        jnp.mean(ratios),
        jnp.std(ratios),
        jnp.min(sharpness),
    )


class SignRIP(NamedTuple):
    """How close the subgradient of the l1 loss is to the direction of the error.

    Attributes:
        scale: ``φ``, the mean of ``⟨A*(sign(A(X) − s)), X⟩`` for ``‖X‖_F = 1``.
        deviation: ``δ``, the largest ``‖A*(sign(A(X) − s)) − φ X‖/φ``, in the norm that
            is the largest inner product with a matrix of the rank and norm 1.
    """

    scale: Float[Array, ""]
    deviation: Float[Array, ""]


def sign_rip(
    operator: Operator,
    rank: int,
    *,
    key: PRNGKeyArray,
    trials: int = 100,
    corruption: Float[Array, "..."] | None = None,
) -> SignRIP:
    """Estimate the constants of the sign restricted isometry property.

    If ``A*(sign(A(X) − s))`` is close to a multiple of ``X/‖X‖_F`` for all X of a rank,
    the subgradient of the l1 loss with corruption ``s`` points at the truth whatever
    ``s`` is, and :func:`lrjax.subgm` recovers. Random matrices X of norm 1 are tried: the
    deviation is a lower bound. One dense ``m × n`` matrix and its SVD a trial.

    Args:
        operator: what is measured.
        rank: of the matrices.
        key: for the matrices.
        trials: how many of them.
        corruption: ``s``, what was added to the measurements, in units in which the
            error has norm 1.

    Returns:
        A :class:`SignRIP`.

    Raises:
        ValueError: for less than one trial.

    Example:
        >>> import jax, lrjax
        >>> problem = lrjax.matrix_sensing(jax.random.key(0), (12, 10), 1, 4000)
        >>> rip = lrjax.recovery.sign_rip(problem.operator, 1, key=jax.random.key(1))
        >>> bool(rip.deviation < 0.3)
        True

    Reference:
        J. Ma, S. Fattahi, "Global convergence of sub-gradient method for robust matrix
        recovery: small initialization, noisy measurements, and over-parameterization"
        (2022), arXiv 2202.08788.
    """
    check_key("sign_rip", key)

    def trial(key):
        x = _unit_matrix(key, operator, rank)
        y = operator(x)
        slopes = jnp.sign(y if corruption is None else y - corruption)
        return operator.adjoint(slopes), x.materialize(), jnp.sum(slopes * y)

    def scale(key):
        return trial(key)[2]

    keys = _keys(key, trials)
    phi = jnp.mean(jax.lax.map(scale, keys))

    def deviation(key):
        subgradient, x, _ = trial(key)
        values = singular_values(subgradient - phi * x)
        return jnp.linalg.norm(values[:rank])

    return SignRIP(phi, jnp.max(jax.lax.map(deviation, keys)) / phi)


def _keys(key: PRNGKeyArray, trials: int) -> Array:
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}.")
    return jr.split(key, trials)


def _unit_matrix(key: PRNGKeyArray, operator: Operator, rank: int) -> LowRank:
    """A matrix of norm 1 with random singular vectors and random singular values."""
    (m, n), dtype = operator.shape, jnp.result_type(float)
    k_left, k_right, k_core = jr.split(key, 3)
    left = orthonormalize(jr.normal(k_left, (m, rank), dtype))
    right = orthonormalize(jr.normal(k_right, (n, rank), dtype))
    core = jr.normal(k_core, (rank, rank), dtype)
    core = core / jnp.linalg.norm(core)
    return LowRank(times(left, core), right)

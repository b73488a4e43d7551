"""One factor frozen, the other trained: linear regression, on either side."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Scalar

from ...linalg import cross, times
from ...lowrank import LowRank
from ..problems import student_loss


def best_left(
    right: Float[Array, "n r"],
    teacher: Float[Array, "m n"],
    covariance: Float[Array, "n n"],
) -> LowRank:
    """The best left factor beside a frozen right one: a regression on r features.

    ``B* = T C A (Aᵀ C A)⁻¹`` minimizes :func:`student_loss` of ``B Aᵀ``; for LoRA, a frozen
    random A reads the inputs and B is learnt.

    Args:
        right: ``A``, of full column rank.
        teacher: ``T``.
        covariance: ``C`` of the inputs.

    Returns:
        ``LowRank(B*, A)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.flows.best_left(jnp.ones((2, 1)), 4 * jnp.eye(2), jnp.eye(2))
        >>> print(x.left.ravel())
        [2. 2.]

    Reference:
        J. Zhu et al., "Asymmetry in low-rank adapters of foundation models" (2024), arXiv
        2402.16842.
    """
    seen = times(covariance, right)
    left = jnp.linalg.solve(cross(right, seen), times(teacher, seen).T).T
    return LowRank(left, right)


def best_right(left: Float[Array, "m r"], teacher: Float[Array, "m n"]) -> LowRank:
    """The best right factor beside a frozen left one, whatever the inputs.

    ``A* = Tᵀ B (Bᵀ B)⁻¹``: the teacher projected on the columns of B.

    Args:
        left: ``B``, of full column rank.
        teacher: ``T``.

    Returns:
        ``LowRank(B, A*)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.flows.best_right(jnp.ones((2, 1)), 4 * jnp.eye(2))
        >>> print(x.right.ravel())
        [2. 2.]

    Reference:
        J. Zhu et al., "Asymmetry in low-rank adapters of foundation models" (2024), arXiv
        2402.16842.
    """
    right = jnp.linalg.solve(cross(left, left), cross(left, teacher)).T
    return LowRank(left, right)


class FrozenErrors(NamedTuple):
    """Expected losses of a pair of which one factor was fitted to a sample.

    Attributes:
        right_frozen: the left factor was fitted.
        left_frozen: the right factor was fitted.
    """

    right_frozen: Scalar
    left_frozen: Scalar


def frozen_factor_errors(
    frozen: LowRank,
    teacher: Float[Array, "m n"],
    covariance: Float[Array, "n n"],
    noise: ArrayLike = 0.0,
    samples: ArrayLike = jnp.inf,
) -> FrozenErrors:
    """What freezing the right or the left factor costs, of an infinite or a finite sample.

    Least squares on N Gaussian examples whose m outputs have noise of variance σ². The
    frozen right factor turns what it does not see into noise of its own, but only r
    numbers of each output are fitted; beside a frozen left factor it is n::

        right frozen: R + (R + ½ m σ²) r/(N − r − 1)     R = student_loss(best_left)
        left frozen:  R + ½ r σ² n/(N − n − 1)           R = student_loss(best_right)

    Over all directions of a frozen left factor the mean of its R is ``1 − r/m`` of the
    loss before, ``½ tr(T C Tᵀ)``; that of the right one is ``1 − r/n`` for white inputs.

    Args:
        frozen: both factors, as each would be frozen.
        teacher: ``T``.
        covariance: ``C`` of the inputs.
        noise: ``σ²``.
        samples: ``N``; too few for a unique fit give infinity.

    Returns:
        :class:`FrozenErrors`, in the units of :func:`student_loss`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> one = lrjax.LowRank(jnp.eye(4)[:, :1], jnp.eye(4)[:, :1])
        >>> errors = lrjax.flows.frozen_factor_errors(one, jnp.eye(4), jnp.eye(4))
        >>> print(errors.right_frozen, errors.left_frozen)
        1.5 1.5

    Reference:
        J. Zhu et al., "Asymmetry in low-rank adapters of foundation models" (2024), arXiv
        2402.16842; the errors of finite samples are derived here.
    """
    (m, n), r = teacher.shape, frozen.rank
    loss = lambda x: student_loss(x, teacher, covariance)
    by_left = loss(best_left(frozen.right, teacher, covariance))
    by_right = loss(best_right(frozen.left, teacher))
    return FrozenErrors(
        by_left + (by_left + 0.5 * m * noise) * _spread(r, samples),
        by_right + 0.5 * r * noise * _spread(n, samples),
    )


def _spread(features: int, samples: ArrayLike) -> Array:
    """``tr C E (ZᵀZ)⁻¹`` of Gaussian examples: the mean of an inverse Wishart matrix."""
    free = jnp.asarray(samples, float) - features - 1
    return jnp.where(free > 0, features / jnp.where(free > 0, free, 1), jnp.inf)

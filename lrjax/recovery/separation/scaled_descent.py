from typing import Any, cast

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from ...linalg import cross, keep_largest, times
from ...lowrank import LowRank
from ...recipes import scaled_gd
from .alternation import (
    Observer,
    Rule,
    Separation,
    alternate,
    check_rank,
    leading_factors,
    observed,
)


def scaled_descent(
    matrix: Real[Array, "..."],
    rank: int,
    *,
    outlier_fraction: ArrayLike,
    mask: Bool[Array, "..."] | None = None,
    learning_rate: ArrayLike = 0.5,
    max_steps: int = 200,
    tol: ArrayLike | None = 1e-6,
    observe: Observer | None = None,
) -> Separation:
    """Robust PCA by scaled gradient steps on the factors, outliers left out of each.

    With ``X = left @ right.T`` and T the rule of :func:`keep_largest`, which no row and
    no column can dominate::

        S ← T(matrix − X; 2 · outlier_fraction)
        E = matrix − X − S
        left ← left + η E right (rightᵀright)⁻¹,   right ← right + η Eᵀ left (leftᵀleft)⁻¹

    from the leading singular vectors of ``matrix − T(matrix; outlier_fraction)``. The
    rate does not depend on the condition number of X. Where nothing is observed E is
    zero, and η is divided by the observed share.

    Pure: jit it with ``rank`` and ``max_steps`` static; ``vmap`` it over matrices and over
    the other numbers.

    Args:
        matrix: real ``(m, n)``; entries that are not finite count as missing.
        rank: of the low-rank part.
        outlier_fraction: the largest share of outliers in any row or column.
        mask: true where an entry is observed.
        learning_rate: ``η``; the error falls by about ``1 − η`` a step at best.
        max_steps: at most as many.
        tol: stop at this relative residual; ``None`` takes all steps.
        observe: called with a :class:`SolveState` in every step; its loss is the
            relative residual.

    Returns:
        A :class:`Separation`, its ``state`` empty.

    Raises:
        ValueError: for a matrix without entries or axes, a mask of another shape, a
            rank out of range, or ``max_steps < 1``.

    Example:
        >>> import jax
        >>> from lrjax import recovery
        >>> problem = recovery.robust_pca(jax.random.key(0), (80, 60), 2, 0.05)
        >>> fit = recovery.scaled_descent(problem.targets, 2, outlier_fraction=0.1)
        >>> bool(problem.relative_error(fit.low_rank) < 1e-4)
        True

    Reference:
        T. Tong, C. Ma, Y. Chi, "Accelerating ill-conditioned low-rank matrix estimation
        via scaled gradient descent" (2021), arXiv 2005.08898.
    """
    data = observed("scaled_descent", matrix, mask)
    check_rank("scaled_descent", rank, data.matrix.shape)
    fraction = jnp.asarray(outlier_fraction, data.matrix.dtype)
    rate = learning_rate / data.share()
    rule = Rule(
        sparse=lambda rest, state: keep_largest(rest, 2 * fraction),
        low_rank=lambda x, error, state: (scaled_step(x, error, rate), state),
    )
    trimmed = data.matrix - keep_largest(data.matrix, fraction)
    start = leading_factors(trimmed / data.share(), rank)
    return alternate(data, start, (), rule, max_steps=max_steps, tol=tol, observe=observe)


def scaled_step(x: LowRank, error: Float[Array, "m n"], rate: ArrayLike) -> LowRank:
    """One step of :func:`lrjax.scaled_gd` on ``½‖error‖²``."""
    gradient = LowRank(-times(error, x.right), -cross(error, x.left))
    tx = scaled_gd(jnp.asarray(rate))
    node = cast(Any, x)  # optax's types do not know nodes
    updates, _ = tx.update(cast(Any, gradient), tx.init(node), node)
    return cast(LowRank, optax.apply_updates(node, updates))

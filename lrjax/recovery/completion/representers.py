"""Which entries a completed value comes from."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from ...linalg import nonzero, product_svd
from ...lowrank import LowRank
from .._inputs import VectorLike
from .completed import CompletionFit


class Representers(NamedTuple):
    """What each entry contributes to one value of a matrix.

    Attributes:
        contributions: ``(count,)``.
        rest: what comes from no entry: of a stationary point zero, up to rounding; of a
            :class:`CompletionFit` what it takes the row for without its entries.
        value: of the matrix, ``Σ contributions + rest``.
    """

    contributions: Float[Array, " count"]
    rest: Float[Array, ""]
    value: Float[Array, ""]


def representer_points(
    x: LowRank,
    rows: Int[Array, " count"],
    cols: Int[Array, " count"],
    slopes: Float[Array, " count"],
    nuclear_weight: ArrayLike,
    row: ArrayLike,
    col: ArrayLike,
) -> Representers:
    """How much each entry contributes to ``X[row, col]`` of a matrix fitted with a penalty.

    At a minimum of ``Σ_k ℓ_k(X[i_k, j_k]) + nuclear_weight · ‖X‖_*``, as of a chain with
    :func:`lrjax.add_nuclear_norm`, the gradient ``G = Σ_k ℓ'_k e_{i_k} e_{j_k}ᵀ`` has
    ``Uᵀ G V = −nuclear_weight · I`` on the singular vectors of ``X = U diag(σ) Vᵀ``. So

        X[i, j] = −(1/nuclear_weight) Σ_k ℓ'_k · A[i, i_k] · B[j, j_k],
        A = U diag(√σ) Uᵀ = L (Lᵀ L)^(−½) Lᵀ,    B = V diag(√σ) Vᵀ,

    with L the left one of two balanced factors: every entry has a share, also one of
    another row, and large ones those of similar rows and columns with a large slope.
    ``rest`` says how far X is from a minimum; the shares mean nothing where it is large.

    Args:
        x: the matrix, in any factorization.
        rows: ``(count,)``, where the entries are.
        cols: ``(count,)``.
        slopes: ``(count,)``, the derivatives ``ℓ'_k`` at X: of squares ``½(x − y)²`` the
            residuals ``x − y``.
        nuclear_weight: positive.
        row: of the value; ``vmap`` over several.
        col: of the value.

    Returns:
        :class:`Representers`. ``O((m + n) r² + count · r)``.

    Example:
        One entry of each row, so that each comes from itself alone:

        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.diag(jnp.array([2.0, 3.0])), jnp.eye(2))
        >>> at, slopes = jnp.array([0, 1]), jnp.array([-0.5, -0.5])  # of 2.5 and 3.5
        >>> found = lrjax.recovery.representer_points(x, at, at, slopes, 0.5, 1, 1)
        >>> print(found.contributions.round(4), found.rest.round(4) + 0)
        [0. 3.] 0.0

    Reference:
        C.-P. Tsai, J. Zhang, H.-F. Yu, J.-Y. Jiang, E. Chien, C.-J. Hsieh, P. Ravikumar,
        "Representer point selection for explaining regularized high-dimensional models"
        (2023), arXiv 2305.20002.
    """
    left, values, right = product_svd(x.left, None, x.right, x.rank)
    root = jnp.sqrt(values)
    of_rows = left[rows] @ (root * left[row])
    of_cols = right[cols] @ (root * right[col])
    contributions = -slopes * of_rows * of_cols / nonzero(jnp.asarray(nuclear_weight))
    value = jnp.sum(left[row] * values * right[col])
    return Representers(contributions, value - jnp.sum(contributions), value)


def row_contributions(
    fit: CompletionFit, cols: VectorLike, values: VectorLike, col: ArrayLike
) -> Representers:
    """How much each entry of a row contributes to its completion by a fit.

    Given the columns, the posterior mean of a row is linear in its entries, so that
    ``completed[col] = rest + Σ_k g_k · value_k`` exactly; a contribution is ``g_k ·
    value_k`` in excess of a zero there. "Which ratings caused this one": those with the
    largest.

    Args:
        fit: from :func:`lrjax.fit_completion`, without ``robust`` and without features of
            the rows.
        cols: ``(count,)``, the columns of the row that are known.
        values: ``(count,)``, what they hold.
        col: the column in question.

    Returns:
        :class:`Representers`; the value is that of ``fit.transform``. It takes the memory
        of ``count²`` entries.

    Raises:
        ValueError: for a robust fit, whose rows are not linear in their entries.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> i, j = jnp.divmod(jnp.arange(60), 6)
        >>> fit = lrjax.fit_completion(i, j, (i + 1.0) * (j + 1.0), (10, 6))
        >>> cols, values = jnp.array([0, 2]), jnp.array([20.0, 60.0])
        >>> found = lrjax.recovery.row_contributions(fit, cols, values, 4)
        >>> print(found.value.round(), bool(abs(found.contributions[1]) > 50))
        100.0 True
    """
    if fit.robust:
        raise ValueError(
            "row_contributions needs rows that are linear in their entries, and a robust "
            "fit weighs entries by themselves: fit with robust=False."
        )
    cols, values = jnp.asarray(cols), jnp.asarray(values)
    count = len(cols)
    # One row without values, one for each entry alone, and the row itself.
    alone = jnp.concatenate([jnp.zeros((1, count)), jnp.eye(count), jnp.ones((1, count))])
    table = (alone * values[None]).reshape(-1)
    index = jnp.repeat(jnp.arange(count + 2), count)
    at = jnp.tile(cols, count + 2)
    factors = fit.transform(index, at, table, count + 2)
    completed = factors @ fit.low_rank.right[col]
    rest, *_ = completed
    return Representers(completed[1:-1] - rest, rest, completed[-1])

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import ArrayLike

from ....linalg import pivoted_columns
from ....lowrank import LowRank
from ..._settings import check_fits
from .adapter import CoreKind


class LoLDU(CoreKind):
    """LoLDU: the leading pivots of the LU decomposition of the weight, trained.

    With ``W = P L D U``, L and U unit triangular: ``W' = W + s · P L_r diag(z − z₀) U_r``
    with the first r columns of ``P L`` and rows of ``U``, frozen, ``z (r,)`` trained from
    the first r pivots ``z₀`` on the diagonal of D, and ``s = alpha / rank``. So r numbers a
    matrix; the base stays as it is, and the rows of L are kept in the order that P gives
    them. A zero pivot does no harm: its row of U is taken undivided.

    Args:
        rank: how many pivots.
        alpha: the numerator of the scale, ``rank`` by default.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the arrays, by default that of each weight.

    Raises:
        ValueError: for a rank below 1, a dropout outside [0, 1); in :func:`lrjax.adapt`,
            for a rank above the smaller side of a matrix.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> model = {"kernel": jnp.array([[1.0, 2.0], [4.0, 4.0]]).T}
        >>> loldu = lrjax.adapters.LoLDU(rank=2)
        >>> lrjax.adapt(model, loldu, key=jax.random.key(0))["kernel"].core.tolist()
        [4.0, 1.0]

    Reference:
        Y. Shi et al., "LoLDU: low-rank adaptation via lower-diag-upper decomposition for
        parameter-efficient fine-tuning" (2024), arXiv:2410.13618.
    """

    def __init__(
        self,
        rank: int | np.integer = 16,
        alpha: ArrayLike | None = None,
        *,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.settings(rank, alpha, dropout, dtype)

    def init(self, site, *, key=None, pool=None, data=None):
        """The factors and the pivots; these twice, trained and as the start."""
        check_fits("LoLDU", self.rank, site)
        rank, dtype = self.rank, self.dtype_of(site)
        lu, _, order = lax.linalg.lu(lax.stop_gradient(site.read()))
        pivots = jnp.diagonal(lu)[:rank]
        lower = jnp.tril(lu[:, :rank], -1) + jnp.eye(lu.shape[0], rank, dtype=lu.dtype)
        upper = jnp.triu(lu[:rank]) / jnp.where(pivots == 0, 1, pivots)[:, None]
        # Row k of L belongs to row order[k] of the weight.
        left = jnp.zeros_like(lower).at[order].set(lower)
        pair = LowRank(left.astype(dtype), upper.T.astype(dtype))
        pivots = pivots.astype(dtype)
        # A copy, so that a step that donates the pivots leaves their start alone.
        return self.adapter(pair, pivots, start=jnp.copy(pivots))


class PMSS(CoreKind):
    """PMSS: a trained core between columns and rows of the weight itself.

    ``W' = W + s · C M R`` with ``C = W[:, J] (out, r)`` and ``R = W[I, :] (r, in)``, the
    columns and rows that QR decompositions with pivoting choose first, frozen, and
    ``M (r, r)`` trained from zero: r² numbers a matrix.

    Args:
        rank: how many columns and rows.
        alpha: the numerator of ``s = alpha / rank``, ``rank`` by default.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the arrays, by default that of each weight.

    Raises:
        ValueError: for a rank below 1, a dropout outside [0, 1); in :func:`lrjax.adapt`,
            for a rank above the smaller side of a matrix.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> model = {"kernel": jnp.diag(jnp.array([1.0, 3.0, 2.0]))}
        >>> pmss = lrjax.adapters.PMSS(rank=1)
        >>> adapters = lrjax.adapt(model, pmss, key=jax.random.key(0))
        >>> adapters["kernel"].pair.left.ravel().tolist()
        [0.0, 3.0, 0.0]

    Reference:
        Q. Wang et al., "PMSS: pretrained matrices skeleton selection for LLM fine-tuning"
        (2024), arXiv:2409.16722.
    """

    def __init__(
        self,
        rank: int | np.integer = 16,
        alpha: ArrayLike | None = None,
        *,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.settings(rank, alpha, dropout, dtype)

    def init(self, site, *, key=None, pool=None, data=None):
        """The chosen columns and rows, and a core of zeros."""
        check_fits("PMSS", self.rank, site)
        dtype, weight = self.dtype_of(site), site.read()
        columns = pivoted_columns(weight, self.rank)
        rows = pivoted_columns(weight.T, self.rank)
        pair = LowRank(weight[:, columns].astype(dtype), weight[rows].T.astype(dtype))
        return self.adapter(pair, jnp.zeros((self.rank,) * 2, dtype))

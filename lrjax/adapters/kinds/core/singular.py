from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import ArrayLike

from ...._sites import Site
from ....linalg import truncated_svd
from ....lowrank import LowRank
from ..._settings import check_fits, checked_rank, kaiming_uniform
from ...protocol import VectorPool
from .adapter import Combination, CoreKind, FromPool


def _singular(site: Site, rank: int, powers: tuple[float, float], dtype: Any) -> LowRank:
    """``U Σ^p`` and ``V Σ^q`` of the weight."""
    u, values, v = truncated_svd(site.read(), rank)
    left, right = (
        (x * values[None, :] ** p).astype(dtype)
        for x, p in zip((u, v), powers, strict=True)
    )
    return LowRank(left, right)


class LoRAXS(CoreKind):
    """LoRA-XS: a trained core between frozen singular vectors, ``W' = W + s · B R A``.

    From ``W ≈ U Σ Vᵀ`` of the given rank: ``B = U (out, r)`` and ``A = Σ Vᵀ (r, in)``
    frozen, ``R (r, r)`` trained, ``s = alpha / rank``. So r² numbers a matrix, whatever
    its size. The vectors belong to the core: they are kept in the adapter, since another
    decomposition may choose other signs.

    Args:
        rank: the width of the core.
        alpha: the numerator of the scale.
        std: of the normal numbers that R starts with; 0 is the model itself.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the arrays, by default that of each weight.

    Raises:
        ValueError: for a rank below 1, a dropout outside [0, 1); in :func:`lrjax.adapt`,
            for a rank above the smaller side of a matrix.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(6, 5, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.LoRAXS(rank=2), key=jax.random.key(1))
        >>> [x.shape for x in jax.tree.leaves(lrjax.partition(adapters)[0])]
        [(2, 2)]

    Reference:
        K. Bałazy et al., "LoRA-XS: low-rank adaptation with extremely small number of
        parameters" (2024), arXiv:2405.17604.
    """

    std: ArrayLike

    def __init__(
        self,
        rank: int | np.integer = 16,
        alpha: ArrayLike = 16.0,
        *,
        std: ArrayLike = 1e-5,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.settings(rank, alpha, dropout, dtype)
        self.std = std

    def init(self, site, *, key, pool=None, data=None):
        """Singular vectors of the weight, and a core next to zero."""
        check_fits("LoRAXS", self.rank, site)
        dtype = self.dtype_of(site)
        pair = _singular(site, self.rank, (0.0, 1.0), dtype)
        core = jnp.asarray(self.std, dtype) * jr.normal(key, (self.rank,) * 2, dtype)
        return self.adapter(pair, core)


class TinyLoRA(CoreKind):
    """TinyLoRA: as few as one trained number, the weights of fixed random cores.

    ``W' = W + B (Σ_u v_u P_u) A`` with ``B = U √Σ (out, r)`` and ``A = √Σ Vᵀ (r, in)`` from
    the weight, ``P (u, r, r)`` normal with variance ``1/r``, all frozen, and ``v (u,)``
    trained from zero. With a ``group`` all matrices of that name share one v, and train
    ``weights`` numbers together; without one each has its own.

    Args:
        rank: the width of the core.
        weights: how many random cores there are.
        group: the name of a shared v.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the arrays, by default that of each weight.

    Raises:
        ValueError: for a rank or ``weights`` below 1, a dropout outside [0, 1); in
            :func:`lrjax.adapt`, for a rank above the smaller side of a matrix.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> tiny = lrjax.adapters.TinyLoRA(rank=2, weights=13, group="all")
        >>> adapters = lrjax.adapt(model, tiny, key=jax.random.key(1))
        >>> sum(x.size for x in jax.tree.leaves(lrjax.partition(adapters)[0]))
        13

    Reference:
        J. X. Morris et al., "Learning to reason in 13 parameters" (2026),
        arXiv:2602.04118. With ``weights = r²`` unit matrices as P it is LoRA-XS.
    """

    weights: int = eqx.field(static=True)
    group: str | None = eqx.field(static=True)

    def __init__(
        self,
        rank: int | np.integer = 2,
        weights: int | np.integer = 64,
        *,
        group: str | None = None,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.settings(rank, None, dropout, dtype)
        self.weights = checked_rank("TinyLoRA", weights, "number of weights")
        self.group = group

    def pool_name(self):
        """The name of the group."""
        return self.group

    def init_pool(self, sites, *, key):
        """One v."""
        del key
        dtype = jnp.result_type(*(self.dtype_of(site) for site in sites))
        return VectorPool(jnp.zeros(self.weights, dtype))

    def init(self, site, *, key, pool=None, data=None):
        """Singular vectors and random cores, whose weights are zero."""
        check_fits("TinyLoRA", self.rank, site)
        dtype = self.dtype_of(site)
        pair = _singular(site, self.rank, (0.5, 0.5), dtype)
        shape = (self.weights, self.rank, self.rank)
        matrices = jr.normal(key, shape, dtype) / self.rank**0.5
        weights = jnp.zeros(self.weights, dtype) if self.group is None else FromPool()
        return self.adapter(pair, Combination(weights, matrices), group=self.group)


class SVFit(CoreKind):
    """SVFit: the leading singular values of the weight, trained.

    With ``W = U Σ Vᵀ``: ``W' = W + U_r diag(σ − σ₀) V_rᵀ``, where ``σ (r,)`` starts as the
    r largest singular values ``σ₀`` and is trained, r numbers a matrix; the vectors are
    frozen, and the base stays as it is.

    Args:
        rank: how many singular values.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the arrays, by default that of each weight.

    Raises:
        ValueError: for a rank below 1, a dropout outside [0, 1); in :func:`lrjax.adapt`,
            for a rank above the smaller side of a matrix.

    Example:
        >>> import equinox as eqx, jax.numpy as jnp, jax, lrjax
        >>> model = {"kernel": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
        >>> svfit = lrjax.adapters.SVFit(rank=2)
        >>> lrjax.adapt(model, svfit, key=jax.random.key(0))["kernel"].core.tolist()
        [3.0, 2.0]

    Reference:
        C. Sun et al., "SVFit: parameter-efficient fine-tuning of large pre-trained models
        using singular values" (2024), arXiv:2409.05926. It is a LoRA-XS whose core is
        diagonal.
    """

    def __init__(
        self,
        rank: int | np.integer = 16,
        *,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.settings(rank, None, dropout, dtype)

    def init(self, site, *, key=None, pool=None, data=None):
        """Singular vectors, and the singular values twice: trained, and as the start."""
        check_fits("SVFit", self.rank, site)
        dtype = self.dtype_of(site)
        u, values, v = truncated_svd(site.read(), self.rank)
        values = values.astype(dtype)
        # A copy, so that a step that donates the values leaves their start alone.
        start = jnp.copy(values)
        return self.adapter(LowRank(u.astype(dtype), v.astype(dtype)), values, start=start)


class NoRA(CoreKind):
    """NoRA: LoRA inside the singular vectors of the weight, ``W' = W + s · B B' A' A``.

    ``B = U √Σ (out, outer)`` and ``A = √Σ Vᵀ (outer, in)`` from the weight are frozen,
    ``B' (outer, rank)`` from zero and ``A' (rank, outer)`` trained: ``2 · rank · outer``
    numbers a matrix. ``B B'`` and ``A' A`` are formed once a bind, so a call costs what
    LoRA's does.

    Args:
        rank: the width of the trained pair.
        outer: the number of singular vectors.
        alpha: the numerator of ``s = alpha / rank``, ``rank`` by default.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the arrays, by default that of each weight.

    Raises:
        ValueError: for a rank or ``outer`` below 1, a dropout outside [0, 1); in
            :func:`lrjax.adapt`, for ``outer`` above the smaller side of a matrix.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(6, 5, key=jax.random.key(0))
        >>> nora = lrjax.adapters.NoRA(rank=2, outer=4)
        >>> adapters = lrjax.adapt(model, nora, key=jax.random.key(1))
        >>> lrjax.partition(adapters)[0][""].core.shape
        (4, 4)

    Reference:
        C. Lin et al., "NoRA: nested low-rank adaptation for efficient fine-tuning large
        models" (2024), arXiv:2408.10280.
    """

    outer: int = eqx.field(static=True)

    def __init__(
        self,
        rank: int | np.integer = 8,
        outer: int | np.integer = 64,
        alpha: ArrayLike | None = None,
        *,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.settings(rank, alpha, dropout, dtype)
        self.outer = checked_rank("NoRA", outer)

    def init(self, site, *, key, pool=None, data=None):
        """Singular vectors, and between them a pair as LoRA's."""
        check_fits("NoRA", self.outer, site)
        dtype = self.dtype_of(site)
        pair = _singular(site, self.outer, (0.5, 0.5), dtype)
        inner = kaiming_uniform(key, (self.outer, self.rank), self.outer, dtype)
        return self.adapter(pair, LowRank(jnp.zeros_like(inner), inner))

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import ArrayLike

from ....lowrank import LowRank
from ...protocol import FactorPool
from .adapter import CoreKind, PairOfPool


class LoTR(CoreKind):
    """LoTR: one trained pair for many layers, and a core for each, a Tucker form of all.

    ``W'_l = W_l + s · B M_l A`` with ``B (out, r)`` and ``A (r, in)`` trained and shared,
    standard normal at first, ``M_l (r, r)`` of each matrix trained from zero, and
    ``s = alpha / rank``. So r² numbers a matrix and ``r (out + in)`` in all; a matrix
    smaller than the largest takes the first rows and columns. Layers under ``scan`` and
    members of a ``vmap`` share the pair as well.

    Args:
        rank: of the pair.
        alpha: the numerator of the scale, ``rank`` by default.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of pair and cores, by default the widest of the weights.
        group: the name of the pair: kinds of one name share one.

    Raises:
        ValueError: for a rank below 1, a dropout outside [0, 1).

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(16, 16, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.adapters.LoTR(2), key=jax.random.key(1))
        >>> sum(x.size for x in jax.tree.leaves(lrjax.partition(adapters)[0]))
        76

    Reference:
        D. Bershatsky et al., "LoTR: low tensor rank weight adaptation" (2024),
        arXiv:2402.01376. Of one layer it is a Tucker form with a core of zeros.
    """

    group: str = eqx.field(static=True)

    def __init__(
        self,
        rank: int | np.integer = 8,
        alpha: ArrayLike | None = None,
        *,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
        group: str = "LoTR",
    ):
        self.settings(rank, alpha, dropout, dtype)
        self.group = group

    def pool_name(self):
        """The name of the group."""
        return self.group

    def init_pool(self, sites, *, key):
        """Normal factors as large as the largest layer."""
        m, n = (max(site.shape[k] for site in sites) for k in (0, 1))
        dtype = jnp.result_type(*(self.dtype_of(site) for site in sites))
        k_left, k_right = jr.split(key)
        left = jr.normal(k_left, (m, self.rank), dtype)
        return FactorPool(LowRank(left, jr.normal(k_right, (n, self.rank), dtype)), "both")

    def init(self, site, *, key=None, pool=None, data=None):
        """A core of zeros."""
        assert isinstance(pool, FactorPool)  # made by init_pool
        core = jnp.zeros((self.rank,) * 2, pool.pair.dtype)
        return self.adapter(PairOfPool(site.shape, self.rank), core, group=self.group)

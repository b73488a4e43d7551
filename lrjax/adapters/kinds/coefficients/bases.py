import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float

from ....linalg import outer, working_dtype
from ....lowrank import LowRank
from ..._settings import as_dtype, as_number, as_rate, checked_dropout, checked_rank
from ...protocol import Adapter, AdapterKind, Added, BasisPool, trained


class Bases(Adapter):
    """Scalings of random bases, ``W' = W + scale · Σ_j B_j diag(ranks_j) A diag(gains_j)``.

    Or the transpose of the sum where there are fewer outputs than inputs: A and the gains
    belong to the smaller side. A and all ``B_j`` are those of the pool.

    Attributes:
        ranks: ``(*b, k, r)``, trained.
        gains: ``(*b, k, the smaller side)``, trained.
        scale: ``(*b,)``, frozen.
        sides: outputs and inputs.
        group: the name of the pool.
    """

    ranks: Float[Array, "*b k r"]
    gains: Float[Array, "*b k side"]
    scale: Float[Array, "*b"]
    rate: Float[Array, "*b"] | None
    sides: tuple[int, int] = eqx.field(static=True)
    group: str = eqx.field(static=True)

    @property
    def shape(self):
        """Outputs by inputs."""
        return (*self.scale.shape, *self.sides)

    def dropout_rate(self):
        """The rate."""
        return self.rate

    def pool_name(self):
        """The name of the pool."""
        return self.group

    def trainable(self):
        """All diagonals."""
        return trained(self, lambda adapter: (adapter.ranks, adapter.gains))

    def prepare(self, site, pool):
        """The dense sum: its rank is full, so thin factors would be no cheaper."""
        assert pool is not None  # bind and merge look it up by its name
        found = self.factors(pool.pool)
        assert found is not None
        pair, scale = found
        return Added(scale * outer(pair.left, pair.right))

    def factors(self, pool=None):
        """All ``B_j`` side by side, and the diagonals multiplied into copies of A."""
        if not isinstance(pool, BasisPool):
            return None
        (k, r), (small, large) = self.ranks.shape, sorted(self.sides)
        dtype = working_dtype(self.ranks.dtype)
        # Column i k + j of the pool is column i of B_j, which is the order of PEFT's files.
        wide = pool.wide[:large, : r * k].astype(dtype)
        narrow = pool.narrow[:small, :, None].astype(dtype) * self.ranks.T[None]
        narrow = (narrow * self.gains.T[:, None, :]).reshape(small, r * k)
        pair = LowRank(wide, narrow)
        return (pair if self.sides[1] == small else pair.T), self.scale


class RandLoRA(AdapterKind):
    """RandLoRA: a change of full rank, from diagonals between frozen random bases.

    ``W' = W + s · Σ_j B_j diag(λ_j) A diag(γ_j)`` for a weight with no more inputs than
    outputs, else the transpose of the sum; with n the smaller side, ``A (r, n)`` and the
    ``B_j`` of r columns are the first rows and columns of one set of random numbers for all
    adapters of the group, of mean zero and variance one. There are ``k = ⌈n / r⌉`` bases,
    ``λ (k, r)`` from zero and ``γ (k, n)`` from ``1/n`` are trained: ``k (r + n)`` numbers
    a matrix, the fewer the larger r. ``s = alpha / rank``.

    The dense sum is formed once a bind, in ``2 k r out in`` flops, and kept for its
    gradient. A call then has one dense product, as in full fine-tuning; what is saved is
    the state of the optimizer and the file. The bases are kept in bfloat16.

    Args:
        rank: r, of each base.
        alpha: the numerator of the scale, ``20 · rank`` by default.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the diagonals, by default that of each weight.
        group: the name of the bases: kinds of one name share them.

    Raises:
        ValueError: for a rank below 1 or a dropout outside [0, 1).

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(12, 9, key=jax.random.key(0))
        >>> kind = lrjax.adapters.RandLoRA(rank=4)
        >>> adapters = lrjax.adapt(model, kind, key=jax.random.key(1))
        >>> adapters[""].ranks.shape, adapters[""].gains.shape
        ((3, 4), (3, 9))

    Reference:
        P. Albert et al., "RandLoRA: full-rank parameter-efficient fine-tuning of large
        models" (2025), arXiv:2502.00987, as in PEFT. With one base, and
        more inputs than outputs, it is :class:`lrjax.VeRA`.
    """

    rank: int = eqx.field(static=True)
    alpha: ArrayLike
    dropout: ArrayLike | None
    dtype: DTypeLike | None = eqx.field(static=True)
    group: str = eqx.field(static=True)

    def __init__(
        self,
        rank: int | np.integer = 32,
        alpha: ArrayLike | None = None,
        *,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
        group: str = "RandLoRA",
    ):
        self.rank = checked_rank("RandLoRA", rank)
        self.alpha = 20.0 * self.rank if alpha is None else alpha
        self.dropout, self.dtype = checked_dropout("RandLoRA", dropout), dtype
        self.group = group

    def pool_name(self):
        """The name of the group."""
        return self.group

    def init_pool(self, sites, *, key):
        """Bases for the longest sides, uniform."""
        small, large = (max(side(site.shape) for site in sites) for side in (min, max))
        columns = self.rank * -(-small // self.rank)
        k_wide, k_narrow = jr.split(key)

        def drawn(key, *shape):
            x = jr.uniform(key, shape, jnp.float32, -(3**0.5), 3**0.5)
            return x.astype(jnp.bfloat16)

        return BasisPool(drawn(k_wide, large, columns), drawn(k_narrow, small, self.rank))

    def init(self, site, *, key=None, pool=None, data=None):
        """No change, and equal gains."""
        small, dtype = min(site.shape), as_dtype(self.dtype, site)
        count = -(-small // self.rank)
        return Bases(
            jnp.zeros((count, self.rank), dtype),
            jnp.full((count, small), 1 / small, dtype),
            as_number(self.alpha / self.rank, dtype),
            as_rate(self.dropout, dtype),
            site.shape,
            self.group,
        )

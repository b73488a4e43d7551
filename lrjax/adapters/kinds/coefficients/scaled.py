from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float

from ....lowrank import LowRank
from ..._settings import as_number, as_rate, checked_dropout, checked_rank, kaiming_uniform
from ...protocol import Adapter, AdapterKind, FactorPool, PoolRows, Product, trained


class Scaled(Adapter):
    """Scalings of shared factors, ``W' = W + scale · diag(outputs) B diag(ranks) A``.

    ``B`` and ``A`` are the first rows of the pool's factors.

    Attributes:
        outputs: ``(*b, out)``, trained.
        ranks: ``(*b, r)``, trained.
        scale: ``(*b,)``, frozen.
        inputs: the number of inputs.
        group: the name of the pool.
    """

    outputs: Float[Array, "*b out"]
    ranks: Float[Array, "*b r"]
    scale: Float[Array, "*b"]
    rate: Float[Array, "*b"] | None
    inputs: int = eqx.field(static=True)
    group: str = eqx.field(static=True)

    @property
    def shape(self):
        """Outputs by inputs."""
        return (*self.outputs.shape, self.inputs)

    def dropout_rate(self):
        """The rate."""
        return self.rate

    def pool_name(self):
        """The name of the pool."""
        return self.group

    def trainable(self):
        """Both vectors."""
        return trained(self, lambda adapter: (adapter.outputs, adapter.ranks))

    def prepare(self, site, pool):
        """The pool stays where it is: only the vectors belong to the layer."""
        assert pool is not None  # bind and merge look it up by its name
        rows = (self.outputs.shape[-1], self.inputs)
        core = self.scale * self.ranks
        return Product(PoolRows(pool, rows), core, self.outputs)

    def factors(self, pool=None):
        """The vectors multiplied into the left factor, with the pool."""
        if not isinstance(pool, FactorPool):
            return None
        left = pool.pair.left[: self.outputs.shape[-1]] * self.ranks[None, :]
        return LowRank(self.outputs[:, None] * left, pool.pair.right[: self.inputs]), (
            self.scale
        )


class _Pooled(AdapterKind):
    """The settings of both kinds below."""

    rank: int = eqx.field(static=True)
    scale: ArrayLike
    starts: tuple[ArrayLike, ArrayLike]  # of the outputs and of the ranks
    train: Literal["both", "none"] = eqx.field(static=True)
    group: str = eqx.field(static=True)
    dropout: ArrayLike | None
    dtype: DTypeLike | None = eqx.field(static=True)

    def pool_name(self):
        """The name of the group."""
        return self.group

    def init_pool(self, sites, *, key):
        """Factors as large as the largest layer; B is zero if it is trained."""
        m, n = (max(site.shape[k] for site in sites) for k in (0, 1))
        dtype = jnp.result_type(*(site.dtype for site in sites))
        dtype = dtype if self.dtype is None else jnp.dtype(self.dtype)
        k_right, k_left = jr.split(key)
        right = kaiming_uniform(k_right, (n, self.rank), n, dtype)
        if self.train == "both":
            left = jnp.zeros((m, self.rank), dtype)
        else:
            # The bound of a kaiming uniform start of slope 0: √6 by the inputs.
            right = 6**0.5 * right
            left = 6**0.5 * kaiming_uniform(k_left, (m, self.rank), self.rank, dtype)
        return FactorPool(LowRank(left, right), self.train)

    def init(self, site, *, key, pool, data=None):
        """The vectors at their starts."""
        assert isinstance(pool, FactorPool)  # made by init_pool
        dtype = pool.pair.dtype
        outputs, ranks = (
            jnp.full(size, start, dtype)
            for size, start in zip((site.shape[0], self.rank), self.starts, strict=True)
        )
        scale, rate = as_number(self.scale, dtype), as_rate(self.dropout, dtype)
        return Scaled(outputs, ranks, scale, rate, site.shape[1], self.group)


class VeRA(_Pooled):
    """Vector-based random matrix adaptation: one frozen random pair for the whole model.

    ``W' = W + diag(b) B diag(d) A`` with ``b (out,)`` from zero and ``d (r,)`` trained, so
    ``out + r`` numbers a matrix. ``B`` and ``A`` are the first rows and columns of one pair
    that all adapters of the group share; layers under ``scan`` and members of a ``vmap``
    share it as well.

    Args:
        rank: of the shared pair.
        d_initial: where d starts.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of pair and vectors, by default the widest of the weights.
        group: the name of the pair: kinds of one name share one.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.VeRA(rank=8), key=jax.random.key(1))
        >>> adapters.pools["VeRA"].pair.shape
        (16, 16)

    Reference:
        D. J. Kopiczko, T. Blankevoort, Y. M. Asano, "VeRA: vector-based random matrix
        adaptation" (2023), arXiv:2310.11454.
    """

    def __init__(
        self,
        rank: int | np.integer = 256,
        *,
        d_initial: ArrayLike = 0.1,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
        group: str = "VeRA",
    ):
        self.rank, self.scale = checked_rank("VeRA", rank), 1.0
        self.starts, self.train, self.group = (0.0, d_initial), "none", group
        self.dropout, self.dtype = checked_dropout("VeRA", dropout), dtype


class TiedLoRA(_Pooled):
    """Tied-LoRA: one trained pair for many layers, each with scalings of its own.

    ``W' = W + s · diag(v) B diag(u) A`` with ``B``, ``A`` shared and trained, ``v (out,)``
    and ``u (r,)`` of each layer from one. B starts at zero, so the model as it is. With a
    frozen pair it is :class:`lrjax.VeRA`.

    Args:
        rank: of the shared pair.
        alpha: the numerator of ``s = alpha / rank``, ``rank`` by default.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of pair and vectors, by default the widest of the weights.
        group: the name of the pair: kinds of one name share one.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.TiedLoRA(rank=2), key=jax.random.key(1))
        >>> params, frozen = lrjax.partition(adapters)
        >>> params.pools["TiedLoRA"].pair.shape
        (16, 16)

    Reference:
        A. Renduchintala, T. Konuk, O. Kuchaiev, "Tied-LoRA: enhancing parameter
        efficiency of LoRA with weight tying" (2023), arXiv:2311.09578.
    """

    def __init__(
        self,
        rank: int | np.integer = 8,
        alpha: ArrayLike | None = None,
        *,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
        group: str = "TiedLoRA",
    ):
        self.rank = checked_rank("TiedLoRA", rank)
        self.scale = 1.0 if alpha is None else alpha / rank
        self.starts, self.train, self.group = (1.0, 1.0), "both", group
        self.dropout, self.dtype = checked_dropout("TiedLoRA", dropout), dtype

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float

from ...._sites import Held, Site
from ....linalg import times
from ....lowrank import LowRank
from ..._settings import as_dtype, as_rate, checked_dropout, checked_rank, over_rank
from ...protocol import Adapter, AdapterKind, PoolRows, Product, trained


class FromPool(eqx.Module):
    """Stands where a part of an adapter is that of its pool; it has no leaves."""


class PairOfPool(FromPool):
    """The first rows of the factors of the pool.

    Attributes:
        rows: outputs and inputs.
        rank: the width.
    """

    rows: tuple[int, int] = eqx.field(static=True)
    rank: int = eqx.field(static=True)


class Combination(eqx.Module):
    """A core ``Σ_u weights_u · matrices_u`` of fixed matrices.

    Attributes:
        weights: ``(*b, u)``, trained, or those of the pool.
        matrices: ``(*b, u, r, r)``, frozen.
    """

    weights: Float[Array, "*b u"] | FromPool
    matrices: Float[Array, "*b u r r"]


class Core(Adapter):
    """A small trained core: ``W' = W + scale · left (core − start) rightᵀ``.

    Attributes:
        pair: ``left (*b, out, r)`` and ``right (*b, in, r)``, or those of the pool.
        core: ``(*b, r, r)``; or ``(*b, r)``, the diagonal; or a product of two thin
            factors; or a combination of fixed matrices.
        start: what the core started from, frozen, where that is no zero change.
        scale: ``(*b,)``, frozen.
        train: the ``"core"`` alone, or ``"all"``: the factors as well.
        group: the name of the pool, if there is one.
        positive: whether negative numbers of the core count as zeros.
    """

    pair: LowRank | PairOfPool
    core: Float[Array, "*b r r"] | Float[Array, "*b r"] | LowRank | Combination
    start: Float[Array, "..."] | None
    scale: Float[Array, "*b"]
    rate: Float[Array, "*b"] | None
    train: Literal["core", "all"] = eqx.field(static=True, default="core")
    group: str | None = eqx.field(static=True, default=None)
    positive: bool = eqx.field(static=True, default=False)

    @property
    def shape(self):
        """That of the product."""
        if isinstance(self.pair, PairOfPool):
            return (*self.scale.shape, *self.pair.rows)
        return self.pair.shape

    def dropout_rate(self):
        """The rate."""
        return self.rate

    def pool_name(self):
        """The name of the pool."""
        return self.group

    def trainable(self):
        """The core, of a combination the weights; and the factors, if all is trained."""
        combined = isinstance(self.core, Combination)
        core = lambda own: own.core.weights if combined else own.core
        return trained(self, core, *[lambda own: own.pair] * (self.train == "all"))

    def prepare(self, site, pool=None):
        """The scale goes into the core, and a core of two factors into the outer ones."""
        return self._product(pool)

    def _product(self, pool: Held | None) -> Product:
        pair = self.pair
        if isinstance(pair, PairOfPool):
            assert pool is not None  # bind and merge look it up by its name
            pair = PoolRows(pool, pair.rows)
        if isinstance(self.core, LowRank):
            left, right = (
                times(pair.left, self.core.left),
                times(pair.right, self.core.right),
            )
            return Product(LowRank(left, right), self.scale)
        core = _matrix(self.core, pool)
        core = jax.nn.relu(core) if self.positive else core
        core = core if self.start is None else core - self.start
        return Product(pair, self.scale * core)

    def factors(self, pool=None):
        """Scale and core multiplied into the left factor."""
        if self.group is not None and pool is None:
            return None
        left, right = self._product(None if pool is None else Held(pool)).folded()
        dtype = jnp.result_type(left, right)
        return LowRank(left.astype(dtype), right.astype(dtype)), jnp.ones((), dtype)


def _matrix(core: Array | Combination, pool: Held | None) -> Array:
    if not isinstance(core, Combination):
        return core
    weights = core.weights
    if isinstance(weights, FromPool):
        assert pool is not None  # bind and merge look it up by its name
        weights = pool.pool.vector
    return jnp.tensordot(weights, core.matrices, 1, precision="highest")


class CoreKind(AdapterKind):
    """The settings that all kinds with a core have."""

    rank: int = eqx.field(static=True)
    alpha: ArrayLike | None
    dropout: ArrayLike | None
    dtype: DTypeLike | None = eqx.field(static=True)

    def settings(
        self,
        rank: int | np.integer,
        alpha: ArrayLike | None,
        dropout: ArrayLike,
        dtype: DTypeLike | None,
    ) -> None:
        """Check them and set them, in ``__init__``."""
        name = type(self).__name__
        self.rank, self.alpha = checked_rank(name, rank), alpha
        self.dropout, self.dtype = checked_dropout(name, dropout), dtype

    def dtype_of(self, site: Site) -> Any:
        """That of the arrays of an adapter."""
        return as_dtype(self.dtype, site)

    def adapter(self, pair: Any, core: Any, **others: Any) -> Core:
        """The adapter with scale and rate, ``alpha / rank`` or one."""
        node = core.matrices if isinstance(core, Combination) else core
        scale = over_rank(self.alpha, self.rank, node.dtype)
        rate = as_rate(self.dropout, node.dtype)
        return Core(pair, core, others.pop("start", None), scale, rate, **others)

"""Kinds with frozen zeros: prefixes of the rank, and random masks of the factors."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Int, PRNGKeyArray

from ..._settings import as_number, checked_rank
from ...protocol import AdapterKind
from ._thinning import Thinning
from .pair import LoRA


class DyLoRA(AdapterKind):
    """Dynamic LoRA: one adapter that works at every rank, trained at random ones.

    ``W' = W + alpha / b · B[:, :b] A[:b]``: the factors of :class:`lrjax.LoRA` under a mask
    of their first b columns. :meth:`sample` draws b, anew in each step, and
    :func:`lrjax.adapters.with_ranks` puts it in place; b is a traced number, so that all
    ranks are one program. In the end any prefix serves.

    Args:
        rank: the largest rank R.
        alpha: the numerator of the scale, ``rank`` by default.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the factors, by default that of each weight.

    Raises:
        ValueError: for a rank below 1, a dropout outside [0, 1).

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> kind = lrjax.adapters.DyLoRA(rank=4)
        >>> adapters = lrjax.adapt(model, kind, key=jax.random.key(1))
        >>> @jax.jit
        ... def at_a_random_rank(adapters, key):
        ...     return lrjax.adapters.with_ranks(adapters, kind.sample(key))
        >>> ranks = lrjax.adapters.active_ranks(
        ...     at_a_random_rank(adapters, jax.random.key(2)))
        >>> len(set(map(int, ranks.values())))  # one rank for all layers
        1

    Reference:
        M. Valipour et al., "DyLoRA: parameter efficient tuning of pre-trained models using
        dynamic search-free low-rank adaptation" (2022), arXiv:2210.07558. At the largest
        rank it is LoRA.
    """

    kind: LoRA

    def __init__(
        self,
        rank: int | np.integer = 8,
        alpha: ArrayLike | None = None,
        *,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.kind = LoRA(rank, alpha, dropout=dropout, dtype=dtype)

    def init(self, site, *, key, pool=None, data=None):
        """LoRA's factors under a mask of ones."""
        adapter = self.kind.init(site, key=key)
        mask = as_number(jnp.ones(self.kind.rank), adapter.pair.dtype)
        return dataclasses.replace(adapter, mask=mask)

    def sample(self, key: PRNGKeyArray) -> Int[Array, ""]:
        """A rank from 1 to R, each with the same probability."""
        return jr.randint(key, (), 1, self.kind.rank + 1)


class NLS(AdapterKind):
    """Neural low-rank search: an adapter trained at a few ranks, to choose from later.

    ``W' = W + alpha / R · B[:, :b] A[:b]``: as in :class:`lrjax.adapters.DyLoRA`, but the
    scale does not follow b, and b is one of few ranks. In each step every group of layers
    draws its own, ``with_ranks(adapters, {path: kind.sample(key)})``. In the end all have
    the middle rank, or the largest, or are searched.

    Args:
        ranks: those to choose from; the factors have the largest, R.
        alpha: the numerator of the scale, R by default.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the factors, by default that of each weight.

    Raises:
        ValueError: for no ranks, a rank below 1, a dropout outside [0, 1).

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> kind = lrjax.adapters.NLS(ranks=(4, 3, 2))
        >>> adapters = lrjax.adapt(model, kind, key=jax.random.key(1))
        >>> middle = lrjax.adapters.with_ranks(adapters, kind.middle)
        >>> lrjax.adapters.active_ranks(middle)["layers.0"].item()
        3

    Reference:
        J. P. Muñoz, J. Yuan, N. Jain, "Low-rank adapters meet neural architecture search
        for LLM compression" (2025), arXiv:2501.16372. At the largest rank it is LoRA.
    """

    kind: LoRA
    ranks: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        ranks: tuple[int, ...] = (32, 24, 16),
        alpha: ArrayLike | None = None,
        *,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.ranks = tuple(sorted((checked_rank("NLS", r) for r in ranks), reverse=True))
        if not self.ranks:
            raise ValueError("NLS needs ranks to choose from, as in ranks=(32, 24, 16).")
        self.kind = LoRA(self.ranks[0], alpha, dropout=dropout, dtype=dtype)

    def init(self, site, *, key, pool=None, data=None):
        """LoRA's factors under a mask of ones, their scale once and for all."""
        adapter = self.kind.init(site, key=key)
        mask = as_number(jnp.ones(self.kind.rank), adapter.pair.dtype)
        return dataclasses.replace(adapter, mask=mask, power=0.0)

    def sample(self, key: PRNGKeyArray) -> Int[Array, ""]:
        """One of the ranks, each with the same probability."""
        return jr.choice(key, jnp.array(self.ranks))

    @property
    def middle(self) -> int:
        """The rank in the middle, which needs no search."""
        return self.ranks[len(self.ranks) // 2]


class CapaBoost(AdapterKind):
    """Several random masks of one pair: a higher rank from the same numbers.

    ``W' = W + s · Σ_k (B ⊙ M_k)(A ⊙ N_k)`` over d copies, with fixed random masks of zeros
    and ones and ``s = alpha / rank``. So the change has rank up to d·r, and there are no
    more numbers than LoRA has. Masks are made anew from a seed in each ``bind``; in a call
    there are d·r columns.

    Args:
        rank: of the pair.
        alpha: the numerator of the scale, ``rank`` by default.
        copies: d.
        density: the probability of a one in a mask.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the factors, by default that of each weight.

    Raises:
        ValueError: for a rank or a number of copies below 1, a density outside (0, 1], a
            dropout outside [0, 1).

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> layer = eqx.nn.Linear(16, 16, key=jax.random.key(0))
        >>> kind = lrjax.adapters.CapaBoost(rank=2, copies=3)
        >>> adapters = lrjax.adapt(layer, kind, key=jax.random.key(1))
        >>> ones = lrjax.LowRank(jnp.ones((16, 2)), jnp.ones((16, 2)))
        >>> moved = eqx.tree_at(lambda a: a.layers[""].pair, adapters, ones)
        >>> change = lrjax.merge(layer, moved).weight - layer.weight
        >>> jnp.linalg.matrix_rank(change, rtol=1e-4).item()
        6

    Reference:
        H. Song et al., "Increasing model capacity for free: a simple strategy for
        parameter efficient fine-tuning" (2024), arXiv:2407.01320. With one copy of
        density 1 it is LoRA.
    """

    kind: LoRA
    copies: int = eqx.field(static=True)
    density: ArrayLike

    def __init__(
        self,
        rank: int | np.integer = 8,
        alpha: ArrayLike | None = None,
        *,
        copies: int | np.integer = 2,
        density: ArrayLike = 0.5,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.kind = LoRA(rank, alpha, dropout=dropout, dtype=dtype)
        if (
            isinstance(copies, bool)
            or not isinstance(copies, (int, np.integer))
            or (copies < 1)
        ):
            raise ValueError(f"CapaBoost needs at least one copy (an int), got {copies!r}.")
        if not isinstance(density, Tracer) and not 0 < np.asarray(density) <= 1:
            raise ValueError(f"CapaBoost's density must be in (0, 1], got {density!r}.")
        self.copies, self.density = int(copies), density

    def init(self, site, *, key, pool=None, data=None):
        """LoRA's factors and a seed."""
        key, own = jr.split(key)
        adapter = self.kind.init(site, key=key)
        density = as_number(self.density, adapter.pair.dtype)
        seed = jr.bits(own, (2,), jnp.uint32)
        return dataclasses.replace(adapter, thinning=Thinning(seed, density, self.copies))

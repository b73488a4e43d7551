"""Kinds whose rank is found in training: a trained gate between the factors."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import ArrayLike

from ....lowrank import LowRank
from ..._settings import (
    as_dtype,
    as_number,
    as_rate,
    checked_dropout,
    checked_rank,
    over_rank,
)
from ...protocol import AdapterKind
from .pair import Factors, LoRA


class AdaLoRA(AdapterKind):
    """Triplets in the form of a singular value decomposition: ``W' = W + s · B diag(E) A``.

    ``B (out, r)`` and ``A (r, in)`` start normal with standard deviation 0.02, ``E (r,)``
    at zero, all of them trained, and ``s = alpha / (r + 1e-5)`` with the rank of the
    start, whatever is pruned later. The triplets are pruned by
    :func:`lrjax.adapters.prune_ranks` around the optimizer; A and B are kept next to
    orthonormal by :func:`lrjax.adapters.orthogonality` in the loss.

    Args:
        rank: the number of triplets at the start, larger than that wanted in the end.
        alpha: the numerator of the scale, ``rank`` by default.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the arrays, by default that of each weight.

    Raises:
        ValueError: for a rank below 1, a dropout outside [0, 1).

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(
        ...     model, lrjax.adapters.AdaLoRA(rank=4), key=jax.random.key(1))
        >>> adapters["layers.0"].gate.tolist()
        [0.0, 0.0, 0.0, 0.0]

    Reference:
        Q. Zhang et al., "AdaLoRA: adaptive budget allocation for parameter-efficient
        fine-tuning" (2023), arXiv:2303.10512. With ``E = 1`` it is LoRA.
    """

    rank: int = eqx.field(static=True)
    alpha: ArrayLike | None
    dropout: ArrayLike | None
    dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(
        self,
        rank: int | np.integer = 12,
        alpha: ArrayLike | None = None,
        *,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.rank, self.alpha = checked_rank("AdaLoRA", rank), alpha
        self.dropout, self.dtype = checked_dropout("AdaLoRA", dropout), dtype

    def init(self, site, *, key, pool=None, data=None):
        """Random factors around a zero gate."""
        (m, n), keys = site.shape, jr.split(key)
        dtype = as_dtype(self.dtype, site)
        pair = LowRank(
            *(
                0.02 * jr.normal(k, (size, self.rank), dtype)
                for k, size in zip(keys, (m, n), strict=True)
            )
        )
        alpha = self.rank if self.alpha is None else self.alpha
        scale = as_number(alpha / (self.rank + 1e-5), dtype)
        rate = as_rate(self.dropout, dtype)
        gate = jnp.zeros(self.rank, dtype)
        return Factors(pair, None, scale, rate, "both", gate=gate)


class SoRA(AdapterKind):
    """Sparse low-rank adaptation: ``W' = W + s · B diag(g) A`` with a gate to be thinned.

    The factors and the scale are those of :class:`lrjax.LoRA`, and ``g (r,)`` starts
    standard normal, so that the model starts as it is. A proximal step after each step of
    the optimizer, :func:`lrjax.shrink` on the gate, makes entries of it zero;
    :func:`lrjax.adapters.drop_ranks` takes their columns out in the end.

    Args:
        rank: of the factors at the start.
        alpha: the numerator of ``s = alpha / rank``, ``rank`` by default.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the arrays, by default that of each weight.

    Raises:
        ValueError: for a rank below 1, a dropout outside [0, 1).

    Example:
        >>> import equinox as eqx, jax, lrjax, optax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(
        ...     model, lrjax.adapters.SoRA(rank=4), key=jax.random.key(1))
        >>> params, frozen = lrjax.partition(adapters)
        >>> prox = optax.masked(lrjax.shrink(3e-4), lrjax.adapters.gates)
        >>> state = optax.chain(optax.adamw(8e-4), prox).init(params)

    Reference:
        N. Ding et al., "Sparse low-rank adaptation of pre-trained language models"
        (2023), arXiv:2311.11696. With ``g = 1`` it is LoRA.
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
        """LoRA's factors around a random gate."""
        key, own = jr.split(key)
        adapter = self.kind.init(site, key=key)
        gate = jr.normal(own, (self.kind.rank,), adapter.pair.dtype)
        return dataclasses.replace(adapter, gate=gate)


RESERVE = 1e-5  # what a column in reserve counts, next to one in use


class IncreLoRA(AdapterKind):
    """Triplets of which few are in use at first: ``W' = W + s · B diag(E) A``, growing.

    As :class:`lrjax.adapters.AdaLoRA`, under a mask: ``E`` is trained of the columns in
    use, the next ones are in reserve, where their factors are trained behind a gate of
    1e-5, and all behind these wait. :func:`lrjax.adapters.grow_ranks` puts columns into
    use, in the same shapes. The scale is ``alpha / (ranks in use + 1e-5)`` and falls.

    Args:
        rank: the largest rank that a matrix may come to.
        alpha: the numerator of the scale, ``rank`` by default.
        start: how many columns are in use at the start.
        reserve: how many are in reserve: as many as a matrix grows by at once.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the arrays, by default that of each weight.

    Raises:
        ValueError: for a rank below 1, more columns at the start and in reserve than there
            are, a dropout outside [0, 1).

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(6, 5, key=jax.random.key(0))
        >>> kind = lrjax.adapters.IncreLoRA(rank=4)
        >>> adapters = lrjax.adapt(model, kind, key=jax.random.key(1))
        >>> print(adapters[""].mask)
        [1.e+00 1.e-05 0.e+00 0.e+00]

    Reference:
        F. Zhang et al., "IncreLoRA: incremental parameter allocation method for
        parameter-efficient fine-tuning" (2023), arXiv:2308.12043.
    """

    kind: AdaLoRA
    start: int = eqx.field(static=True)
    reserve: int = eqx.field(static=True)

    def __init__(
        self,
        rank: int | np.integer = 16,
        alpha: ArrayLike | None = None,
        *,
        start: int = 1,
        reserve: int = 1,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.kind = AdaLoRA(rank, alpha, dropout=dropout, dtype=dtype)
        if start < 1 or reserve < 0 or start + reserve > self.kind.rank:
            raise ValueError(
                f"IncreLoRA needs a rank of start + reserve at least, and start >= 1: got "
                f"rank={rank}, start={start}, reserve={reserve}."
            )
        self.start, self.reserve = start, reserve

    def init(self, site, *, key, pool=None, data=None):
        """AdaLoRA's triplets, most of them behind a mask."""
        adapter, rank = self.kind.init(site, key=key), self.kind.rank
        index, dtype = jnp.arange(rank), adapter.pair.dtype
        held = jnp.where(index < self.start + self.reserve, RESERVE, 0.0)
        mask = as_number(jnp.where(index < self.start, 1.0, held), dtype)
        gate = jnp.where(index < self.start, 0.0, 1.0).astype(dtype)
        # The mask counts what is in reserve: the 1e-5 of the denominator.
        scale = over_rank(self.kind.alpha, rank, dtype)
        return dataclasses.replace(adapter, gate=gate, mask=mask, scale=scale)

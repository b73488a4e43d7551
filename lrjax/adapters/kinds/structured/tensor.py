import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float

from ....linalg import times, truncated_svd
from ....lowrank import LowRank
from ..._settings import as_dtype, as_number, as_rate, checked_dropout, checked_rank
from ...protocol import Adapter, AdapterKind, Product, Ready, trained


class Tensor(Adapter):
    """A network of small tensors: ``W' = W + scale · (T(parts) − T(start))``.

    Without a start it is a Tucker form: a core ``(r_1, …, r_d)``, a matrix ``(n_k, r_k)``
    for each axis of the kernel, those of the outputs first. With one it is a tensor train:
    ``(r_k, out_k, in_k, r_k+1)`` one after the other.

    Attributes:
        parts: the tensors, ``(*b, …)`` each, trained.
        start: those that it started from, frozen.
        scale: ``(*b,)``, frozen.
        sides: outputs and inputs.
        out_axes: how many axes of the kernel make the outputs, in a Tucker form.
    """

    parts: tuple[Array, ...]
    start: tuple[Array, ...] | None
    scale: Float[Array, "*b"]
    rate: Float[Array, "*b"] | None
    sides: tuple[int, int] = eqx.field(static=True)
    out_axes: int = eqx.field(static=True)

    @property
    def shape(self):
        """Outputs by inputs."""
        return (*self.scale.shape, *self.sides)

    def dropout_rate(self):
        """The rate."""
        return self.rate

    def trainable(self):
        """The tensors."""
        return trained(self, lambda adapter: adapter.parts)

    def prepare(self, site, pool=None):
        """Of a Tucker form two thin factors, once; a train is contracted in the calls."""
        if self.start is not None:
            return Contracted(self.parts, self.start, self.scale, self.sides)
        return Product(self._thin(*self.parts), self.scale)

    def factors(self, pool=None):
        """Those of a Tucker form, as wide as the core is on the side of the outputs."""
        if self.start is not None:
            return None
        thin = self._thin
        for _ in self.scale.shape:
            thin = jax.vmap(thin)
        return thin(*self.parts), self.scale

    def _thin(self, core: Array, *factors: Array) -> LowRank:
        """``B`` and ``(A ⊗ U ⊗ …) Gᵀ``, with the core unfolded along the outputs."""
        kron = lambda matrices: functools.reduce(jnp.kron, matrices)
        left, right = kron(factors[: self.out_axes]), kron(factors[self.out_axes :])
        return LowRank(left, times(right, core.reshape(left.shape[1], -1).T))


class Contracted(Ready):
    """``W' = W + scale · (T(parts) − T(start))`` of tensor trains, dense."""

    parts: tuple[Array, ...]
    start: tuple[Array, ...]
    scale: Array
    sides: tuple[int, int] = eqx.field(static=True)

    def weight(self, base):
        """``W`` and the difference of both contractions."""
        new, old = (
            contract([x.astype(base.dtype) for x in train]).reshape(self.sides)
            for train in (self.parts, self.start)
        )
        return base + self.scale.astype(base.dtype) * (new - old)


def contract(train: list[Array]) -> Array:
    """The matrix ``(out, in)`` of a train ``(r_k, out_k, in_k, r_k+1)``."""
    total = train[0]
    for part in train[1:]:
        total = jnp.einsum("aoib,bpjc->aopijc", total, part, precision="highest")
        total = total.reshape(1, *(math.prod(total.shape[k : k + 2]) for k in (1, 3)), -1)
    return total[0, :, :, 0]


def train_of(matrix: Array, rows: tuple[int, ...], cols: tuple[int, ...], rank: int):
    """The tensor train of a matrix by successive truncated SVDs (Oseledets, 2011)."""
    count = len(rows)
    order = [axis for k in range(count) for axis in (k, count + k)]
    rest, parts, bond = matrix.reshape(*rows, *cols).transpose(order), [], 1
    for m, n in zip(rows[:-1], cols[:-1], strict=True):
        rest = rest.reshape(bond * m * n, -1)
        u, values, v = truncated_svd(rest, min(rank, *rest.shape))
        parts.append(u.reshape(bond, m, n, -1))
        rest, bond = (v * values[None, :]).T, len(values)
    return (*parts, rest.reshape(bond, rows[-1], cols[-1], 1))


class Tucker(AdapterKind):
    """A low-rank core space of a kernel with any number of axes: a Tucker form (FLoRA).

    ``W' = W + s · G ×₁ B ×₂ A ×₃ U ×₄ V`` for a kernel ``(out, in, height, width)``, with
    a core ``G (r, r, r', r')`` from zero and a matrix for each axis; of a linear layer
    ``W + s · B G Aᵀ``; of an array the axes that ``axes=`` names. As many numbers as core
    and matrices have; no rank is above its axis. Once a bind the core is multiplied into
    the factors of the inputs, so a call is that of LoRA: one thin convolution and a 1×1.

    Args:
        rank: r, of the outputs and the inputs.
        taps: r', of the spatial axes.
        scale: s.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of core and factors, by default that of each weight.

    Raises:
        ValueError: for ranks below 1 or a dropout outside [0, 1).

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Conv2d(6, 8, 3, key=jax.random.key(0))
        >>> kind, where = lrjax.adapters.Tucker(rank=4), lambda path, layer: True
        >>> adapters = lrjax.adapt(model, kind, where=where, key=jax.random.key(1))
        >>> [part.shape for part in adapters[""].parts]
        [(4, 4, 2, 2), (8, 4), (6, 4), (3, 2), (3, 2)]

    Reference:
        C. Si et al., "FLoRA: low-rank core space for n-dimension" (2024), arXiv:2405.14739.
    """

    rank: int = eqx.field(static=True)
    taps: int = eqx.field(static=True)
    scale: ArrayLike
    dropout: ArrayLike | None
    dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(
        self,
        rank: int | np.integer = 16,
        *,
        taps: int | np.integer = 2,
        scale: ArrayLike = 4.0,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.rank, self.taps = checked_rank("Tucker", rank), checked_rank("Tucker", taps)
        self.scale, self.dropout = scale, checked_dropout("Tucker", dropout)
        self.dtype = dtype

    def init(self, site, *, key, pool=None, data=None):
        """A core of zeros, normal factors."""
        dtype, (rows, cols) = as_dtype(self.dtype, site), site.kernel_shape
        spatial = len(rows + cols) - 2 if site.kind == "conv" else 0
        most = [self.rank] * (len(rows + cols) - spatial) + [self.taps] * spatial
        ranks = [min(pair) for pair in zip(most, rows + cols, strict=True)]
        factors = (
            math.sqrt(0.5 / r) * jr.normal(k, (n, r), dtype)
            for k, n, r in zip(jr.split(key, len(ranks)), rows + cols, ranks, strict=True)
        )
        parts = (jnp.zeros(ranks, dtype), *factors)
        scale, rate = as_number(self.scale, dtype), as_rate(self.dropout, dtype)
        return Tensor(parts, None, scale, rate, site.shape, len(rows))


class DoTA(AdapterKind):
    """Weight-decomposed tensor adaptation: a tensor train of the weight itself is trained.

    ``W' = W + T(cores) − T(cores₀)`` with the matrix product operator
    ``T = Π_k C_k``, ``C_k (r_k, out_k, in_k, r_k+1)``, of sides split into
    ``out = Π out_k`` and ``in = Π in_k``. The cores start from the truncated decomposition
    of W, and a frozen copy is taken off: the model starts as the model, and the base stays
    as it is. The dense matrix is formed in each call.

    Args:
        rank: the largest bond r_k.
        cores: into how many factors each side is split, as near to each other as they go.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the cores, by default that of each weight.

    Raises:
        ValueError: for a rank below 1, less than two cores, a dropout outside [0, 1).

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(12, 8, key=jax.random.key(0))
        >>> kind = lrjax.adapters.DoTA(rank=2, cores=2)
        >>> adapters = lrjax.adapt(model, kind, key=jax.random.key(1))
        >>> [part.shape for part in adapters[""].parts]
        [(1, 2, 3, 2), (2, 4, 4, 1)]

    Reference:
        X. Hu et al., "DoTA: weight-decomposed tensor adaptation for large language
        models" (2024), arXiv:2412.20891; the decomposition: I. Oseledets, "Tensor-train
        decomposition" (2011), SIAM Journal on Scientific Computing.
    """

    rank: int = eqx.field(static=True)
    cores: int = eqx.field(static=True)
    dropout: ArrayLike | None
    dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(
        self,
        rank: int | np.integer = 8,
        *,
        cores: int = 3,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        if cores < 2:
            raise ValueError(f"DoTA needs at least two cores, got {cores}.")
        self.rank, self.cores = checked_rank("DoTA", rank), cores
        self.dropout, self.dtype = checked_dropout("DoTA", dropout), dtype

    def init(self, site, *, key=None, pool=None, data=None):
        """The train of the weight, and a copy of it."""
        dtype = as_dtype(self.dtype, site)
        rows, cols = (divided(side, self.cores) for side in site.shape)
        train: Any = train_of(site.read(), rows, cols, self.rank)
        parts = tuple(part.astype(dtype) for part in train)
        # Copies, so that a step that donates the cores leaves their start alone.
        start, one = jax.tree.map(jnp.copy, parts), as_number(1.0, dtype)
        rate = as_rate(self.dropout, dtype)
        return Tensor(parts, start, one, rate, site.shape, 0)


def divided(side: int, count: int) -> tuple[int, ...]:
    """Factors of a side, the smaller ones first, each as near to the root as it goes."""
    if count == 1:
        return (side,)
    root = round(side ** (1 / count))
    first = max(d for d in range(1, root + 1) if side % d == 0)
    return (first, *divided(side // first, count - 1))

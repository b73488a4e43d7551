import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float

from ...._dense import dense
from ....lowrank import LowRank, is_low_rank
from ..._settings import (
    as_dtype,
    as_rate,
    checked_dropout,
    checked_rank,
    kaiming_uniform,
    over_rank,
)
from ...protocol import Adapter, AdapterKind, Structured, trained


class Kronecker(Adapter):
    """A Kronecker product: ``W' = W + scale · outer ⊗ inner``.

    Attributes:
        outer: ``(*b, l, k)``, a matrix or factors, trained.
        inner: ``(*b, m, n)``, a matrix or factors, trained; W has ``l m`` outputs and
            ``k n`` inputs.
        scale: ``(*b,)``, frozen.
    """

    outer: Any
    inner: Any
    scale: Float[Array, "*b"]
    rate: Float[Array, "*b"] | None

    @property
    def shape(self):
        """That of the product."""
        *lead, rows, cols = self.outer.shape
        return (*lead, rows * self.inner.shape[-2], cols * self.inner.shape[-1])

    def dropout_rate(self):
        """The rate."""
        return self.rate

    def trainable(self):
        """Both sides of the product."""
        return trained(self, lambda adapter: (adapter.outer, adapter.inner))

    def prepare(self, site, pool=None):
        """Nothing to prepare."""
        return KroneckerProduct(self.outer, self.inner, self.scale)


class KroneckerProduct(Structured):
    """``W' = W + scale · outer ⊗ inner``, with a vector as a small matrix between both."""

    outer: Any
    inner: Any
    scale: Array

    def delta(self):
        """The dense product."""
        return self.scale * jnp.kron(*map(_matrix, (self.outer, self.inner)))

    def act(self, x):
        """``(outer ⊗ inner) vec X = vec(outer X innerᵀ)`` with ``X (k, n)``."""
        shape = (*x.shape[:-1], self.outer.shape[1], self.inner.shape[1])
        h = _apply(self.inner, x.reshape(shape)).swapaxes(-1, -2)
        y = _apply(self.outer, self.scale.astype(h.dtype) * h).swapaxes(-1, -2)
        return y.reshape(*x.shape[:-1], -1)

    def change(self, site, x):
        """Of a lookup one column: that of a product is the product of columns."""
        if site.kind != "lookup":
            return super().change(site, x)
        i, j = jnp.divmod(x, self.inner.shape[1])
        y = _column(self.outer, i)[:, None] * _column(self.inner, j)[None, :]
        return self.scale * y.reshape(-1)


def _matrix(side: Any) -> Array:
    return side.materialize() if is_low_rank(side) else side


def _apply(side: Any, x: Array) -> Array:
    """``side x``, in its own dtype."""
    if not is_low_rank(side):
        return dense(x.astype(side.dtype), side)
    return dense(dense(x.astype(side.dtype), side.right.T), side.left)


def _column(side: Any, index: Array) -> Array:
    return side.left @ side.right[index] if is_low_rank(side) else side[:, index]


class LoKr(AdapterKind):
    """Low-rank Kronecker product adaptation: ``W' = W + s · A ⊗ B``.

    ``W (l m, k n)``, ``A (l, k)`` from zero, ``B (m, n)`` uniform in ``±1/√n`` and
    ``s = alpha / rank``. A side is split into two factors near its square root, the smaller
    for A (of a convolution the input channels; its taps go to B). Where the rank is less
    than half the longer side of B, B is a product of factors of that rank. The Kronecker
    product is never formed in a call: ``(A ⊗ B) x`` is ``A X Bᵀ`` of the vector as a
    matrix ``X (k, n)``.

    Args:
        rank: of B.
        alpha: the numerator of the scale, ``rank`` by default.
        factor: the size of A's sides in place of the square root, where it divides those of
            the matrix; else A takes the largest divisors up to it.
        both: whether A is a product of factors too, on the same condition.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of A and B, by default that of each weight.

    Raises:
        ValueError: for a rank or a factor below 1 or a dropout outside [0, 1).

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(12, 8, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.adapters.LoKr(1), key=jax.random.key(1))
        >>> adapters[""].outer.shape, adapters[""].inner.shape
        ((2, 3), (4, 4))

    Reference:
        S.-Y. Yeh et al., "Navigating text-to-image customization: from LyCORIS
        fine-tuning to model evaluation" (2023), arXiv:2309.14859; A. Edalati et al.,
        "KronA: parameter efficient tuning with Kronecker adapter" (2022),
        arXiv:2212.10650, where no side is a product of factors.
    """

    rank: int = eqx.field(static=True)
    alpha: ArrayLike | None
    factor: int | None = eqx.field(static=True)
    both: bool = eqx.field(static=True)
    dropout: ArrayLike | None
    dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(
        self,
        rank: int | np.integer = 8,
        alpha: ArrayLike | None = None,
        *,
        factor: int | None = None,
        both: bool = False,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        if factor is not None and factor < 1:
            raise ValueError(f"LoKr's factor must be at least 1, or None, got {factor}.")
        self.rank, self.alpha = checked_rank("LoKr", rank), alpha
        self.factor, self.both = factor, both
        self.dropout, self.dtype = checked_dropout("LoKr", dropout), dtype

    def init(self, site, *, key, pool=None, data=None):
        """A is zero, B random."""
        dtype, r = as_dtype(self.dtype, site), self.rank
        taps = math.prod(site.kernel_shape[1][1:]) if site.kind == "conv" else 1
        (rows, m), (cols, n) = (
            split(side, self.factor) for side in (site.shape[0], site.shape[1] // taps)
        )
        keys, n_taps = jr.split(key, 3), n * taps
        outer: Any = jnp.zeros((rows, cols), dtype)
        if self.both and 2 * r < max(rows, cols):
            right = kaiming_uniform(keys[0], (cols, r), cols, dtype)
            outer = LowRank(jnp.zeros((rows, r), dtype), right)
        if 2 * r < max(m, n):
            left = kaiming_uniform(keys[1], (m, r), r, dtype)
            inner: Any = LowRank(left, kaiming_uniform(keys[2], (n_taps, r), n_taps, dtype))
        else:
            inner = kaiming_uniform(keys[1], (m, n_taps), n_taps, dtype)
        scale = over_rank(self.alpha, r, dtype)
        return Kronecker(outer, inner, scale, as_rate(self.dropout, dtype))


def split(side: int, factor: int | None) -> tuple[int, int]:
    """Two factors of a side: the given one, or the largest up to it and the root."""
    if factor is not None and side % factor == 0:
        return factor, side // factor
    most = min(math.isqrt(side), side if factor is None else factor)
    small = max(d for d in range(1, most + 1) if side % d == 0)
    return small, side // small

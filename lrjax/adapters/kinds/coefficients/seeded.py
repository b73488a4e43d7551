import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, UInt

from ....lowrank import LowRank
from ..._settings import (
    as_dtype,
    as_rate,
    checked_dropout,
    checked_rank,
    kaiming_uniform,
    over_rank,
)
from ...protocol import Adapter, AdapterKind, Product, trained


class Seeded(Adapter):
    """Factors out of random bases that only a seed is kept of.

    ``W' = W + scale · B A`` with ``B = Σ_j left_j B_j`` and ``A = A₀ + Σ_j right_j A_j``.

    Attributes:
        left: ``(*b, k)``, trained.
        right: ``(*b, k)``, trained.
        key_data: of a key, ``(*b, 2)``: what A₀ and all A_j and B_j come from.
        scale: ``(*b,)``, frozen.
        sizes: outputs, inputs and rank.
    """

    left: Float[Array, "*b k"]
    right: Float[Array, "*b k"]
    key_data: UInt[Array, "*b 2"]
    scale: Float[Array, "*b"]
    rate: Float[Array, "*b"] | None
    sizes: tuple[int, int, int] = eqx.field(static=True)

    @property
    def shape(self):
        """Outputs by inputs."""
        return (*self.scale.shape, *self.sizes[:2])

    def dropout_rate(self):
        """The rate."""
        return self.rate

    def trainable(self):
        """The weights of the bases."""
        return trained(self, lambda adapter: (adapter.left, adapter.right))

    def prepare(self, site, pool=None):
        """Both factors, from the seed."""
        return Product(*self.factors())

    def factors(self, pool=None):
        """The sums of the bases."""
        m, n, rank = self.sizes
        key = jr.wrap_key_data(self.key_data, impl="threefry2x32")
        k_left, k_right, k_start = jr.split(key, 3)
        left = combined(self.left, k_left, (m, rank))
        right = kaiming_uniform(k_start, (n, rank), n, self.right.dtype)
        return LowRank(left, right + combined(self.right, k_right, (n, rank))), self.scale


CHUNK = 16  # bases that are there at one time


def combined(
    weights: Float[Array, " k"], key: PRNGKeyArray, shape: tuple[int, int]
) -> Float[Array, "size r"]:
    """``Σ_j weights_j · M_j`` with ``M_j`` uniform in ``±1/√k``, made anew where needed.

    In the forward pass and in the derivative alike: of the matrices no more than a few
    are there at a time, and none is kept for the way back.
    """
    count = len(weights)
    chunks = -(-count // CHUNK)
    padded = jnp.pad(weights, (0, chunks * CHUNK - count)).reshape(chunks, CHUNK)
    bound = 1 / math.sqrt(count)

    @jax.checkpoint
    def part(index, weights):
        draw = lambda k: jr.uniform(k, (CHUNK, *shape), weights.dtype, -bound, bound)
        return jnp.tensordot(weights, draw(jr.fold_in(key, index)), 1)

    def add(total, item):
        return total + part(*item), None

    start = jnp.zeros(shape, weights.dtype)
    return lax.scan(add, start, (jnp.arange(chunks), padded))[0]


class NOLA(AdapterKind):
    """NOLA: LoRA's factors as combinations of random bases, of which a seed is stored.

    ``W' = W + s · B A`` with ``B = Σ_j b_j B_j`` and ``A = A₀ + Σ_j a_j A_j``, where the
    entries of ``B_j (out, r)`` and ``A_j (r, in)`` are uniform in ``±1/√k``, and those of
    ``A₀`` as LoRA's start. ``a (k,)`` and ``b (k,)`` are trained from zero: 2k numbers a
    matrix, whatever its size and rank. The bases are made anew from the seed in every
    bind, and again for its gradient: ``2 k r (out + in)`` flops and as many random
    numbers, but no memory.

    Args:
        rank: of the factors.
        bases: k, how many there are for each factor.
        alpha: the numerator of ``s = alpha / rank``, ``rank`` by default.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the weights of the bases, by default that of each weight.

    Raises:
        ValueError: for a rank or number of bases below 1, a dropout outside [0, 1).

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(64, 64, key=jax.random.key(0))
        >>> nola = lrjax.adapters.NOLA(rank=4, bases=20)
        >>> adapters = lrjax.adapt(model, nola, key=jax.random.key(1))
        >>> sum(x.size for x in jax.tree.leaves(lrjax.partition(adapters)[0]))
        40

    Reference:
        S. A. Koohpayegani, N. L. Kalibhat, H. Pirsiavash et al., "NOLA: compressing LoRA
        using linear combination of random basis" (2023), arXiv:2310.02556.
    """

    rank: int = eqx.field(static=True)
    bases: int = eqx.field(static=True)
    alpha: ArrayLike | None
    dropout: ArrayLike | None
    dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(
        self,
        rank: int | np.integer = 16,
        bases: int | np.integer = 256,
        alpha: ArrayLike | None = None,
        *,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.rank = checked_rank("NOLA", rank)
        self.bases = checked_rank("NOLA", bases, "number of bases")
        self.alpha, self.dtype = alpha, dtype
        self.dropout = checked_dropout("NOLA", dropout)

    def init(self, site, *, key, pool=None, data=None):
        """Weights of zero, and a seed."""
        dtype = as_dtype(self.dtype, site)
        scale = over_rank(self.alpha, self.rank, dtype)
        zeros, rate = jnp.zeros(self.bases, dtype), as_rate(self.dropout, dtype)
        sizes = (*site.shape, self.rank)
        key_data = jr.bits(key, (2,), jnp.uint32)
        return Seeded(zeros, jnp.copy(zeros), key_data, scale, rate, sizes)

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from .._sharding import einsum
from ..linalg.gram import working_dtype
from ..lowrank import LowRank
from . import _low_rank_path as low_rank_path
from ._protocol import Adapter, AdapterKind


class LoRAAdapter(Adapter):
    """The factors of one LoRA: ``W + scale · left @ right.T``.

    Attributes:
        pair: ``left = B (*b, out, r)`` and ``right = Aᵀ (*b, in, r)``, both trainable.
        scale: ``(*b,)``, frozen.
        rate: ``(*b,)``, the probability that dropout takes an input, frozen.
    """

    pair: LowRank
    scale: Float[Array, "*b"]
    rate: Float[Array, "*b"]

    def weight(self, base, shared=None):
        """``W + scale · B A``, summed in float32 or higher."""
        del shared
        dtype = jnp.promote_types(base.dtype, self.scale.dtype)
        left, right = (x.astype(dtype) for x in (self.pair.left, self.pair.right))
        change = einsum("...mr,...nr->...mn", left, right)
        scale = self.scale.astype(dtype)[..., None, None]
        return (base.astype(dtype) + scale * change).astype(base.dtype)

    def trainable(self):
        """The two factors."""
        frozen = jax.tree.map(lambda _: False, self)
        pair = jax.tree.map(lambda _: True, self.pair)
        return eqx.tree_at(lambda adapter: adapter.pair, frozen, pair)

    def apply(self, layer, x, shared=None, key=None):
        """``W x + b + scale · B (A drop(x))``: two thin products, never ``B A``."""
        if not low_rank_path.has_low_rank_path(layer):
            if key is not None:
                raise ValueError(
                    f"{type(layer).__name__} has a __call__ of its own, so its adapter "
                    "acts on the dense weight and cannot drop inputs: bind without a key, "
                    "or leave the layer out with adapt(..., where=)."
                )
            return super().apply(layer, x, shared)
        y = low_rank_path.base(layer, x)
        if not isinstance(layer, eqx.nn.Embedding):
            x = x.astype(self.pair.dtype)
            x = x if key is None else low_rank_path.dropout(key, self.rate, x)
        h = low_rank_path.down(layer, self.pair.right, x)
        h = (self.scale * h).astype(self.pair.dtype)
        return y + low_rank_path.up(layer, self.pair.left, h).astype(y.dtype)

    def factors(self):
        """The pair and its scale."""
        return self.pair, self.scale


class LoRA(AdapterKind):
    """Low-rank adaptation: ``W' = W + s · B A`` with ``s = alpha / rank``.

    ``W (out, in)``, ``B (out, r)``, ``A (r, in)``. A starts uniform in ``±1/√in`` and B at
    zero, so the adapted model starts as the model. For an embedding the table is
    ``W = tableᵀ (dim, vocab)``; there B starts standard normal and A at zero. A
    convolution kernel is a matrix with flattened input axes: ``A`` becomes a thin
    convolution and ``B`` a 1×1 convolution.

    Args:
        rank: the width of the factors.
        alpha: the numerator of the scale, ``rank`` by default (so the scale is 1). May be a
            tracer: sweep it under ``vmap`` without recompiling.
        rank_stabilized: divide by ``√rank`` in place of ``rank`` (rsLoRA), so that the
            size of the change does not shrink as the rank grows.
        dropout: the probability with which an input of ``A`` is dropped. It acts when
            :func:`lrjax.bind` is given a key; embeddings have none.
        dtype: of the factors; by default that of each weight. ``float32`` factors on a
            bfloat16 model are the usual choice.

    Raises:
        ValueError: for a rank below 1 or a dropout outside [0, 1).

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.LoRA(rank=2), key=jax.random.key(1))
        >>> adapters["layers.0"].pair.shape
        (16, 4)

    Reference:
        E. Hu et al., "LoRA" (2021), arXiv:2106.09685; D. Kalajdzievski, "A rank
        stabilization scaling factor for fine-tuning with LoRA" (2023), arXiv:2312.03732.
    """

    rank: int = eqx.field(static=True)
    alpha: ArrayLike | None
    rank_stabilized: bool = eqx.field(static=True)
    dropout: ArrayLike
    dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(
        self,
        rank: int = 8,
        alpha: ArrayLike | None = None,
        *,
        rank_stabilized: bool = False,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"LoRA needs a rank of at least 1 (an int), got {rank!r}.")
        if not isinstance(dropout, Tracer) and not 0 <= np.asarray(dropout) < 1:
            raise ValueError(f"LoRA's dropout must be in [0, 1), got {dropout!r}.")
        self.rank, self.alpha = rank, alpha
        self.rank_stabilized, self.dropout, self.dtype = rank_stabilized, dropout, dtype

    def init(
        self,
        base: Array,
        *,
        key: PRNGKeyArray,
        lookup: bool = False,
        shared: PyTree = None,
    ) -> LoRAAdapter:
        """Factors for ``base`` ``(*b, out, in)`` whose product is zero."""
        del shared
        *batch, m, n = base.shape
        dtype = base.dtype if self.dtype is None else jnp.dtype(self.dtype)
        scale_dtype = working_dtype(dtype)
        if lookup:
            left = jr.normal(key, (*batch, m, self.rank), dtype)
            right = jnp.zeros((*batch, n, self.rank), dtype)
        else:
            bound = 1 / math.sqrt(max(n, 1))
            left = jnp.zeros((*batch, m, self.rank), dtype)
            right = jr.uniform(key, (*batch, n, self.rank), dtype, -bound, bound)
        alpha = self.rank if self.alpha is None else self.alpha
        scale = alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)
        scale, rate = (
            jnp.broadcast_to(jnp.asarray(x, scale_dtype), batch)
            for x in (scale, self.dropout)
        )
        return LoRAAdapter(LowRank(left, right), scale, rate)

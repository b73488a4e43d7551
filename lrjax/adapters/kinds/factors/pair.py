import math
from typing import get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float

from ....linalg import nonzero
from ....lowrank import LowRank
from ..._settings import as_dtype, as_number, as_rate, checked_dropout, checked_rank
from ...protocol import Adapter, AdapterKind, Product, trained
from ..starts import Start, Train, checked_start
from ._thinning import Thinning


class Factors(Adapter):
    """Two factors, ``W' = W + scale · (left rightᵀ − left₀ right₀ᵀ)``.

    Two vectors may stand on the rank axis, ``left diag(gate · mask) rightᵀ``, and they are
    not the same. A *gate* is trained like the factors: where a transform sets it to zero
    it has a gradient still and may come back. A *mask* is frozen: where it is zero the
    column is not there, and nothing of it has a gradient. The rank is the number of
    columns in use; ``scale`` is that of all of them, and grows by
    ``(r / columns in use)^power``. So ranks change under ``jit``, and along a ``vmap``,
    in one program.

    Attributes:
        pair: ``left = B (*b, out, r)`` and ``right = Aᵀ (*b, in, r)``.
        start: the factors that it started from, frozen, where they are no zero change.
        scale: ``(*b,)``, frozen.
        train: which factors the optimizer sees.
        gate: ``(*b, r)``, trained; none stands for ones.
        mask: ``(*b, r)``, frozen; none stands for ones. A column of a mask between zero
            and one is in reserve: its factors are trained, its gate is not.
        thinning: zeros in the factors, made anew from a seed, where there are any.
        power: of the rank in use in the denominator of the scale.
    """

    pair: LowRank
    start: LowRank | None
    scale: Float[Array, "*b"]
    rate: Float[Array, "*b"] | None
    train: Train = eqx.field(static=True)
    gate: Float[Array, "*b r"] | None = None
    mask: Float[Array, "*b r"] | None = None
    thinning: Thinning | None = None
    power: float = eqx.field(static=True, default=1.0)

    @property
    def shape(self):
        """That of the product."""
        return self.pair.shape

    def dropout_rate(self):
        """The rate."""
        return self.rate

    def trainable(self):
        """The factors, or one of them, and the gate."""
        nodes = {
            "both": lambda adapter: adapter.pair,
            "left": lambda adapter: adapter.pair.left,
            "right": lambda adapter: adapter.pair.right,
        }
        gate = [] if self.gate is None else [lambda adapter: adapter.gate]
        return trained(self, nodes[self.train], *gate)

    def prepare(self, site, pool=None):
        """Both pairs side by side; what stands between the factors stays there."""
        weights = self.weights()
        if weights is None or self.start is not None or self.thinning is not None:
            pair, scale = self.factors()
            return Product(pair, scale)
        return Product(self.pair, self._scale() * weights)

    def factors(self, pool=None):
        """The pair, beside the negative start, and the scale."""
        pair = _times(self.pair, self.weights())
        if self.thinning is not None:
            pair = self.thinning(pair)
        if self.start is not None:
            start = _times(self.start, self.mask)
            left = jnp.concatenate([pair.left, -start.left], axis=-1)
            right = jnp.concatenate([pair.right, start.right], axis=-1)
            pair = LowRank(left, right)
        return pair, self._scale()

    def weights(self) -> Float[Array, "*b r"] | None:
        """What stands between the factors."""
        if self.gate is None or self.mask is None:
            return self.mask if self.gate is None else self.gate
        whole = self.mask >= 1
        return self.mask * jnp.where(whole, self.gate, lax.stop_gradient(self.gate))

    def _scale(self) -> Float[Array, "*b"]:
        """The scale of the rank in use."""
        if self.mask is None or self.power == 0:
            return self.scale
        used = jnp.sum(self.mask, axis=-1)
        return self.scale * (self.pair.rank / nonzero(used)) ** self.power


def _times(pair: LowRank, weights: Float[Array, "*b r"] | None) -> LowRank:
    """The columns of the left factor times their own numbers."""
    if weights is None:
        return pair
    left = (pair.left * weights[..., None, :]).astype(pair.left.dtype)
    return LowRank(left, pair.right)


class LoRA(AdapterKind):
    """Low-rank adaptation: ``W' = W + s · B A`` with ``s = alpha / rank``.

    ``W (out, in)``, ``B (out, r)``, ``A (r, in)``. A starts uniform in ``±1/√in`` and B at
    zero, so the adapted model starts as the model. For an embedding the table is
    ``W = tableᵀ (dim, vocab)``; there B starts standard normal and A at zero. A
    convolution kernel is a matrix with flattened input axes: ``A`` becomes a thin
    convolution and ``B`` a 1×1 convolution.

    Other starts are called by name or built with settings of their own:

    ============== ====================================================================
    ``init=``      where the factors start
    ============== ====================================================================
    "default"      :class:`lrjax.adapters.ZeroStart`: A uniform, B zero
    "gaussian"     the same with A normal
    "orthogonal"   :class:`lrjax.adapters.OrthogonalStart`: both random, their product zero
    "small"        :class:`lrjax.adapters.SmallStart`: both normal and small
    "pissa"        :class:`lrjax.adapters.SingularStart`: the principal part of W
    "milora"       the same, the minor part of W
    "olora"        :class:`lrjax.adapters.QRStart`: of ``W = Q R``
    "lora_ga"      :class:`lrjax.adapters.GradientStart`: so that the first step is that of
                   the gradient's best approximation of rank 2r
    "lora_one"     :class:`lrjax.adapters.StepStart`: at one step down the gradient
    "spectral"     :class:`lrjax.adapters.SpectralStart`: small, along the gradient
    "eva"          :class:`lrjax.adapters.VarianceStart`: A where the inputs vary most
    "corda"        :class:`lrjax.adapters.WeightedStart`: what the inputs use of W
    "corda_kpm"    the same, what they do not use
    ============== ====================================================================

    Those from "lora_ga" on need data, from :func:`lrjax.adapters.gradient_statistics` or
    :func:`lrjax.adapters.activation_statistics`. Where the start is no zero change
    ("pissa", "milora", "olora", "lora_ga", "corda"), a frozen copy of it is taken off:
    ``W' = W + s (B A − B₀ A₀)``. So the model starts as the model, the base stays as it is,
    and adapters of one base can be stacked and mixed; in a call there are 2r columns. Only
    "lora_one" starts with a changed model, and "small" and "spectral" next to it.

    Args:
        rank: the width of the factors. Layers of a stack may have one each:
            :func:`lrjax.adapt` with a list of kinds, or :func:`lrjax.adapters.with_ranks`.
        alpha: the numerator of the scale, ``rank`` by default (so the scale is 1). May be a
            tracer: sweep it under ``vmap`` without recompiling.
        rank_stabilized: divide by ``√rank`` in place of ``rank`` (rsLoRA), so that the
            size of the change does not shrink as the rank grows.
        train: ``"both"`` factors, or ``"left"`` alone (LoRA-FA) or ``"right"`` alone, with
            the other one frozen; the one that is trained is zero at first. Transforms
            that need both factors of a pair, as ``scale_by_gram``, read the other one from
            ``tx.update(grads, state, params, frozen=frozen)``.
        init: a name, or a :class:`lrjax.adapters.Start`.
        dropout: the probability with which an input of ``A`` is dropped. It acts when
            :func:`lrjax.bind` is given a key; embeddings have none.
        dtype: of the factors; by default that of each weight. ``float32`` factors on a
            bfloat16 model are the usual choice.

    Raises:
        ValueError: for a rank below 1, a dropout outside [0, 1), an unknown ``train`` or
            ``init``; in :func:`lrjax.adapt`, for more singular vectors than there are.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.LoRA(rank=2), key=jax.random.key(1))
        >>> adapters["layers.0"].pair.shape
        (16, 4)

    Reference:
        E. Hu et al., "LoRA: low-rank adaptation of large language models" (2021),
        arXiv:2106.09685; D. Kalajdzievski, "A rank stabilization scaling factor for
        fine-tuning with LoRA" (2023), arXiv:2312.03732; L. Zhang et al., "LoRA-FA:
        memory-efficient low-rank adaptation for large language models fine-tuning"
        (2023), arXiv:2308.03303; F. Meng, Z. Wang, M. Zhang, "PiSSA: principal singular
        values and singular vectors adaptation of large language models" (2024),
        arXiv:2404.02948.
    """

    rank: int = eqx.field(static=True)
    alpha: ArrayLike | None
    rank_stabilized: bool = eqx.field(static=True)
    train: Train = eqx.field(static=True)
    start: Start
    dropout: ArrayLike | None
    dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(
        self,
        rank: int | np.integer = 8,
        alpha: ArrayLike | None = None,
        *,
        rank_stabilized: bool = False,
        train: Train = "both",
        init: str | Start = "default",
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        if train not in get_args(Train):
            raise ValueError(
                f"LoRA's train must be one of {get_args(Train)}, got {train!r}."
            )
        self.rank, self.alpha = checked_rank("LoRA", rank), alpha
        self.rank_stabilized, self.train = rank_stabilized, train
        self.start = checked_start(init)
        self.dropout, self.dtype = checked_dropout("LoRA", dropout), dtype

    @property
    def takes_data(self):
        """Whether the start does."""
        return self.start.takes_data

    def init(self, site, *, key, pool=None, data=None):
        """Factors as ``init`` says."""
        dtype = as_dtype(self.dtype, site)
        alpha = self.rank if self.alpha is None else self.alpha
        scale = alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)
        scale = as_number(scale, dtype)
        pair = self.start.pair(
            site, self.rank, scale=scale, train=self.train, key=key, data=data
        )
        # Rounded first: what is taken off is what is there. A copy, so that a step that
        # donates the factors leaves their start alone.
        pair = jax.tree.map(lambda x: x.astype(dtype), pair)
        start = jax.tree.map(jnp.copy, pair) if self.start.residual else None
        rate, power = as_rate(self.dropout, dtype), 0.5 if self.rank_stabilized else 1.0
        return Factors(pair, start, scale, rate, self.train, power=power)

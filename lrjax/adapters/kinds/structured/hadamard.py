from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float

from ....linalg import outer
from ....lowrank import LowRank
from ..._settings import (
    as_dtype,
    as_number,
    as_rate,
    checked_dropout,
    checked_rank,
    kaiming_uniform,
    over_rank,
)
from ...protocol import Adapter, AdapterKind, Beside, Product, Ready, trained
from ..factors import LoRA
from ..starts import Train


Side = Literal["outputs", "inputs"]


class Hadamard(Adapter):
    """Entrywise products with a product of factors: ``W' = W + scale · (B A) ⊙ F``.

    Attributes:
        pair: ``left = B (*b, out, r)`` and ``right = Aᵀ (*b, in, r)``.
        other: the factors whose product is F; ``None`` where F is W itself.
        scale: ``(*b,)``, frozen.
        train: which factors the optimizer sees; if it is one of a rank of one, the other
            factor is all ones.
    """

    pair: LowRank
    other: LowRank | None
    scale: Float[Array, "*b"]
    rate: Float[Array, "*b"] | None
    train: Train = eqx.field(static=True)

    @property
    def shape(self):
        """That of the products."""
        return self.pair.shape

    def dropout_rate(self):
        """The rate."""
        return self.rate

    def trainable(self):
        """All factors, or one."""
        both = lambda adapter: (adapter.pair, adapter.other)
        nodes = {
            "both": both if self.other is not None else lambda adapter: adapter.pair,
            "left": lambda adapter: adapter.pair.left,
            "right": lambda adapter: adapter.pair.right,
        }
        return trained(self, nodes[self.train])

    def prepare(self, site, pool=None):
        """The cheapest of three ways: gains, thin factors of all of the change, dense."""
        if self.train != "both":
            vector = self.pair.left if self.train == "left" else self.pair.right
            return Gains(self.scale * vector[:, 0], self.train == "left")
        factors, (m, n) = self.factors(), self.shape
        # A step has three products with each thin factor, or two with the dense change.
        if factors is not None and 3 * factors[0].rank * (m + n) < 2 * m * n:
            return Product(*factors)
        return Multiplied(self.pair, self.scale, self.other)

    def factors(self, pool=None):
        """Of two pairs of factors, the products of all pairs of their columns."""
        if self.other is None:
            return None
        columns = lambda a, b: (a[..., :, None] * b[..., None, :]).reshape(
            *a.shape[:-1], a.shape[-1] * b.shape[-1]
        )
        left = columns(self.pair.left, self.other.left)
        return LowRank(left, columns(self.pair.right, self.other.right)), self.scale


class Multiplied(Beside):
    """``W' = W + scale · (B A) ⊙ F``, dense, except in a lookup, which needs one column."""

    pair: LowRank
    scale: Array
    other: LowRank | None

    def delta(self, base: Float[Array, "out in"]) -> Float[Array, "out in"]:
        """The dense change."""
        dense = lambda pair: outer(
            pair.left.astype(base.dtype), pair.right.astype(base.dtype)
        )
        factor = base if self.other is None else dense(self.other)
        return self.scale.astype(base.dtype) * dense(self.pair) * factor

    def weight(self, base):
        """``W`` and the change."""
        return base + self.delta(base)

    def change(self, site, x):
        """One column, or dense; without the cancellation of a difference of weights."""
        if site.kind == "lookup":
            column = lambda pair: site.up(pair.left, site.down(pair.right, x))
            factor = site.base(x) if self.other is None else column(self.other)
            return self.scale * column(self.pair) * factor
        dense = lambda ready, x: site.product(ready.delta(site.read()), x)
        return jax.checkpoint(dense)(self, x)

    def output(self, site, x):
        """One column, or one dense product."""
        beside = site.kind == "lookup"
        return super().output(site, x) if beside else Ready.output(self, site, x)


class Gains(Ready):
    """``W' = diag(1 + v) W`` and the bias likewise, or ``W' = W diag(1 + v)``."""

    vector: Float[Array, " side"]
    of_outputs: bool = eqx.field(static=True)

    def weight(self, base):
        """Rows or columns by their own numbers."""
        gain = 1 + self.vector.astype(base.dtype)
        return base * (gain[:, None] if self.of_outputs else gain[None, :])

    def change(self, site, x):
        """The layer, its output or input scaled; for inputs of a convolution dense."""
        return self._scaled(site, x, self.vector, super().change)

    def output(self, site, x):
        """The same with the gains themselves."""
        y = self._scaled(site, x, 1 + self.vector, super().output)
        return y.astype(site.base(x).dtype)

    def _scaled(self, site, x, gain, dense):
        if self.of_outputs:
            return site.along_outputs(gain) * site.base(x)
        if site.kind == "lookup":
            return gain[x] * site.base(x)
        if site.kind == "linear":
            x = jnp.asarray(x)
            return site.base((gain * x).astype(x.dtype))
        return dense(site, x)

    def bias(self, bias):
        """Scaled with the outputs."""
        if bias is None or not self.of_outputs:
            return bias
        gain = (1 + self.vector).reshape(bias.shape)
        return (gain * bias).astype(bias.dtype)


class HiRA(AdapterKind):
    """Hadamard high-rank adaptation: every entry of a weight by its own number.

    ``W' = W ⊙ (1 + B A)`` with ``A (r, in)`` uniform in ``±1/√in`` and ``B (out, r)`` from
    zero (for an embedding A from zero and B standard normal): ``r (out + in)`` numbers,
    and a change ``W ⊙ B A`` of any rank up to that of W.

    The dense ``W'`` is formed in each call, and again on the way back: with more than one
    input and a rank above one that is fewer flops than the r products with scaled inputs
    ``Σ_k B_k ⊙ W (A_k ⊙ x)``. A step has three products with a dense matrix for LoRA's two.

    Args:
        rank: of the factors.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the factors, by default that of each weight.

    Raises:
        ValueError: for a rank below 1 or a dropout outside [0, 1).

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> model = eqx.nn.Linear(6, 5, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.adapters.HiRA(2), key=jax.random.key(1))
        >>> adapters[""].pair.shape
        (5, 6)

    Reference:
        Q. Huang et al., "HiRA: parameter-efficient Hadamard high-rank adaptation for
        large language models" (2025), ICLR, as in PEFT.
    """

    rank: int = eqx.field(static=True)
    dropout: ArrayLike | None
    dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(
        self,
        rank: int | np.integer = 32,
        *,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.rank = checked_rank("HiRA", rank)
        self.dropout, self.dtype = checked_dropout("HiRA", dropout), dtype

    def init(self, site, *, key, pool=None, data=None):
        """Factors whose product is zero."""
        dtype = as_dtype(self.dtype, site)
        pair = LoRA(self.rank, dtype=dtype).init(site, key=key).pair
        one, rate = as_number(1.0, dtype), as_rate(self.dropout, dtype)
        return Hadamard(pair, None, one, rate, "both")


class LoHa(AdapterKind):
    """Low-rank Hadamard product adaptation: two pairs of factors, multiplied entrywise.

    ``W' = W + s · (B A) ⊙ (D C)`` with ``B, D (out, r)``, ``A, C (r, in)`` and
    ``s = alpha / rank``: ``2 r (out + in)`` numbers, and a change of rank up to r². A, B
    and D start uniform in ``±1/√`` of their columns, C at zero. Where the rank is small for
    the matrix, the change is applied by its factors of width r², else dense.

    Args:
        rank: of each pair.
        alpha: the numerator of the scale, ``rank`` by default.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the factors, by default that of each weight.

    Raises:
        ValueError: for a rank below 1 or a dropout outside [0, 1).

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(6, 5, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.adapters.LoHa(2), key=jax.random.key(1))
        >>> adapters[""].factors()[0].rank
        4

    Reference:
        N. Hyeon-Woo, M. Ye-Bin, T.-H. Oh, "FedPara: low-rank Hadamard product for
        communication-efficient federated learning" (2021), arXiv:2108.06098; S.-Y. Yeh et
        al., "Navigating text-to-image customization: from LyCORIS fine-tuning to model
        evaluation" (2023), arXiv:2309.14859.
    """

    rank: int = eqx.field(static=True)
    alpha: ArrayLike | None
    dropout: ArrayLike | None
    dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(
        self,
        rank: int | np.integer = 8,
        alpha: ArrayLike | None = None,
        *,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.rank, self.alpha = checked_rank("LoHa", rank), alpha
        self.dropout, self.dtype = checked_dropout("LoHa", dropout), dtype

    def init(self, site, *, key, pool=None, data=None):
        """Three factors at random, one at zero."""
        dtype, (m, n), r = as_dtype(self.dtype, site), site.shape, self.rank
        keys = jr.split(key, 3)
        b, d = (kaiming_uniform(k, (m, r), r, dtype) for k in keys[:2])
        pair = LowRank(b, kaiming_uniform(keys[2], (n, r), n, dtype))
        other = LowRank(d, jnp.zeros((n, r), dtype))
        scale = over_rank(self.alpha, r, dtype)
        return Hadamard(pair, other, scale, as_rate(self.dropout, dtype), "both")


class IA3(AdapterKind):
    """Infused adapter by inhibiting and amplifying inner activations: one gain a feature.

    ``W' = diag(1 + v) W``, and the bias likewise, with ``v (out,)`` from zero; or with
    ``side="inputs"`` ``W' = W diag(1 + v)`` with ``v (in,)``, the usual choice for the
    second layer of a feedforward block. It is :class:`lrjax.adapters.HiRA` of rank one with
    one factor frozen at one. Of a convolution every column of the flattened kernel is an
    input.

    Args:
        side: ``"outputs"`` or ``"inputs"``.
        dtype: of the gains, by default that of each weight.

    Raises:
        ValueError: for another side.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> rule = lambda path, site: lrjax.adapters.IA3(
        ...     "inputs" if path == "layers.2" else "outputs")
        >>> where = lambda path, layer: isinstance(layer, eqx.nn.Linear)
        >>> adapters = lrjax.adapt(model, rule, where=where, key=jax.random.key(1))
        >>> sum(x.size for x in jax.tree.leaves(lrjax.partition(adapters)[0]))
        48

    Reference:
        H. Liu et al., "Few-shot parameter-efficient fine-tuning is better and cheaper than
        in-context learning" (2022), arXiv:2205.05638.
    """

    side: Side = eqx.field(static=True)
    dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(self, side: Side = "outputs", *, dtype: DTypeLike | None = None):
        if side not in get_args(Side):
            raise ValueError(f"IA3's side must be one of {get_args(Side)}, got {side!r}.")
        self.side, self.dtype = side, dtype

    def init(self, site, *, key=None, pool=None, data=None):
        """No gain on one side, ones on the other."""
        dtype, (m, n) = as_dtype(self.dtype, site), site.shape
        of_outputs = self.side == "outputs"
        left = jnp.full((m, 1), 0 if of_outputs else 1, dtype)
        right = jnp.full((n, 1), 1 if of_outputs else 0, dtype)
        train: Train = "left" if of_outputs else "right"
        return Hadamard(LowRank(left, right), None, as_number(1.0, dtype), None, train)

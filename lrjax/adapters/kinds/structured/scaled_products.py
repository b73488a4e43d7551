import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float

from ....linalg import outer
from ....lowrank import LowRank
from ..._settings import as_dtype, as_number, as_rate, checked_dropout, checked_rank
from ...protocol import Adapter, AdapterKind, Ready, Whole, trained


class ScaledProducts(Adapter):
    """Entrywise products that stand in place of the weight: ``W' = scale · W ⊙ (B A)``.

    Attributes:
        pair: ``left = B (*b, out, r)`` and ``right = Aᵀ (*b, in, r)``.
        scale: ``(*b,)``, frozen.
    """

    pair: LowRank
    scale: Float[Array, "*b"]
    rate: Float[Array, "*b"] | None

    @property
    def shape(self):
        """That of the products."""
        return self.pair.shape

    def dropout_rate(self):
        """The rate."""
        return self.rate

    def trainable(self):
        """Both factors."""
        return trained(self, lambda adapter: adapter.pair)

    def prepare(self, site, pool=None):
        """The factors with the scale."""
        return ReadyProducts(self.pair, self.scale)


class ReadyProducts(Whole):
    """``W' x = scale · Σ_k B_k ⊙ W (A_k ⊙ x)``: the layer on r scaled inputs.

    Under ``vmap`` over adapters these are products of many vectors with one weight, which
    is never copied. A convolution, whose inputs are seen more than once, is dense.
    """

    pair: LowRank
    scale: Float[Array, ""]

    def weight(self, base):
        """The weight, entry by entry."""
        left, right = (x.astype(base.dtype) for x in (self.pair.left, self.pair.right))
        return self.scale.astype(base.dtype) * base * outer(left, right)

    def output(self, site, x):
        """The layer on scaled inputs; one column in a lookup."""
        if site.kind == "lookup":
            y = site.base(x)
            gain = site.up(self.pair.left, site.down(self.pair.right, x))
            return (self.scale * gain * y).astype(y.dtype)
        if site.kind != "linear":
            return Ready.output(self, site, x)
        x = jnp.asarray(x)
        product = lambda b, a: site.along_outputs(b) * site.base((a * x).astype(x.dtype))
        products = jax.vmap(product)(self.pair.left.T, self.pair.right.T)
        dtype = jnp.promote_types(x.dtype, site.dtype)
        return (self.scale * jnp.sum(products, axis=0)).astype(dtype)


class FLoRA(AdapterKind):
    """fLoRA, for batches with an adapter for each example: ``W' = W ⊙ (B A) / r``.

    ``B (out, r)`` and ``A (r, in)``: ``r (out + in)`` numbers, and a change of any rank up
    to that of W. ``W' x = 1/r · Σ_k B_k ⊙ W (A_k ⊙ x)`` are r products with the base
    weight, so that examples with adapters of their own share one large product, where
    LoRA needs a thin one for each. That pays at a rank of one, where a call has the flops
    of the layer; they grow with the rank. For one adapter and many inputs merge it instead.
    B starts at one, and A at one plus normal numbers that add up to zero over the rank, so
    that the model starts as it is and columns can become different ones.

    Args:
        rank: of the factors.
        spread: the standard deviation of A at the start, if the rank is more than one. At
            zero, as in the paper, all columns have the same gradient and stay the same.
        dropout: the probability with which an input of the change is dropped, given a key
            in ``bind``.
        dtype: of the factors, by default that of each weight.

    Raises:
        ValueError: for a rank below 1 or a dropout outside [0, 1).

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> model = eqx.nn.Linear(6, 5, key=jax.random.key(0))
        >>> kind, keys = lrjax.adapters.FLoRA(), jax.random.split(jax.random.key(1), 3)
        >>> each = jax.vmap(lambda key: lrjax.adapt(model, kind, key=key))(keys)
        >>> call = jax.vmap(lambda own, x: lrjax.bind(model, own)(x))
        >>> call(each, jnp.ones((3, 6))).shape
        (3, 5)

    Reference:
        Y. Wen, S. Chaudhuri, "Batched low-rank adaptation of foundation models" (2023),
        arXiv:2312.05677. With rank one and A frozen it is
        :class:`lrjax.adapters.IA3`, but for the bias.
    """

    rank: int = eqx.field(static=True)
    spread: ArrayLike
    dropout: ArrayLike | None
    dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(
        self,
        rank: int | np.integer = 1,
        *,
        spread: ArrayLike = 0.1,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.rank, self.spread = checked_rank("FLoRA", rank), spread
        self.dropout, self.dtype = checked_dropout("FLoRA", dropout), dtype

    def init(self, site, *, key, pool=None, data=None):
        """Factors whose product is r everywhere."""
        dtype, (m, n) = as_dtype(self.dtype, site), site.shape
        noise = jr.normal(key, (n, self.rank))
        noise = noise - jnp.mean(noise, axis=1, keepdims=True)
        right = jnp.asarray(1 + self.spread * noise, dtype)
        pair = LowRank(jnp.ones((m, self.rank), dtype), right)
        scale = as_number(1 / self.rank, dtype)
        return ScaledProducts(pair, scale, as_rate(self.dropout, dtype))

"""Gates of a mixture that look at the input of their layer."""

import abc
import math
import operator
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ..._sites import Site
from ...linalg import product_svd, working_dtype
from .._settings import as_number, checked_rank, kaiming_uniform
from ..binding import stacked_factors
from ..protocol import Adapter, Pool, trained
from .weights import among_largest, softmax_weights


Squash = Literal["softmax", "sigmoid"]


class Gate(eqx.Module):
    """What each input of a layer makes of the adapters there: ``g(x) (k,)``.

    The scores are ``s = V x``, their sizes, or ``s = U relu(V x + v) + u``; the gates are
    the softmax of ``s / T``, or each its sigmoid, and zero but for the largest.

    Attributes:
        first: ``Vᵀ (*b, in, k)``, or ``(*b, in, hidden)``.
        first_bias: ``v (*b, hidden)``, with a hidden layer.
        last: ``U (*b, k, hidden)``, with a hidden layer.
        last_bias: ``u (*b, k)``.
        temperature: ``T (*b,)``, frozen.
        top_k: how many gates are not zero.
        squash: ``"softmax"`` or ``"sigmoid"``.
        sizes: whether the sizes of the scores count, ``|V x|``.
        train: whether all but the temperature is trained.
    """

    first: Float[Array, "*b n h"]
    first_bias: Float[Array, "*b h"] | None
    last: Float[Array, "*b k h"] | None
    last_bias: Float[Array, "*b k"] | None
    temperature: Float[Array, "*b"]
    top_k: int | None = eqx.field(static=True, default=None)
    squash: Squash = eqx.field(static=True, default="softmax")
    sizes: bool = eqx.field(static=True, default=False)
    train: bool = eqx.field(static=True, default=False)

    def trainable(self):
        """Both layers, or nothing."""
        names = ("first", "first_bias", "last", "last_bias") if self.train else ()
        there = [operator.attrgetter(n) for n in names if getattr(self, n) is not None]
        return trained(self, *there)

    def scores(self, site: Site, x: Array) -> Float[Array, "*c k"]:
        """One for each adapter: of a convolution, at every position."""
        s = site.down(self.first, x)
        if self.last is not None:
            s = jax.nn.relu(_plus(s, self.first_bias)) @ self.last.T
        s = _plus(s, self.last_bias)
        return jnp.abs(s) if self.sizes else s

    def __call__(self, site: Site, x: Array) -> Float[Array, "*c k"]:
        """The gates of one input."""
        s = self.scores(site, x)
        if self.squash == "softmax":
            return softmax_weights(s, temperature=self.temperature, top_k=self.top_k)
        gates = jax.nn.sigmoid(s / self.temperature)
        if self.top_k is None:
            return gates
        return jnp.where(among_largest(s, self.top_k), gates, 0.0)


def _plus(s: Array, bias: Array | None) -> Array:
    return s if bias is None else s + bias.reshape(*(1,) * (s.ndim - 1), -1)


class GateKind(eqx.Module):
    """The recipe of the gates of a mixture."""

    train_experts: eqx.AbstractVar[bool]

    @property
    def takes_key(self) -> bool:
        """Whether ``init`` draws numbers."""
        return False

    @abc.abstractmethod
    def init(
        self, site: Site, experts: Adapter, pool: Pool | None, key: PRNGKeyArray | None
    ) -> Gate:
        """The gate of one matrix; ``experts`` have one leading axis."""


class Arrow(GateKind):
    """Gates that need no training: how much of an input each adapter would use.

    The gates of a token or position x are::

        s_k = |v_kᵀ x|,   g = softmax of the largest s / T,   y = W x + Σ_k g_k ΔW_k x

    with ``v_k`` the right singular vector of ``ΔW_k`` for its largest singular value, the
    direction of the inputs in which that adapter changes most. It comes from decompositions
    of ``r × r`` matrices; no data are seen, and its sign does not matter. Adapters that
    were trained apart, each for a task, are so put together for new tasks, anew for each
    token and layer.

    Args:
        top_k: how many adapters act at once, ``None`` for all.
        temperature: ``T``, positive.

    Raises:
        ValueError: for a ``top_k`` below one; in :func:`lrjax.adapters.mix`, by path for
            adapters whose change is no product of factors.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> keys = jax.random.split(jax.random.key(1), 3)
        >>> three = [lrjax.adapt(model, lrjax.LoRA(2, init="small"), key=k) for k in keys]
        >>> stack = lrjax.adapters.stack(three, model)
        >>> mixture = lrjax.adapters.mix(stack, lrjax.adapters.Arrow(top_k=2), model)
        >>> lrjax.bind(model, mixture)(jnp.ones(4)).shape
        (3,)

    Reference:
        O. Ostapenko et al., "Towards modular LLMs by building and reusing a library of
        LoRAs" (2024), arXiv:2405.11157. Of one adapter it is that adapter.
    """

    top_k: int | None = eqx.field(static=True)
    temperature: ArrayLike
    train_experts: bool = eqx.field(static=True, default=False)

    def __init__(self, top_k: int | None = 4, *, temperature: ArrayLike = 1.0):
        self.top_k = None if top_k is None else checked_rank("Arrow", top_k, "top_k")
        self.temperature, self.train_experts = temperature, False

    def init(self, site, experts, pool, key=None):
        """The right singular vectors; none of a change that is zero."""
        found = stacked_factors(experts, pool)
        if found is None:
            raise ValueError(
                f"Arrow reads singular vectors of products of factors, and the change at "
                f"{site.path or 'the root'} is none: make factors of each adapter first, "
                "lrjax.adapters.as_lora(adapters, model, rank=…), and stack these."
            )
        pair, scale = found
        top = product_svd(pair.left, None, pair.right, 1)
        there = (top.values != 0) & (scale != 0)[:, None]
        vectors = jnp.where(there[:, None, :], top.right, 0)[..., 0]
        temperature = as_number(self.temperature, vectors.dtype)
        return Gate(vectors.T, None, None, None, temperature, self.top_k, sizes=True)


class LearnedGates(GateKind):
    """Gates that are trained while the adapters stay as they are.

        s = V x + u,   or   s = U relu(V x + v) + u,   y = W x + Σ_k g_k(s) ΔW_k x

    at each layer, with ``x`` its input, for each token. ``g`` is the softmax of ``s / T``,
    or each its sigmoid. They start at ``1/k``, the mean of the adapters: few numbers, for
    few examples. X-LoRA computes the gates of all layers from the last hidden state of a
    pass without adapters, here each layer sees its own input, in one pass.

    Args:
        hidden: the width of a hidden layer, ``None`` for none.
        top_k: how many adapters act at once, all of them by default. With it the layer
            that gives the scores starts from small random numbers, which tell the inputs
            apart, in place of zero.
        temperature: ``T``, positive.
        squash: ``"softmax"``, so that gates add up to one, or ``"sigmoid"``, so that each
            adapter is turned up or down by itself (with one adapter from 1/2).
        train_experts: whether the adapters are trained beside, as they were.

    Raises:
        ValueError: for a ``hidden`` or ``top_k`` below one, or another ``squash``.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> keys = jax.random.split(jax.random.key(1), 3)
        >>> three = [lrjax.adapt(model, lrjax.LoRA(2, init="small"), key=k) for k in keys]
        >>> stack = lrjax.adapters.stack(three, model)
        >>> mixture = lrjax.adapters.mix(stack, lrjax.adapters.LearnedGates(), model)
        >>> params, frozen = lrjax.partition(mixture)
        >>> sum(x.size for x in jax.tree.leaves(params))  # 3 (4 + 1) + 2 · 3 (16 + 1)
        117

    Reference:
        E. L. Buehler, M. J. Buehler, "X-LoRA: mixture of low-rank adapter experts, a
        flexible framework for large language models with applications in protein mechanics
        and molecular design" (2024), arXiv:2402.07148.
    """

    hidden: int | None = eqx.field(static=True)
    top_k: int | None = eqx.field(static=True)
    temperature: ArrayLike
    squash: Squash = eqx.field(static=True)
    train_experts: bool = eqx.field(static=True)

    def __init__(
        self,
        hidden: int | None = None,
        *,
        top_k: int | None = None,
        temperature: ArrayLike = 1.0,
        squash: Squash = "softmax",
        train_experts: bool = False,
    ):
        known = lambda n, name: None if n is None else checked_rank("LearnedGates", n, name)
        if squash not in get_args(Squash):
            raise ValueError(
                f"LearnedGates' squash must be one of {get_args(Squash)}, got {squash!r}."
            )
        self.hidden, self.top_k = known(hidden, "hidden"), known(top_k, "top_k")
        self.temperature, self.squash = temperature, squash
        self.train_experts = train_experts

    @property
    def takes_key(self):
        """For a hidden layer, and where all inputs would break ties the same way."""
        return self.hidden is not None or self.top_k is not None

    def init(self, site, experts, pool, key=None):
        """Scores that are all the same."""
        del pool
        dtype, count, inputs = working_dtype(site.dtype), experts.shape[0], site.shape[1]
        temperature = as_number(self.temperature, dtype)
        start = 0.0 if self.squash == "softmax" else -math.log(max(count, 2) - 1)
        bias = jnp.full(count, start, dtype) * temperature
        shape = (inputs, count) if self.hidden is None else (count, self.hidden)
        scoring = jnp.zeros(shape, dtype)
        if key is not None and self.top_k is not None:
            scoring = 0.01 * jr.normal(jr.fold_in(key, 1), shape, dtype)
        if key is None or self.hidden is None:
            layers = (scoring, None, None, bias)
        else:
            first = kaiming_uniform(key, (inputs, self.hidden), inputs, dtype)
            layers = (first, jnp.zeros(self.hidden, dtype), scoring, bias)
        return Gate(*layers, temperature, self.top_k, self.squash, train=True)

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from ..._arguments import check_key
from ..._sites import Site, fold_in_path
from ...lowrank import LowRank
from ..binding import adapted_sites
from ..protocol import Adapter, Adapters, PerInput, Product, Ready, trained
from .gates import Gate, GateKind
from .stack import Stack


class Mixture(Adapter):
    """Several adapters of a layer, weighted anew for each input.

    ``y = W x + Σ_k g_k(x) ΔW_k x``, with the weights ``g (k,)`` from a gate. No one weight
    does the same: what would merge it is refused.

    Attributes:
        experts: the adapters as one, each leaf with an axis of them behind ``*b``.
        gate: the weights of an input.
        train_experts: whether the adapters are trained, as each of them is.
    """

    experts: Adapter
    gate: Gate
    train_experts: bool = eqx.field(static=True, default=False)

    @property
    def shape(self):
        """That of each of the adapters."""
        *stack, _, outputs, inputs = self.experts.shape
        return (*stack, outputs, inputs)

    def dropout_rate(self):
        """The largest of the adapters' that are trained: frozen ones drop nothing."""
        rate = self.experts.dropout_rate() if self.train_experts else None
        return None if rate is None else jnp.max(rate, axis=-1)

    def pool_name(self):
        """That of the adapters, who share one."""
        return self.experts.pool_name()

    def trainable(self):
        """The gate, and perhaps what each of the adapters trains."""
        spec = eqx.tree_at(lambda a: a.gate, trained(self), self.gate.trainable())
        if not self.train_experts:
            return spec
        return eqx.tree_at(lambda a: a.experts, spec, self.experts.trainable())

    def prepare(self, site, pool):
        """All adapters; products of factors side by side."""
        biases = []

        def one(expert: Adapter) -> Ready:
            ready, bias = expert.prepare(site, pool), site.read_bias()
            biases.append(bias is not None and ready.bias(bias) is not bias)
            return ready

        parts = eqx.filter_vmap(one)(self.experts)
        at = site.path or "the root"
        if any(biases):
            raise ValueError(
                f"The adapters at {at} have a bias of their own, which a mixture that is "
                "weighted for each input does not have: mix adapters of weights alone."
            )
        if isinstance(parts, Product) and isinstance(parts.pair, LowRank):
            left, right = jax.vmap(Product.folded)(parts)
            beside = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)
            return MixedFactors(site.path, self.gate, beside(left), beside(right))
        if site.kind == "conv":
            raise ValueError(
                f"{at} is a convolution, where mixtures are of products of factors: make "
                "factors of each adapter first, lrjax.adapters.as_lora(adapters, model, "
                "rank=…), and stack these."
            )
        return MixedChanges(site.path, self.gate, parts)


class MixedFactors(PerInput):
    """``left diag(g(x)) rightᵀ x``: two thin products, and the gates between them."""

    gate: Gate
    left: Float[Array, "out kr"]
    right: Float[Array, "in kr"]

    def change(self, site, x):
        """As many flops as all adapters have."""
        h, gates = site.down(self.right, x), self.gate(site, x)
        apart = h.reshape(*gates.shape, -1) * gates[..., None]
        return site.up(self.left, apart.reshape(h.shape).astype(h.dtype))


class MixedChanges(PerInput):
    """``Σ_k g_k(x) ΔW_k x`` of any adapters."""

    gate: Gate
    parts: Ready

    def change(self, site, x):
        """The change of each, and their sum."""
        changes = eqx.filter_vmap(lambda part: part.change(site, x))(self.parts)
        gates = jnp.moveaxis(self.gate(site, x), -1, 0)
        gates = gates.reshape(*gates.shape, *(1,) * (changes.ndim - gates.ndim))
        return jnp.sum(gates * changes, axis=0)


def mix(
    stack: Stack,
    gates: GateKind,
    model: PyTree,
    *,
    ids: Sequence[str | int] | ArrayLike | None = None,
    key: PRNGKeyArray | None = None,
) -> Adapters:
    """Adapters of a stack that act together, weighted anew for each input of each layer.

    ``y = W x + Σ_k g_k(x) ΔW_k x``, with the gates of :class:`lrjax.adapters.Arrow`, which
    need no training, or of :class:`lrjax.adapters.LearnedGates`; of a token, a position of
    a convolution, a row of a table. Weights that are the same for all layers of an example
    are given to :func:`lrjax.adapters.select` instead.

    The result is bound like any adapters, :func:`lrjax.partition` finds the gates alone to
    be trained. It cannot be merged, and code that reads the weight of a bound layer is told
    so: no weight holds what depends on the input. All adapters are computed, also those
    whose gates are zero.

    Args:
        stack: from :func:`lrjax.adapters.stack`; the mixture has a copy of it.
        gates: the kind of the gates, with its settings.
        model: the model that the adapters were made for.
        ids: which of them, names or numbers; by default all but the base. With the base, 0,
            the gates may also choose to change nothing.
        key: for gates that start from random numbers.

    Returns:
        ``Adapters`` of :class:`lrjax.adapters.Mixture`.

    Raises:
        ValueError: by path for arrays and vectors, which have no input, for adapters with
            a pool each or a bias of their own; for gates that need a key and have none.
        TypeError: if ``gates`` are none, or ``key`` is no key.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> keys = jax.random.split(jax.random.key(1), 3)
        >>> three = [lrjax.adapt(model, lrjax.LoRA(2, init="small"), key=k) for k in keys]
        >>> stack = lrjax.adapters.stack(three, model)
        >>> mixture = lrjax.adapters.mix(stack, lrjax.adapters.LearnedGates(), model)
        >>> def loss(params, frozen, x):
        ...     bound = lrjax.bind(model, eqx.combine(params, frozen))
        ...     return jnp.mean(jax.vmap(bound)(x) ** 2)
        >>> params, frozen = lrjax.partition(mixture)
        >>> grads = jax.grad(loss)(params, frozen, jnp.ones((5, 4)))
        >>> grads["layers.0"].gate.first.shape
        (4, 3)

    Reference:
        O. Ostapenko et al., "Towards modular LLMs by building and reusing a library of
        LoRAs" (2024), arXiv:2405.11157; E. L. Buehler, M. J. Buehler, "X-LoRA: mixture of
        low-rank adapter experts, a flexible framework for large language models with
        applications in protein mechanics and molecular design" (2024), arXiv:2402.07148.
        Gates that are all 1/k give the mean of the adapters.
    """
    check_key("mix", key)
    if not isinstance(gates, GateKind):
        raise TypeError(
            "mix takes gates such as lrjax.adapters.Arrow() or "
            f"lrjax.adapters.LearnedGates(), got {gates!r}."
        )
    if gates.takes_key and key is None:
        raise ValueError(
            f"{type(gates).__name__} with these settings starts from random numbers: pass "
            "key=jax.random.key(…) to mix."
        )
    chosen = jnp.atleast_1d(jnp.asarray(stack.index(_entries(stack, ids))))
    pools = {name: stack.adapters.pools[name] for name in stack.shared}
    one = Adapters(
        {path: _taken(own, chosen[0]) for path, own in stack.adapters.layers.items()},
        {
            name: pool if name in pools else _taken(pool, chosen[0])
            for name, pool in stack.adapters.pools.items()
        },
        stack.adapters.axes,
    )
    layers = {}
    for path, (site, own, _) in adapted_sites(model, one).items():
        name = own.pool_name()
        _check_site(site, name, name is None or name in pools)
        depth = len(site.stack)
        experts = jax.tree.map(
            lambda x, depth=depth: jnp.moveaxis(x[chosen], 0, depth),
            stack.adapters.layers[path],
        )
        gate = _gate(site, gates, experts, pools.get(name or ""), key)
        layers[path] = Mixture(experts, gate, gates.train_experts)
    mixed = Adapters(layers, pools, stack.adapters.axes)
    for _, _, ready in adapted_sites(model, mixed).values():
        eqx.filter_eval_shape(ready)  # what cannot be mixed is told here
    return mixed


def _entries(stack: Stack, ids: Any) -> Any:
    return list(range(1, len(stack))) if ids is None else ids


def _taken(tree: Any, i: Array) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


def _gate(
    site: Site, gates: GateKind, experts: Adapter, pool: Any, key: PRNGKeyArray | None
) -> Gate:
    """One gate, or those of a stack."""
    make = lambda experts, key: gates.init(site, experts, pool, key)
    if key is not None:
        key = fold_in_path(key, site.path)
        key = jr.split(key, site.stack) if site.stack else key
    for _ in site.stack:
        make = eqx.filter_vmap(make)
    return make(experts, key)


def _check_site(site: Site, pool: str | None, shares: bool) -> None:
    at = site.path or "the root"
    if site.kind not in ("linear", "conv", "lookup"):
        raise ValueError(
            f"{at} is an array that other code reads, so nobody sees its inputs, which the "
            "gates of a mixture need: stack adapters of layers alone, or weight them by "
            "lrjax.adapters.select(stack, ids, weights)."
        )
    if not shares:
        raise ValueError(
            f"The adapters at {at} have a pool {pool!r} each, and a mixture has one: make "
            "factors of each first, lrjax.adapters.as_lora(adapters, model), and stack "
            "these."
        )

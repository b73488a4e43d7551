import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from ..._sites import Site
from ..binding import KindRule, adapt, map_adapted, merge
from ..kinds.around import Biased, Magnitude
from ..kinds.factors import Factors
from ..kinds.full import FullCopy
from ..protocol import Adapter, AdapterKind, Adapters, innermost, map_adapters
from ._parts import over_parts
from .heads import (
    change_of,
    head_count,
    head_keys,
    head_shares,
    mean_change,
    merge_heads,
    part_of,
    shared_sum,
)
from .moments import KeepMoments, MomentRule
from .starts import start_here


class FoldRule(eqx.Module):
    """What becomes of a model, its adapters and their optimizer when one is folded."""

    @abc.abstractmethod
    def __call__(
        self,
        model: PyTree,
        adapters: Adapters,
        state: PyTree,
        *,
        key: PRNGKeyArray,
        weights: ArrayLike | None = None,
    ) -> tuple[PyTree, Adapters, PyTree]:
        """The model with the adapters in its weights, adapters at no change, a state.

        Args:
            model: that :func:`lrjax.adapt` saw.
            adapters: all of them, no half of a partition.
            state: of the optimizer of the trained half.
            key: for random numbers.
            weights: of heads, one for each on this device; see
                :func:`lrjax.adapters.merge_heads`.
        """


class Restart(FoldRule):
    """Merge the adapters, and begin with new ones: ``W ← W'``, then ``W + s B A`` anew.

    The new adapters are made by ``kind`` at the same paths, from the merged weights. What
    they start with is taken off the weights, ``W ← W' − s B₀ A₀``, so that the model is
    the same function as before, to the rounding of its weights: in bfloat16 what is less
    than a 2⁻⁹ of a weight is lost in each fold. Copies (:class:`lrjax.adapters.Full`) and
    biases go on as they are, and so do masks of ranks.

    After n folds the sum of all updates has rank up to ``(n + 1) r``. With which moments,
    and with which rates after a fold, is up to the other arguments: ReLoRA prunes and
    warms up again (:class:`lrjax.adapters.PruneMoments`, :func:`lrjax.adapters.rewarm`),
    a chain of LoRA begins with a new optimizer (:class:`lrjax.adapters.ResetMoments`).

    Args:
        kind: that the adapters were made with, or the rule ``(path, site) -> kind``.
        moments: the rule for the state of the optimizer.
        heads: whether adapters and state have a leading axis of heads, which were trained
            apart. Their mean change is merged (:func:`lrjax.adapters.merge_heads`), and
            each begins with numbers of its own.
        axis_name: under ``shard_map``, the axis of the mesh that heads lie along.
        mean: in place of the mean of heads, a rule of ``lrjax.merging`` that outliers
            cannot move; as in :func:`lrjax.adapters.merge_heads`.

    Raises:
        TypeError: if ``kind`` is neither.
        ValueError: for a kind that starts from data; for a ``mean`` without heads; when it
            folds, by path, for adapters that are not those of the model, or a quantized
            weight.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax, optax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> kind, tx = lrjax.LoRA(rank=2), optax.adam(1e-2)
        >>> adapters = lrjax.adapt(model, kind, key=jax.random.key(1))
        >>> state = tx.init(lrjax.partition(adapters)[0])
        >>> rule = lrjax.adapters.Restart(kind, lrjax.adapters.ResetMoments(tx))
        >>> model, adapters, state = rule(model, adapters, state, key=jax.random.key(2))

    Reference:
        V. Lialin et al., "ReLoRA: high-rank training through low-rank updates" (2023),
        arXiv:2307.05695; W. Xia, C. Qin, E. Hazan, "Chain of LoRA: efficient fine-tuning
        of language models via residual learning" (2024), arXiv:2401.04151. Never folded
        it is the training of the adapters.
    """

    kind: AdapterKind | KindRule
    moments: MomentRule
    heads: bool = eqx.field(static=True)
    axis_name: str | None = eqx.field(static=True)
    mean: Callable[..., PyTree] | None = eqx.field(static=True)

    def __init__(
        self,
        kind: AdapterKind | KindRule,
        moments: MomentRule | None = None,
        *,
        heads: bool = False,
        axis_name: str | None = None,
        mean: Callable[..., PyTree] | None = None,
    ):
        if not isinstance(kind, AdapterKind) and (
            isinstance(kind, type) or not callable(kind)
        ):
            raise TypeError(
                "Restart takes a kind such as lrjax.LoRA(rank=8), or a rule (path, site) "
                f"-> kind; got {kind!r}."
            )
        if isinstance(kind, AdapterKind) and kind.takes_data:
            start = getattr(kind, "start", kind)
            raise ValueError(
                f"Restart cannot begin anew with {type(kind).__name__}, which starts from "
                f"data ({type(start).__name__}): name another init=, or fold by hand, "
                "lrjax.adapt(lrjax.merge(model, adapters), kind, data=…)."
            )
        self.kind = kind
        self.moments = KeepMoments() if moments is None else moments
        if mean is not None and not heads:
            raise ValueError("Restart(mean=…) is a mean of heads: say heads=True as well.")
        self.heads, self.axis_name, self.mean = heads, axis_name, mean

    def __call__(self, model, adapters, state, *, key, weights=None):
        """Merge, begin anew, take off what the new ones start with."""
        if self.mean is not None:
            _check_no_copies(adapters)
        k_new, k_moments = jr.split(key)
        merged = merged_with(self, model, adapters, weights, self.mean)
        old = agreed(self, adapters, weights)
        begin = lambda old, key: self._new(merged, old, key)
        carry = lambda state, new, key: self.moments(state, adapters, new, key=key)
        if self.heads:
            count = head_count(adapters)
            k_new, k_moments = (
                head_keys(k, count, self.axis_name) for k in (k_new, k_moments)
            )
            begin = jax.vmap(begin)
            each = lambda state, old, new, key: self.moments(state, old, new, key=key)
            carry = lambda state, new, key: jax.vmap(each)(state, adapters, new, key)
        new = begin(old, k_new)
        return self._without(merged, new), new, carry(state, new, k_moments)

    def _new(self, model: PyTree, old: Adapters, key: PRNGKeyArray) -> Adapters:
        """New adapters, with what goes on of the old ones."""
        told = dict(old.axes)
        new = adapt(
            model,
            self.kind,
            where=lambda path, _: path in old.layers,
            axes=lambda path, _: told.get(path),
            key=key,
        )
        layers = {path: _carried(old.layers[path], own) for path, own in new.layers.items()}
        return Adapters(layers, new.pools, old.axes)

    def _without(self, model: PyTree, new: Adapters) -> PyTree:
        """The model without what adapters start with."""
        one = jax.tree.map(lambda x: x[0], new) if self.heads else new
        shares = head_shares(new, None, self.axis_name) if self.heads else jnp.ones(1)

        def put(site: Site, _: Adapter) -> Any:
            own, pool = part_of(new, site.path)
            own = innermost(own)  # lengths around it are those of the merged weight
            if isinstance(own, FullCopy):
                return site.layer
            if self.heads:
                start = mean_change(site, own, pool, shares, self.axis_name)
            else:
                start = change_of(site, own, pool)
            return site.put(site.read() - start, site.bias)

        return map_adapted(put, model, one)


class Continue(FoldRule):
    """Merge the adapters and train on from where they are: ``W ← W'``, ``B₀ A₀ ← B A``.

    ``W' = W + s (B A − B₀ A₀)`` with frozen ``B₀`` and ``A₀``
    (:func:`lrjax.adapters.start_here`), which become what the factors are. No number that
    is trained moves, so that the moments stay right as they are. The updates of one head
    telescope: whatever the number of folds, the change of H heads in all has rank up to
    ``H r``, and twice that if they started from other factors than zero.

    Args:
        heads: whether adapters and state have a leading axis of heads, which were trained
            apart, each on a part of the data. All weights become the mean, and copies and
            biases as well.
        axis_name: under ``shard_map``, the axis of the mesh that heads lie along.

    Raises:
        ValueError: when it folds, by path, for adapters that have no frozen start.

    Example:
        >>> import equinox as eqx, jax, lrjax, optax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> tx, kind = optax.adam(1e-2), lrjax.LoRA(rank=2)
        >>> one = lambda key: lrjax.adapt(model, kind, key=key)
        >>> heads = jax.vmap(one)(jax.random.split(jax.random.key(1), 4))
        >>> heads = lrjax.adapters.start_here(heads)
        >>> states = jax.vmap(tx.init)(lrjax.partition(heads)[0])
        >>> rule = lrjax.adapters.Continue(heads=True)
        >>> model, heads, states = rule(model, heads, states, key=jax.random.key(2))

    Reference:
        M. Huh et al., "Training neural networks from scratch with parallel low-rank
        adapters" (2024), arXiv:2402.16828. Folded in every step, by gradient descent and
        on the same data, it is one LoRA of rank ``H r``.
    """

    heads: bool = eqx.field(static=True, default=False)
    axis_name: str | None = eqx.field(static=True, default=None)

    def __call__(self, model, adapters, state, *, key, weights=None):
        """Merge, and count the changes from here."""
        merged = merged_with(self, model, adapters, weights)
        return merged, start_here(agreed(self, adapters, weights)), state


def merged_with(
    rule: Restart | Continue,
    model: PyTree,
    adapters: Adapters,
    weights: ArrayLike | None,
    mean: Callable[..., PyTree] | None = None,
) -> PyTree:
    """The model with the adapters, or the mean of the heads, in its weights."""
    if rule.heads:
        own = {"weights": weights, "mean": mean, "axis_name": rule.axis_name}
        return merge_heads(model, adapters, **own)
    if weights is not None:
        raise ValueError(
            f"{type(rule).__name__} got weights, which are those of heads, and has none: "
            "say heads=True."
        )
    return merge(model, adapters)


def agreed(
    rule: Restart | Continue, adapters: Adapters, weights: ArrayLike | None
) -> Adapters:
    """Heads with the mean of their copies and biases; all else as it is."""
    if not rule.heads:
        return adapters
    mean = mean_of_heads(head_shares(adapters, weights, rule.axis_name), rule.axis_name)

    beside = lambda own: own if isinstance(own, Magnitude) else jax.tree.map(mean, own)
    both = lambda _, own: over_parts(lambda inner: inner, beside, own)
    return map_adapters(both, adapters)


def _check_no_copies(adapters: Adapters) -> None:
    """Refuse numbers that go on by their mean, which an outlier moves."""
    whole = lambda x: isinstance(x, FullCopy | Biased)
    found = [
        path
        for path, own in adapters.layers.items()
        if any(map(whole, jax.tree.leaves(own, is_leaf=whole)))
    ]
    if found:
        raise ValueError(
            f"Restart(mean=…) takes the change of the weights alone, and {found} have "
            "copies or biases, which go on as their plain mean: leave these out."
        )


def mean_of_heads(
    shares: Float[Array, " h"], axis_name: str | None
) -> Callable[[Array], Array]:
    """What gives every head the mean of them all."""

    def mean(x: Array) -> Array:
        whole = shared_sum(shares, x, axis_name)[None]
        return jnp.broadcast_to(whole, x.shape).astype(x.dtype)

    return mean


def _carried(old: Adapter, new: Adapter) -> Adapter:
    """The new adapter, but for masks of ranks with their scales, copies and biases."""

    def inner(was: Any, now: Any) -> Any:
        both = isinstance(was, Factors) and isinstance(now, Factors)
        if both and was.mask is not None and was.mask.shape[-1] == now.pair.rank:
            return dataclasses.replace(now, mask=was.mask, scale=was.scale)
        return now

    beside = lambda was, now: now if isinstance(was, Magnitude) else was
    return over_parts(inner, beside, old, new)

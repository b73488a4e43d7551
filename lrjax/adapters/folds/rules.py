import abc
import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import PRNGKeyArray, PyTree

from ..._sites import Site
from ..adapt import KindRule, adapt
from ..bind import map_adapted, merge
from ..kinds.full import FullCopy
from ..kinds.magnitude import Magnitude
from ..kinds.pair import Factors
from ..protocol import Adapter, AdapterKind, innermost
from ..tree import Adapters, map_adapters
from ._parts import over_parts
from .heads import change_of, head_count, head_keys, mean_change, merge_heads, part_of
from .moments import KeepMoments, MomentRule
from .starts import start_here


class FoldRule(eqx.Module):
    """What becomes of a model, its adapters and their optimizer when one is folded."""

    @abc.abstractmethod
    def __call__(
        self, model: PyTree, adapters: Adapters, state: PyTree, *, key: PRNGKeyArray
    ) -> tuple[PyTree, Adapters, PyTree]:
        """The model with the adapters in its weights, adapters at no change, a state.

        Args:
            model: that :func:`lrjax.adapt` saw.
            adapters: all of them, no half of a partition.
            state: of the optimizer of the trained half.
            key: for random numbers.
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

    Raises:
        TypeError: if ``kind`` is neither.
        ValueError: for a kind that starts from data; when it folds, by path, for adapters
            that are not those of the model, or a quantized weight.

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

    def __init__(
        self,
        kind: AdapterKind | KindRule,
        moments: MomentRule | None = None,
        *,
        heads: bool = False,
        axis_name: str | None = None,
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
        self.heads, self.axis_name = heads, axis_name

    def __call__(self, model, adapters, state, *, key):
        """Merge, begin anew, take off what the new ones start with."""
        k_new, k_moments = jr.split(key)
        merged, old = merged_with(self, model, adapters), agreed(self, adapters)
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

        def put(site: Site, _: Adapter) -> Any:
            own, pool = part_of(new, site.path)
            own = innermost(own)  # lengths around it are those of the merged weight
            if isinstance(own, FullCopy):
                return site.layer
            if self.heads:
                start = mean_change(site, own, pool, self.axis_name)
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

    def __call__(self, model, adapters, state, *, key):
        """Merge, and count the changes from here."""
        merged = merged_with(self, model, adapters)
        return merged, start_here(agreed(self, adapters)), state


def merged_with(rule: Restart | Continue, model: PyTree, adapters: Adapters) -> PyTree:
    """The model with the adapters, or the mean of the heads, in its weights."""
    if not rule.heads:
        return merge(model, adapters)
    return merge_heads(model, adapters, axis_name=rule.axis_name)


def agreed(rule: Restart | Continue, adapters: Adapters) -> Adapters:
    """Heads with the mean of their copies and biases; all else as it is."""
    if not rule.heads:
        return adapters

    def mean(x):
        whole = jnp.mean(x, axis=0, keepdims=True)
        if rule.axis_name is not None:
            whole = lax.pmean(whole, rule.axis_name)
        return jnp.broadcast_to(whole, x.shape).astype(x.dtype)

    beside = lambda own: own if isinstance(own, Magnitude) else jax.tree.map(mean, own)
    both = lambda _, own: over_parts(lambda inner: inner, beside, own)
    return map_adapters(both, adapters)


def _carried(old: Adapter, new: Adapter) -> Adapter:
    """The new adapter, but for masks of ranks, copies and biases."""

    def inner(was: Any, now: Any) -> Any:
        both = isinstance(was, Factors) and isinstance(now, Factors)
        if both and was.mask is not None and was.mask.shape[-1] == now.pair.rank:
            return dataclasses.replace(now, mask=was.mask)
        return now

    beside = lambda was, now: now if isinstance(was, Magnitude) else was
    return over_parts(inner, beside, old, new)

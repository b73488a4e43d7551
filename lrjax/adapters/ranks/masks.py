import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Int, PyTree

from ...lowrank import LowRank
from ..kinds.factors import Factors
from ..protocol import Adapters, map_adapters, trained


def is_factors(x: Any) -> bool:
    """Whether a node is an adapter of two factors."""
    return isinstance(x, Factors)


def map_factors(f: Callable[[Factors], Any], tree: PyTree) -> PyTree:
    """``f`` of every adapter of two factors, inside others too; the rest as it is."""
    on_factors = lambda node: f(node) if is_factors(node) else node
    return jax.tree.map(on_factors, tree, is_leaf=is_factors)


def factors_of(tree: PyTree) -> list[Factors]:
    """The adapters of two factors in a tree."""
    return list(filter(is_factors, jax.tree.leaves(tree, is_leaf=is_factors)))


Ranks = ArrayLike | Sequence


def with_ranks(adapters: Adapters, ranks: Ranks | Mapping[str, Ranks]) -> Adapters:
    """Adapters of which the first columns alone are there: ``B[:, :b] A[:b]``.

    The mask of each adapter of two factors becomes ``1, …, 1, 0, …, 0`` with b ones. The
    columns behind it add nothing and have no gradient. The scale is that of rank b: of
    :class:`lrjax.LoRA` ``alpha / b``, or ``alpha / √b`` where it is rank stabilized. Ranks
    may be traced: sweeps over ranks, a random rank in each step, and layers of a stack
    with a rank each are one program. The columns stay what they are: layers that *start*
    from the best factors of their own rank have a kind each in :func:`lrjax.adapt`. So do
    those with ``init="orthogonal"``, whose product is zero of all columns together alone.

    Args:
        adapters: from :func:`lrjax.adapt`, all of them (not a half of a partition).
        ranks: b, for all; or ``{path: b}``, where other adapters stay as they are. For
            stacked layers b may have their leading axes ``(*b,)``: a rank for each.

    Returns:
        Adapters of the same factors, whose masks are frozen.

    Raises:
        ValueError: if there is no adapter of two factors, at a path of ``ranks`` or at
            all; for a rank that is negative, larger than that of the factors or no whole
            number, and for ranks that are not those of the layers of a stack.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.LoRA(rank=4), key=jax.random.key(1))
        >>> some = lrjax.adapters.with_ranks(adapters, {"layers.1": 3})
        >>> some["layers.1"].mask.tolist(), some["layers.0"].mask
        ([1.0, 1.0, 1.0, 0.0], None)

        Ranks that grow with the depth, for layers stacked for ``scan``:

        >>> layer = lambda key: eqx.nn.Linear(8, 8, key=key)
        >>> stack = eqx.filter_vmap(layer)(jax.random.split(jax.random.key(0), 5))
        >>> adapters = lrjax.adapt(stack, lrjax.LoRA(rank=12), key=jax.random.key(1))
        >>> deeper = lrjax.adapters.with_ranks(adapters, {"": [4, 6, 8, 10, 12]})
        >>> lrjax.adapters.active_ranks(deeper)[""].tolist()
        [4, 6, 8, 10, 12]

    Reference:
        M. Valipour et al., "DyLoRA: parameter efficient tuning of pre-trained models using
        dynamic search-free low-rank adaptation" (2022), arXiv:2210.07558; ranks by depth:
        N. Benedek, L. Wolf, "PRILoRA: pruned and rank-increasing low-rank adaptation"
        (2024), arXiv:2401.11316.
    """
    by_path = ranks if isinstance(ranks, Mapping) else dict.fromkeys(adapters.layers, ranks)
    able = {path for path, adapter in adapters.layers.items() if factors_of(adapter)}
    wrong = sorted(by_path.keys() - able) if isinstance(ranks, Mapping) else []
    if wrong or not able:
        where = wrong or sorted(adapters.layers)
        raise ValueError(
            f"with_ranks found no adapter of two factors at {where}: ranks belong to LoRA "
            f"and its relatives. Adapters of two factors are at {sorted(able)}."
        )

    def masked(path, adapter):
        if path not in by_path:
            return adapter
        put = lambda factors: dataclasses.replace(
            factors, mask=_prefix(path, factors, by_path[path])
        )
        return map_factors(put, adapter)

    return map_adapters(masked, adapters)


def _prefix(path: str, factors: Factors, rank: Ranks) -> Array:
    if factors.pair.left is None:
        raise ValueError(
            f"The adapter at {path!r} is only a part of one: put what lrjax.partition took "
            "apart together again with eqx.combine(params, frozen)."
        )
    *batch, _, columns = factors.pair.left.shape
    if not isinstance(rank, Tracer):
        known = np.asarray(rank)
        if not np.all((known >= 0) & (known <= columns) & (known == np.round(known))):
            raise ValueError(
                f"with_ranks got {rank} for {path!r}, of rank {columns}: it takes whole "
                f"numbers from 0 to {columns}."
            )
    if np.shape(rank) not in ((), tuple(batch)):
        layers = f"a stack {tuple(batch)} of layers" if batch else "no stack of layers"
        raise ValueError(
            f"with_ranks got ranks of shape {np.shape(rank)} for {path!r}, which is "
            f"{layers}: pass one rank, or one for each layer of a stack, "
            "{path: [4, 8, …]}."
        )
    rank = jnp.broadcast_to(jnp.asarray(rank), batch)[..., None]
    index = jnp.arange(columns).reshape(*(1,) * len(batch), columns)
    return (index < rank).astype(factors.scale.dtype)


def active_ranks(adapters: Adapters) -> dict[str, Int[Array, "*b"]]:
    """How many columns of each adapter are in use: neither masked nor with a zero gate.

    Args:
        adapters: from :func:`lrjax.adapt`, or the trained half of them.

    Returns:
        ``{path: rank}`` of the adapters of two factors, a rank for each layer of a stack.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.LoRA(rank=4), key=jax.random.key(1))
        >>> two = lrjax.adapters.with_ranks(adapters, 2)
        >>> {path: rank.item() for path, rank in lrjax.adapters.active_ranks(two).items()}
        {'layers.0': 2, 'layers.1': 2, 'layers.2': 2}
    """
    found = {path: factors_of(adapter) for path, adapter in adapters.layers.items()}
    return {path: _active(nodes[0]) for path, nodes in found.items() if nodes}


def _active(factors: Factors) -> Array:
    right = factors.pair.right
    used = jnp.ones((*right.shape[:-2], right.shape[-1]), bool)
    if factors.gate is not None:
        used &= factors.gate != 0
    if factors.mask is not None:
        used &= factors.mask >= 1
    return jnp.sum(used, axis=-1)


def gates(params: PyTree) -> PyTree:
    """Where the gates of adapters are: a tree of bools, for ``optax.masked``.

    Args:
        params: adapters, the trained half of them, or updates of these.

    Returns:
        The same structure, True for the gates and False for all else.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> kind = lrjax.adapters.SoRA(rank=2)
        >>> params, _ = lrjax.partition(lrjax.adapt(model, kind, key=jax.random.key(1)))
        >>> marks = lrjax.adapters.gates(params)[""]
        >>> marks.gate, marks.pair.left
        (True, False)
    """

    def mark(node: Any) -> Any:
        if not is_factors(node):
            return False
        return trained(node, *([] if node.gate is None else [lambda a: a.gate]))

    return jax.tree.map(mark, params, is_leaf=is_factors)


def drop_ranks(adapters: Adapters) -> Adapters:
    """The same adapters without the columns that are masked or have a zero gate.

    The adapted model stays as it is and the factors become thinner. Layers of a stack
    keep as many columns as the one with most needs; an adapter keeps at least one. Not
    under ``jit``: shapes depend on the numbers.

    Args:
        adapters: from :func:`lrjax.adapt`, trained, all of them.

    Returns:
        Adapters with as many columns as are in use.

    Raises:
        ValueError: under ``jit``.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.LoRA(rank=4), key=jax.random.key(1))
        >>> thin = lrjax.adapters.drop_ranks(lrjax.adapters.with_ranks(adapters, 2))
        >>> thin["layers.0"].pair.rank, thin["layers.0"].mask
        (2, None)
    """
    used = lambda own: own.mask if own.start is not None else own.weights()
    return map_factors(lambda own: _thinner(own, used(own)), adapters)


def without_masked(tree: PyTree) -> PyTree:
    """Adapters without the columns that a mask takes away; those of zero gates stay."""
    return map_factors(lambda own: _thinner(own, own.mask), tree)


def _thinner(factors: Factors, weights: Array | None) -> Factors:
    """The columns where the weights are not zero."""
    if weights is None or factors.thinning is not None:
        return factors
    if isinstance(weights, Tracer):
        raise ValueError(
            "drop_ranks was called under jit or vmap, where the number of columns in use "
            "is not known: call it on the arrays themselves, after training."
        )
    used = np.asarray(weights) != 0
    width = max(int(used.sum(axis=-1).max()), 1)
    order = np.argsort(~used, axis=-1, kind="stable")[..., :width]
    take = lambda x: None if x is None else jnp.take_along_axis(x, order, axis=-1)
    columns = lambda pair: LowRank(
        *(
            jnp.take_along_axis(x, order[..., None, :], axis=-1)
            for x in (pair.left, pair.right)
        )
    )
    mask, scale = take(factors.mask), factors.scale
    if mask is not None:  # the scale is that of all columns, and there are fewer now
        scale = scale * (factors.pair.rank / width) ** factors.power
        mask = None if bool(jnp.all(mask == 1)) else mask
    return dataclasses.replace(
        factors,
        pair=columns(factors.pair),
        start=None if factors.start is None else columns(factors.start),
        scale=scale,
        gate=take(factors.gate),
        mask=mask,
    )

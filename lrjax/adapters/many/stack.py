from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, PyTree

from .._settings import checked_rank
from ..binding import adapted_sites
from ..protocol import Adapters, Pool
from ._alike import entry, stacked


BASE = "__base__"


class Stack(eqx.Module):
    """Many adapters of one model as one, with a leading axis, by name or number.

    A tree of arrays: it is saved, sharded and passed to compiled functions like any other.
    Entry 0 is ``"__base__"``, the model as it is.

    Attributes:
        adapters: each leaf with a leading axis of all entries, pools in ``shared`` apart.
        names: of the entries.
        shared: the names of the pools that all entries share.
    """

    adapters: Adapters
    names: tuple[str, ...] = eqx.field(static=True)
    shared: tuple[str, ...] = eqx.field(static=True, default=())

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str | int | ArrayLike | Sequence[str | int]) -> Any:
        """The number of a name, or the numbers of several.

        Args:
            name: a name or a number, or a list, or an integer array of any shape.

        Returns:
            An ``int``, or an array of the shape given. A traced one has 0, the base, in
            place of numbers that are out of range: nothing can be raised there.

        Raises:
            KeyError: for a name that is not there.
            IndexError: for a number that is out of range.
            TypeError: for what is neither a name nor an integer.
        """
        if isinstance(name, str):
            if name not in self.names:
                raise KeyError(f"No adapter {name!r} in the stack: it has {self._said()}.")
            return self.names.index(name)
        if isinstance(name, (list, tuple)):
            return jnp.array([self.index(one) for one in name], jnp.int32)
        ids = name if isinstance(name, (Tracer, jax.Array)) else np.asarray(name)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(
                f"An adapter is chosen by a name or an integer, got {ids.dtype}: the stack "
                f"has {self._said()}."
            )
        if isinstance(ids, Tracer):
            return jnp.where((ids >= 0) & (ids < len(self)), ids, 0)
        if np.any((np.asarray(ids) < 0) | (np.asarray(ids) >= len(self))):
            raise IndexError(
                f"The stack has entries 0 to {len(self) - 1}, {self._said()}; got "
                f"{np.asarray(ids).tolist()}."
            )
        return ids if ids.ndim else int(ids)

    def _said(self) -> str:
        some = [f"{i} {name!r}" for i, name in enumerate(self.names[:20])]
        return ", ".join([*some, *["…"] * (len(self) > 20)])


def stack(
    adapters: Mapping[str, Adapters] | Sequence[Adapters],
    model: PyTree,
    *,
    pad_rank: int | None = None,
) -> Stack:
    """Many adapters of one model as one tree with a leading axis, to serve or train them.

    Entry 0 is ``"__base__"``, the model as it is, for requests without an adapter; the
    others follow by name. :func:`select` takes one of them out, by a number that may be
    traced, so that ``vmap`` serves a batch in which every example has its own::

        stack = lrjax.adapters.stack({"poet": one, "coder": other}, model)

        def answer(i, x):
            return lrjax.bind(model, lrjax.adapters.select(stack, i))(x)

        jax.vmap(answer)(stack.index(["poet", "__base__", "coder"]), xs)

    Factors of different ranks get as many columns as the widest, under a mask; an adapter
    without a layer that others have changes nothing there, nor does an empty
    ``Adapters({})``, a place to be filled by :func:`swap`. Adapters of different kinds at a
    layer become plain factors, if all are products of such. A frozen pool that all have
    alike (VeRA of one key) is there once; others, as trained ones, once for each.

    To train all of them, take :func:`lrjax.partition` of ``stack.adapters``: every leaf of
    parameters, gradients and moments has the leading axis. An adapter that a batch does not
    call has zero gradients, and entry 0 always.

    Args:
        adapters: by name, or a list, whose names are ``"1"``, ``"2"``, ….
        model: the model that they were made for.
        pad_rank: columns to have at least, so that wider adapters fit in later.

    Returns:
        A :class:`Stack` of one entry more than there are adapters.

    Raises:
        ValueError: by name for adapters that do not fit the model, by path for kinds that
            are no stack; for no adapters, or one that is called ``"__base__"``.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> one, two = (
        ...     lrjax.adapt(model, lrjax.LoRA(r), key=jax.random.key(r)) for r in (2, 4))
        >>> stack = lrjax.adapters.stack({"one": one, "two": two}, model)
        >>> len(stack), stack.index("two"), stack.adapters["layers.0"].pair.left.shape
        (3, 2, (3, 16, 4))

    Reference:
        Y. Sheng et al., "S-LoRA: serving thousands of concurrent LoRA adapters" (2023),
        arXiv:2311.03285. That ``select`` gives each of them back is tested for every kind.
    """
    named = _named(adapters)
    pad = 0 if pad_rank is None else checked_rank("stack", pad_rank, "pad_rank")
    found = {name: _sites(name, model, own) for name, own in named.items()}
    sites = {path: site for own in found.values() for path, (site, *_) in own.items()}
    layers = {}
    for path, site in sites.items():
        row = {
            name: (own[path][1], named[name].pools.get(own[path][1].pool_name() or ""))
            if path in own
            else None
            for name, own in found.items()
        }
        layers[path] = stacked(site, row, pad)
    groups = {own.pool_name() for own in layers.values()}
    pools, shared = {}, []
    for name in sorted(filter(None, groups)):
        pools[name], is_shared = _pool(
            [own.pools.get(name) for own in named.values()], name
        )
        shared += [name] * is_shared
    axes = dict(pair for own in named.values() for pair in own.axes)
    whole = Adapters(layers, pools, tuple(axes.items()))
    return Stack(whole, (BASE, *named), tuple(shared))


def swap(stack: Stack, name: str | int, adapters: Adapters, model: PyTree) -> Stack:
    """The stack with another adapter in the place of one, in the same shapes.

    Functions that were compiled for the stack run on without being compiled again. What is
    narrower than the stack is padded, and what has no adapter at a layer changes nothing
    there: ``Adapters({})`` empties a place. The name of the place stays.

    Args:
        stack: from :func:`stack`.
        name: of the place, or its number, known outside of ``jit``.
        adapters: what comes there.
        model: the model that all of them were made for.

    Returns:
        A stack of the same structure, shapes and dtypes.

    Raises:
        ValueError: for the base; by path, for a rank above that of the stack, a layer that
            it has no adapter for, another kind; by name, for another pool than the one that
            its entries share.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> one, two = (
        ...     lrjax.adapt(model, lrjax.LoRA(r), key=jax.random.key(r)) for r in (2, 4))
        >>> stack = lrjax.adapters.stack({"one": one}, model, pad_rank=4)
        >>> new = lrjax.adapters.swap(stack, "one", two, model)
        >>> jax.tree.structure(new) == jax.tree.structure(stack)
        True
    """
    i = stack.index(name)
    if not isinstance(i, int):
        raise ValueError(f"swap puts one adapter into one place, got {name!r}.")
    if i == 0:
        raise ValueError(f"Entry 0 of a stack is {BASE!r}, the model: it is not swapped.")
    whole, found = stack.adapters, _sites(stack.names[i], model, adapters)
    odd = sorted(found.keys() - whole.layers.keys())
    if odd:
        raise ValueError(
            f"The stack has no adapters at {odd}: make it anew with one that has them, "
            "lrjax.adapters.stack."
        )
    at = lambda tree, j: jax.tree.map(lambda x: x[j], tree)
    put = lambda tree, one: jax.tree.map(
        lambda x, y: x.at[jnp.asarray(i)].set(y), tree, one
    )
    layers, zero = {}, jnp.asarray(0)
    for path, old in whole.layers.items():
        like = at(old, zero)
        if path in found:
            site, own, _ = found[path]
            pool = adapters.pools.get(own.pool_name() or "")
            like = entry(site, own, pool, like)
        layers[path] = put(old, like)
    pools = dict(whole.pools)
    for group in {own.pool_name() for own in layers.values()} - {None}:
        new, old = adapters.pools.get(group), pools[group]
        if new is None:
            continue
        if group not in stack.shared:
            pools[group] = put(old, new)
        elif not _equal(new, old):
            raise ValueError(
                f"The entries of the stack share the pool {group!r}, and the adapter for "
                f"{stack.names[i]!r} has another one: adapt it with the same key, or make "
                "the stack anew with it, lrjax.adapters.stack, for a pool each."
            )
    return Stack(Adapters(layers, pools, whole.axes), stack.names, stack.shared)


def _named(adapters: Any) -> dict[str, Adapters]:
    if not isinstance(adapters, Mapping):
        adapters = {str(i): own for i, own in enumerate(adapters, 1)}
    if not adapters or not all(isinstance(own, Adapters) for own in adapters.values()):
        raise ValueError(
            "stack takes Adapters by name, or a list of them, at least one: "
            f"got { ({name: type(own).__name__ for name, own in adapters.items()}) }."
        )
    if BASE in adapters:
        raise ValueError(
            f"{BASE!r} is the name of entry 0, the model as it is, which stack adds "
            "itself: give the adapter another name."
        )
    return dict(adapters)


def _sites(name: str, model: PyTree, adapters: Adapters) -> dict[str, Any]:
    try:
        return adapted_sites(model, adapters)
    except ValueError as error:
        raise ValueError(f"Of the adapters {name!r}: {error}") from error


def _pool(found: list[Pool | None], name: str) -> tuple[Pool, bool]:
    """One pool for all if it is frozen and the same, else one for each, and which it is."""
    there = [pool for pool in found if pool is not None]
    first, trains = there[0], any(jax.tree.leaves(there[0].trainable()))
    if not trains and all(_equal(first, pool) for pool in there[1:]):
        return first, True
    row = [first, *(first if pool is None else pool for pool in found)]
    shapes = {tuple(x.shape for x in jax.tree.leaves(pool)) for pool in row}
    if len(shapes) > 1 or len({jax.tree.structure(pool) for pool in row}) > 1:
        raise ValueError(
            f"The pools {name!r} of the adapters have different shapes {sorted(shapes)}: "
            "keep a stack for each, or make factors of them first, "
            "lrjax.adapters.as_lora(adapters, model)."
        )
    return jax.tree.map(lambda *xs: jnp.stack(xs), *row), False


def _equal(one: Pool, other: Pool) -> bool:
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=False))
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    return all(x is y or _same_values(x, y) for x, y in pairs)


def _same_values(x: Array, y: Array) -> bool:
    if isinstance(x, Tracer) or isinstance(y, Tracer):
        return False
    return np.array_equal(np.asarray(x), np.asarray(y))

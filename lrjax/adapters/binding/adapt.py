import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from ..._arguments import check_key
from ..._sharding import placed_along
from ..._sites import (
    Axes,
    Site,
    Where,
    check_used_once,
    find_sites,
    fold_in_path,
    in_turn,
    pick,
)
from ...lowrank import LowRank, is_low_rank
from ..protocol import Adapter, AdapterKind, Adapters, Pool
from ._stacks import for_each, joined


KindRule = Callable[[str, Site], AdapterKind | Sequence | None]
_Chosen = dict[str, tuple[Site, list[AdapterKind | None]]]  # one kind for all, or each


def adapt(
    model: PyTree,
    kind: AdapterKind | KindRule,
    *,
    where: Where = None,
    axes: Axes | None = None,
    key: PRNGKeyArray,
    data: Mapping[str, Any] | None = None,
) -> Adapters:
    """Build an adapter for every layer that ``where`` picks; the model is not changed.

    Layers are ``eqx.nn.Linear``, ``Conv`` and ``Embedding`` anywhere in the model, so also
    the projections inside ``eqx.nn.MultiheadAttention``, layers made with
    ``eqx.filter_vmap`` and run by ``lax.scan`` (their weight has leading axes, and so
    have the factors), and layers of own classes (:func:`lrjax.adapters.register_layer`).
    All other floating-point arrays stand beside the layers and can be picked by ``where``:
    expert stacks, recurrent cells, the parameters of Flax. An array of two axes is read
    as ``(out, in)``, or ``(in, out)`` if it is called ``kernel``; of one of more axes
    ``axes`` has to tell which make the matrix.

    By default every Linear is picked (in a tree without layers every array named
    ``kernel``) but heads, embeddings and routers. These are told by name: a part of the
    path that is ``head``, ``…_head``, ``classifier``, ``logits``, ``score``, ``wte`` or
    ``wpe``, contains ``embed``, or is a ``router``. The last layer of an ``eqx.nn.MLP``
    has no such name and is picked.

    Args:
        model: a module or a tree of parameters.
        kind: for instance ``lrjax.LoRA(rank=8)``; or a rule ``(path, site) -> kind or
            None``, which is asked about every site if there is no ``where``. The ``site``
            has ``kind``, ``shape``, ``stack`` and ``layer``. For stacked layers it may
            answer with a list, one for each of them, which differ in their rank and in
            all that is a number: :class:`lrjax.LoRA` of other ranks, or ``None``.
        where: ``(path, layer) -> bool``; or a regular expression for the whole path; or a
            list of names, each a path or its end, as in PEFT. A path is
            ``"blocks.0.attention.query_proj"``.
        axes: ``(path, array) -> lrjax.MatrixSpec`` or ``None``, asked about each array:
            its rows are the output axes, its columns the input axes, the others stack
            layers, heads or experts.
        key: folded with a hash of each path, so that a layer starts the same whatever else
            is adapted.
        data: ``{path: statistic}`` for kinds that start from gradients or activations;
            of stacked layers with the same leading axes in all its arrays.

    Returns:
        ``Adapters``: a tree to :func:`partition`, :func:`bind` and :func:`merge`;
        ``print(adapters.summary())`` lists what was picked.

    Raises:
        ValueError: if nothing is picked (the message names what could be), or what is
            picked cannot be adapted: a transposed convolution, a weight tied by
            ``eqx.nn.Shared`` or present twice in the tree, not real floating point, an
            array of more than two axes that ``axes`` says nothing of; kinds of the layers
            of a stack that differ in more than rank and numbers. If ``data`` lacks a
            path whose kind needs it, or has one more.
        TypeError: if ``kind`` is no kind or ``key`` no key.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.LoRA(rank=2), key=jax.random.key(1))
        >>> print(adapters.summary())
        path        matrix    rank  trainable
        layers.0    (16, 4)      2         40
        layers.1    (16, 16)     2         64
        layers.2    (3, 16)      2         38
        3 adapters                        142

        Heads stored as an axis of their own, as in Flax:

        >>> params = {"query": {"kernel": jax.numpy.ones((32, 4, 8))}}
        >>> spec = lrjax.MatrixSpec(rows=(1, 2), cols=(0,))
        >>> adapters = lrjax.adapt(
        ...     params, lrjax.LoRA(2), axes=lambda path, x: spec, key=jax.random.key(0))
        >>> adapters["query.kernel"].pair.shape
        (32, 32)

        Layers stacked for ``scan``, with a rank each:

        >>> layer = lambda key: eqx.nn.Linear(8, 8, key=key)
        >>> stack = eqx.filter_vmap(layer)(jax.random.split(jax.random.key(0), 3))
        >>> each = lambda path, site: [lrjax.LoRA(rank) for rank in (2, 4, 8)]
        >>> print(lrjax.adapt(stack, each, key=jax.random.key(1)).summary())
        path        matrix     rank  trainable
        (root)      (3, 8, 8)   2–8        224
        1 adapters                         224

    Reference:
        E. Hu et al., "LoRA: low-rank adaptation of large language models" (2021),
        arXiv:2106.09685.
    """
    _check_arguments(kind, key)
    rule = None if isinstance(kind, AdapterKind) else kind
    sites = find_sites(model, axes)
    if rule is None and not kind.takes_vectors:
        sites = {path: site for path, site in sites.items() if site.kind != "vector"}
    if rule is None or where is not None:
        sites = pick(sites, where)
    kinds = {path: kind if rule is None else rule(path, s) for path, s in sites.items()}
    chosen = _checked(kinds, sites)
    check_used_once(model, chosen)
    data = _checked_data(chosen, data or {})
    pools = _pools(chosen, key)
    layers = {
        path: _init(site, kinds, fold_in_path(key, path), pools, data.get(path))
        for path, (site, kinds) in chosen.items()
    }
    told = ((path, getattr(site, "told", None)) for path, (site, _) in chosen.items())
    return Adapters(layers, pools, tuple((p, spec) for p, spec in told if spec is not None))


def _init(site: Site, kinds: list, key: PRNGKeyArray, pools: dict, data: Any) -> Adapter:
    """One adapter, or a stack of them; the weights are read only if the kind asks."""
    if any(kind is not kinds[0] for kind in kinds):
        return placed(_init_each(site, kinds, key, pools, data), site)
    kind = kinds[0]
    pool = pools.get(kind.pool_name())
    make = lambda key, data, *index: kind.init(
        site.at(index) if index else site, key=key, pool=pool, data=data
    )
    keys, indices = key, ()
    if site.stack:
        keys, indices = jr.split(key, site.stack), tuple(jnp.indices(site.stack))
    for _ in site.stack:
        make = in_turn(make) if site.is_quantized else jax.vmap(make)
    return placed(make(keys, data, *indices), site)


def _init_each(
    site: Site, kinds: list, key: PRNGKeyArray, pools: dict, data: Any
) -> Adapter:
    """A stack of adapters of a kind each; a layer starts as with one kind for all."""
    keys, found = jr.split(key, site.stack), {}
    for index, kind in zip(np.ndindex(site.stack), kinds, strict=True):
        if kind is not None:
            own = jax.tree.map(lambda x, index=index: x[index], data)
            one = site.at(tuple(map(jnp.asarray, index)))
            pool = pools.get(kind.pool_name())
            found[index] = kind.init(one, key=keys[index], pool=pool, data=own)
    return joined(site, found, len(site.stack))


def placed(adapter: Adapter, site: Site) -> Adapter:
    """Factors sharded as the axes of the weight they belong to, on Explicit meshes."""
    found = site.matrix_axes()
    if found is None:
        return adapter
    weight, stack, rows, cols = found
    shape = (*site.stack, *site.shape)

    def place(node: Any) -> Any:
        if not is_low_rank(node) or node.shape != shape:
            return node
        return LowRank(
            placed_along(node.left, weight, (*stack, rows, None)),
            placed_along(node.right, weight, (*stack, cols, None)),
        )

    return jax.tree.map(place, adapter, is_leaf=is_low_rank)


def _pools(chosen: _Chosen, key) -> dict[str, Pool]:
    groups = collections.defaultdict(list)
    for site, kinds in chosen.values():
        for kind in _different(kinds):
            if kind.pool_name() is not None:
                groups[kind.pool_name()].append((site, kind))
    pools = {}
    for name, members in groups.items():
        kinds = [kind for _, kind in members]
        if any(jax.tree.structure(k) != jax.tree.structure(kinds[0]) for k in kinds):
            raise ValueError(
                f"Kinds of different settings share the pool {name!r}: give each a name "
                "of its own, as in lrjax.VeRA(rank=64, group='wide')."
            )
        sites = [site for site, _ in members]
        pools[name] = kinds[0].init_pool(sites, key=fold_in_path(key, name))
    return pools


def _check_arguments(kind: Any, key: Any) -> None:
    if isinstance(kind, type):
        raise TypeError(
            f"adapt takes a kind with its settings, got the class: write "
            f"{kind.__name__}() or name some, as in lrjax.LoRA(rank=8)."
        )
    if not isinstance(kind, AdapterKind) and not callable(kind):
        raise TypeError(
            f"adapt takes a kind such as lrjax.LoRA(rank=8), or a rule (path, site) -> "
            f"kind; got {kind!r}."
        )
    check_key("adapt", key)


def _different(kinds: list[AdapterKind | None]) -> list[AdapterKind]:
    """Each kind once."""
    return list({id(kind): kind for kind in kinds if kind is not None}.values())


def _checked(kinds: dict[str, Any], sites: dict[str, Site]) -> _Chosen:
    """Sites with the kinds of their matrices, those without any left out."""
    chosen = {}
    for path, answer in kinds.items():
        if answer is None:
            continue
        site = sites[path]
        site.check()
        each = for_each(path, answer, site.stack)
        for kind in each:
            _check_kind(path, site, kind)
        if _different(each):
            chosen[path] = (site, each)
    if not chosen:
        raise ValueError(
            "The rule given as kind= answered None for every site: nothing is adapted."
        )
    return chosen


def _check_kind(path: str, site: Site, kind: Any) -> None:
    """Refuse what is no kind, or none for a vector."""
    if kind is not None and not isinstance(kind, AdapterKind):
        raise TypeError(
            f"The rule given as kind= must answer with a kind such as lrjax.LoRA(8) "
            f"or None, got {kind!r} for {path or 'the root'}."
        )
    if kind is not None and site.kind == "vector" and not kind.takes_vectors:
        raise ValueError(
            f"{path or 'the root'} is a vector {site.layer.shape}, which "
            f"{type(kind).__name__} cannot adapt: lrjax.adapters.Full can."
        )


def _checked_data(chosen: _Chosen, data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The statistics, one for each site with a kind that needs one and no more."""
    takers = {
        path: [kind for kind in _different(kinds) if kind.takes_data]
        for path, (_, kinds) in chosen.items()
    }
    need = {path for path, own in takers.items() if own}
    if missing := sorted(need - data.keys()):
        name = type(takers[missing[0]][0]).__name__
        raise ValueError(
            f"{name} starts from data, and data= has nothing for {missing}: pass "
            f"{{path: statistic}}; it has {sorted(data)}."
        )
    if unused := sorted(data.keys() - need):
        raise ValueError(
            f"data= has {unused}, where no adapter starts from data: the paths that do "
            f"are {sorted(need)}."
        )
    for path in data:
        stack = chosen[path][0].stack
        shapes = [jnp.shape(x) for x in jax.tree.leaves(data[path])]
        if any(shape[: len(stack)] != stack for shape in shapes):
            raise ValueError(
                f"data= has arrays of shape {shapes} for {path!r}, which is a stack "
                f"{stack} of layers: its arrays must begin with these axes."
            )
    return data

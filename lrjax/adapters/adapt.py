import collections
import zlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import PRNGKeyArray, PyTree

from ._protocol import Adapter, AdapterKind
from ._sites import default_where, describe, matrix, sites, weight_of


class Adapters(eqx.Module):
    """Adapters by the path of the layer they belong to, and the pool that they share.

    Attributes:
        layers: ``{path: adapter}``.
        shared: arrays that all of them use, or ``None``.
    """

    layers: dict[str, Adapter]
    shared: PyTree = None

    def __getitem__(self, path: str) -> Adapter:
        if path not in self.layers:
            raise KeyError(f"No adapter at {path!r}; there are {sorted(self.layers)}.")
        return self.layers[path]

    def summary(self) -> str:
        """A listing: path, matrix shape, rank and trainable numbers of each adapter."""
        rows = [("path", "matrix", "rank", "trainable")]
        total = 0
        for path, adapter in self.layers.items():
            numbers = _count(eqx.filter(adapter, adapter.trainable()))
            total += numbers
            pair = (adapter.factors() or (None,))[0]
            shape, rank = ("", "") if pair is None else (pair.shape, pair.rank)
            rows.append((path or "(root)", str(shape), str(rank), f"{numbers:,}"))
        rows.append((f"{len(self.layers)} adapters", "", "", f"{total:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def _count(tree: PyTree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree) if eqx.is_array(x))


def adapt(
    model: PyTree,
    kind: AdapterKind,
    *,
    where: Callable[[str, Any], bool] = default_where,
    key: PRNGKeyArray,
) -> Adapters:
    """Build an adapter for every layer that ``where`` picks; the model is not changed.

    Layers are ``eqx.nn.Linear``, ``Conv`` and ``Embedding`` anywhere in the model, so also
    the projections inside ``eqx.nn.MultiheadAttention`` and layers made with
    ``eqx.filter_vmap`` and run by ``lax.scan`` (their weight has leading axes, and so
    have the factors). In a tree without such layers (a dict, Flax parameters) the
    arrays with two or more axes are adapted, leading axes counting as a stack; those
    named ``kernel`` are read as ``(in, out)``, others as ``(out, in)``.

    By default every Linear (or ``kernel`` array) is picked but heads and embeddings. These
    are told by name: a part of the path that is ``head``, ``…_head``, ``classifier``,
    ``logits``, ``score``, ``wte`` or ``wpe``, or contains ``embed``. The last layer
    of an ``eqx.nn.MLP`` has no such name and is picked.

    Args:
        model: a module or a tree of parameters.
        kind: for instance ``lrjax.LoRA(rank=8)``.
        where: ``(path, layer) -> bool``; a path is ``"blocks.0.attention.query_proj"``.
        key: folded with a hash of each path, so that a layer starts the same whatever else
            is adapted.

    Returns:
        ``Adapters``: a tree to :func:`partition`, :func:`bind` and :func:`merge`;
        ``print(adapters.summary())`` lists what was picked.

    Raises:
        ValueError: if nothing is picked (the message names what could be), or what is
            picked cannot be adapted: a transposed convolution, a weight tied by
            ``eqx.nn.Shared`` or present twice in the tree, or not floating point.

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

    Reference:
        E. Hu et al., "LoRA" (2021), arXiv:2106.09685.
    """
    candidates = sites(model)
    picked = {path: site for path, site in candidates.items() if where(path, site)}
    if not picked:
        raise ValueError(_nothing_picked(candidates))
    _check_adaptable(picked, model)
    bases = {path: matrix(site, path) for path, site in picked.items()}
    shapes = {p: jax.ShapeDtypeStruct(b.shape, b.dtype) for p, b in bases.items()}
    shared = kind.init_shared(shapes, key=key)
    layers = {
        path: kind.init(
            base,
            key=fold_in_path(key, path),
            lookup=isinstance(picked[path], eqx.nn.Embedding),
            shared=shared,
        )
        for path, base in bases.items()
    }
    return Adapters(layers, shared)


def fold_in_path(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
    """A key of its own for the layer at ``path``."""
    return jr.fold_in(key, zlib.crc32(path.encode()))


def _nothing_picked(candidates: dict[str, Any]) -> str:
    if not candidates:
        return (
            "adapt found nothing to adapt: the tree holds no eqx.nn.Linear, Conv or "
            "Embedding and no floating-point array with two axes."
        )
    names = [f"{path or '(root)'}: {describe(s)}" for path, s in candidates.items()]
    more = f"\n  … and {len(names) - 20} more" if len(names) > 20 else ""
    return (
        "where= picked nothing. By default every eqx.nn.Linear (in trees of parameters "
        "every array named 'kernel') is taken but heads and embeddings. There are:\n  "
        + "\n  ".join(names[:20])
        + more
        + "\nPass where=lambda path, layer: … that is true for some of them."
    )


def _check_adaptable(picked: dict[str, Any], model: PyTree) -> None:
    uses = collections.Counter(id(x) for x in jax.tree.leaves(model) if eqx.is_array(x))
    for path, site in picked.items():
        at, weight = path or "the root", weight_of(site)
        if isinstance(site, eqx.nn.ConvTranspose):
            raise ValueError(
                f"{at} is a {type(site).__name__}: transposed convolutions are not "
                "adapted. Exclude it with where=."
            )
        if not eqx.is_array(weight):
            raise ValueError(
                f"The weight of {at} is tied to another layer by eqx.nn.Shared: adapt the "
                "layer that keeps the weight; this one follows."
            )
        if not eqx.is_inexact_array(weight):
            raise ValueError(
                f"The weight of {at} must be floating point, got {weight.dtype}. Exclude "
                "it with where=, or dequantize it first."
            )
        if uses[id(weight)] > 1:
            raise ValueError(
                f"The weight of {at} is in the tree {uses[id(weight)]} times: adapting "
                "one of them would untie them without a word. Tie them with "
                "eqx.nn.Shared, or copy the layer if they are not meant to be tied "
                "(jax.tree.map(jnp.copy, layer))."
            )

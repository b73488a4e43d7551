import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from .._arguments import check_key
from .._sharding import einsum
from ..linalg import nonzero, working_dtype
from ..lowrank import LowRank
from ._changes import Weights, checked_weights, map_changes
from .weighted_sum import weighted_sum


class ColumnNetwork(eqx.Module):
    """A network that merges changes column by column, with coefficients of its own.

        Δ = Σ_k Δ_k diag(c_k),   c_j = U relu(Σ_k V_k Δ_k[:, j] + v) + u

    for every matrix ``Δ_k (m, n)`` of a tree: what column j is in all K changes decides the
    K numbers that it is multiplied with. Trained on many sets of changes by
    :func:`lrjax.merging.column_loss`, it merges a new set at once. Matrices with as many
    rows share ``V (K, hidden, m)``, ``v``, ``U (K, hidden)`` and ``u``. It starts as the
    sum, ``U = 0`` and ``u = 1``.

    No dense change is formed of factors: the first layer acts on the left ones, ``V Δ_k =
    (V left_k) right_kᵀ``, and in the merge the rows of the right ones are multiplied. A
    network is a rule for adapters, too: ``lrjax.adapters.combine(…, rule=network)``.

    Args:
        changes: K trees of one structure, of :class:`lrjax.LowRank` nodes ``(*b, m, n)``
            and arrays; of later ones only the widths of nodes may differ.
        hidden: the width of the network.
        where: ``path -> bool``, which leaves are merged so; others, and vectors, are added.
        key: of the first layers.

    Raises:
        ValueError: for trees that differ in structure or in shapes, no matrix in them, or
            later another number of trees.
        TypeError: for what is no key.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> one = {"w": lrjax.LowRank(jnp.ones((3, 1)), jnp.ones((2, 1)))}
        >>> two = {"w": lrjax.LowRank(jnp.eye(3)[:, :2], jnp.eye(2))}
        >>> network = lrjax.merging.ColumnNetwork([one, two], key=jax.random.key(0))
        >>> network([one, two])["w"].materialize().tolist()
        [[2.0, 1.0], [1.0, 2.0], [1.0, 1.0]]

    Reference:
        D. Shenaj, O. Bohdal, M. Ozay, P. Zanuttigh, U. Michieli, "LoRA.rar: learning to
        merge LoRAs via hypernetworks for subject-style conditioned image generation"
        (2024), arXiv 2412.05148, with two changes. With a constant network it is
        :func:`lrjax.merging.weighted_sum`.
    """

    layers: dict[str, "_Layers"]  # by the number of rows
    added: tuple[str, ...] = eqx.field(static=True)  # paths of matrices that are added
    count: int = eqx.field(static=True)

    def __init__(
        self,
        changes: Sequence[PyTree],
        *,
        hidden: int = 128,
        where: Callable[[str], bool] | None = None,
        key: PRNGKeyArray,
    ):
        check_key("ColumnNetwork", key)
        found: dict[str, int] = {}

        def note(path: str, leaves: list[Any], weights: Array) -> None:
            del weights
            if len(leaves[0].shape) > 1:
                found[path] = leaves[0].shape[-2]

        map_changes("ColumnNetwork", note, changes, jnp.ones(len(changes)))
        added = () if where is None else tuple(path for path in found if not where(path))
        rows = sorted({m for path, m in found.items() if path not in added})
        if not rows:
            raise ValueError(
                "ColumnNetwork merges matrices column by column, and found none: the trees "
                "have vectors alone, or where= answered False for all."
            )
        self.added, self.count = added, len(changes)
        self.layers = {
            str(m): _Layers(m, len(changes), hidden, k)
            for m, k in zip(rows, jr.split(key, len(rows)), strict=True)
        }

    def __call__(self, changes: Sequence[PyTree], weights: Weights | None = None) -> PyTree:
        """The merge of K trees like those that it was made for.

        Args:
            changes: the trees.
            weights: ``(k,)``, beside the coefficients, ones by default.

        Returns:
            A tree of the same structure.
        """
        weights = checked_weights("ColumnNetwork", weights, changes)

        def merge(path: str, leaves: list[Any], own: Array | None) -> Any:
            del path
            if own is not None:
                leaves = [_scaled(x, c) for x, c in zip(leaves, own, strict=True)]
            return weighted_sum(leaves, weights)

        return self._mapped(merge, changes)

    def coefficients(self, changes: Sequence[PyTree]) -> dict[str, Float[Array, "k *b n"]]:
        """What the columns of each change are multiplied with, by the path of the leaf."""
        found = {}

        def note(path: str, leaves: list[Any], own: Array | None) -> None:
            if own is not None:
                found[path] = own

        self._mapped(note, changes)
        return found

    def _mapped(self, f: Callable, changes: Sequence[PyTree]) -> PyTree:
        """``f(path, leaves, coefficients or None)`` in place of every leaf."""
        if len(changes) != self.count:
            raise ValueError(
                f"This ColumnNetwork merges {self.count} trees of changes, and was given "
                f"{len(changes)}."
            )

        def leaf(path: str, leaves: list[Any], weights: Array) -> Any:
            del weights
            if path in self.added or len(leaves[0].shape) < 2:
                return f(path, leaves, None)
            return f(path, leaves, self._layers_of(path, leaves[0])(leaves))

        return map_changes("ColumnNetwork", leaf, changes, jnp.ones(self.count))

    def _layers_of(self, path: str, leaf: Any) -> "_Layers":
        rows = str(leaf.shape[-2])
        if rows not in self.layers:
            raise ValueError(
                f"This ColumnNetwork has layers for {sorted(self.layers, key=int)} rows, "
                f"and {path or 'the root'} has {rows}: make one for these changes."
            )
        return self.layers[rows]


class _Layers(eqx.Module):
    """Two layers, from all changes of a column to a number for each."""

    first: Float[Array, "k h m"]
    first_bias: Float[Array, " h"]
    last: Float[Array, "k h"]
    last_bias: Float[Array, " k"]

    def __init__(self, rows: int, count: int, hidden: int, key: PRNGKeyArray):
        size = 1 / math.sqrt(rows * count)
        self.first = jr.uniform(key, (count, hidden, rows), minval=-size, maxval=size)
        self.first_bias = jnp.zeros(hidden)
        self.last, self.last_bias = jnp.zeros((count, hidden)), jnp.ones(count)

    def __call__(self, leaves: list[Any]) -> Float[Array, "k *b n"]:
        """The coefficients of every column."""
        parts = [_seen(x, v) for x, v in zip(leaves, self.first, strict=True)]
        h = sum(parts[1:], parts[0])
        h = jax.nn.relu(h + _beside(self.first_bias, h))
        y = einsum("kh,...nh->...nk", self.last, h)
        return jnp.moveaxis(y + _beside(self.last_bias, y), -1, 0)


def _seen(leaf: Any, first: Float[Array, "h m"]) -> Float[Array, "*b n h"]:
    """``(V Δ)ᵀ``, of factors by the left one."""
    if isinstance(leaf, LowRank):
        left, right = (x.astype(working_dtype(leaf.dtype)) for x in (leaf.left, leaf.right))
        return einsum("...nr,...rh->...nh", right, einsum("hm,...mr->...rh", first, left))
    return einsum("hm,...mn->...nh", first, leaf.astype(working_dtype(leaf.dtype)))


def _scaled(leaf: Any, columns: Float[Array, "*b n"]) -> Any:
    """``Δ diag(c)``."""
    if isinstance(leaf, LowRank):
        right = (columns[..., :, None] * leaf.right).astype(leaf.dtype)
        return LowRank(leaf.left, right)
    return (columns[..., None, :] * leaf).astype(leaf.dtype)


def _beside(vector: Array, x: Array) -> Array:
    return vector.reshape(*(1,) * (x.ndim - 1), -1)


def column_loss(
    network: ColumnNetwork,
    changes: Sequence[PyTree],
    outputs: Callable[[int, PyTree], Array],
    *,
    overlap_weight: ArrayLike = 0.01,
) -> Float[Array, ""]:
    """How far a merge is from each change on the data of that one.

    The sum that is to be small::

        Σ_k mean |f_k(Δ) − f_k(Δ_k)|² + λ Σ_{k<l} |cos(c_k, c_l)|

    where ``f_k`` is what the model with a change gives on the data of the k-th, the last
    sum goes over all matrices as well, and the cosine is that of the coefficients of all
    columns: so columns go to one change or to the other.

    Args:
        network: what is trained.
        changes: K trees.
        outputs: ``(k, change) -> array``, the ``f_k``: a model bound or merged with the
            change, on the inputs of the k-th task.
        overlap_weight: ``λ``.

    Returns:
        The loss.

    Raises:
        ValueError: for trees that the network does not fit.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> changes = [jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])]
        >>> network = lrjax.merging.ColumnNetwork(changes, key=jax.random.key(0))
        >>> inputs = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> loss = lrjax.merging.column_loss(
        ...     network, changes, lambda k, change: change @ inputs[k])
        >>> round(float(loss), 4)  # the sum does both; its coefficients are the same
        0.01

    Reference:
        D. Shenaj et al., "LoRA.rar: learning to merge LoRAs via hypernetworks for
        subject-style conditioned image generation" (2024), arXiv 2412.05148.
    """
    merged = network(changes)
    apart = [
        jnp.mean(jnp.abs(outputs(k, merged) - outputs(k, own)) ** 2)
        for k, own in enumerate(changes)
    ]
    cosines = [_cosines(c) for c in network.coefficients(changes).values()]
    return jnp.asarray(sum(apart) + overlap_weight * sum(cosines))


def _cosines(c: Float[Array, "k *b n"]) -> Float[Array, ""]:
    """The sum of the sizes of the cosines of all pairs, of every matrix."""
    size = jnp.sqrt(nonzero(jnp.sum(c**2, axis=-1, keepdims=True)))
    products = jnp.abs(einsum("k...n,l...n->kl...", c / size, c / size))
    above = jnp.triu(jnp.ones(products.shape[:2]), 1)
    return jnp.sum(jnp.einsum("kl,kl...->kl...", above, products))

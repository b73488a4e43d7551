import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..._sites import Held, Site
from ...lowrank import LowRank
from .pool import Pool


class Ready(eqx.Module):
    """An adapter made ready for one weight: what is computed once, not in every call.

    The adapted weight is ``W'``. A kind writes ``weight``, and where it has a cheaper way
    than the dense matrix, ``output`` and ``change``. All that is written is for *one*
    matrix: stacked layers, batches and many adapters come by ``vmap``.
    """

    @abc.abstractmethod
    def weight(self, base: Float[Array, "out in"]) -> Float[Array, "out in"]:
        """``W'`` from ``W``, both in float32 or higher."""

    def output(self, site: Site, x: Array) -> Array:
        """``W' x``, without a bias.

        The dense matrix is formed again on the way back, for its thin factors are fewer
        numbers: of a deep model none is kept.
        """
        dense = lambda ready, x: site.product(
            ready.weight(site.read()).astype(site.dtype), x
        )
        return jax.checkpoint(dense)(self, x)

    def change(self, site: Site, x: Array) -> Array:
        """``(W' − W) x``: what dropout of the input acts upon."""
        weight = site.read()
        return site.product(self.weight(weight) - weight, x)

    def row_norms(self, base: Float[Array, "out in"]) -> Float[Array, " out"]:
        """The lengths of the rows of ``W'``, from ``W``."""
        return jnp.sqrt(jnp.sum(self.weight(base) ** 2, axis=1))

    def column_norms(
        self, base: Float[Array, "out in"], gain: Float[Array, " out"]
    ) -> Float[Array, " in"]:
        """The lengths of the columns of ``diag(gain) W'``, from ``W``."""
        return jnp.sqrt(jnp.sum((gain[:, None] * self.weight(base)) ** 2, axis=0))

    def bias(self, bias: Array | None) -> Array | None:
        """The adapted bias."""
        return bias


class Adapter(eqx.Module):
    """A change of one weight ``(out, in)``: what every kind of adapter can do.

    It holds arrays only and lives outside the model. A field may be ``None`` if its
    annotation says so.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """``(*b, out, in)`` of the weights that it fits."""

    @abc.abstractmethod
    def trainable(self) -> PyTree:
        """A tree of this structure: which leaves the optimizer sees."""

    @abc.abstractmethod
    def prepare(self, site: Site, pool: Held | None) -> Ready:
        """The adapter made ready for one matrix, once for every bind or merge."""

    def dropout_rate(self) -> Float[Array, "*b"] | None:
        """The probability that an input is dropped, or ``None`` without dropout."""
        return None

    def pool_name(self) -> str | None:
        """The name of the pool that it shares, or ``None``."""
        return None

    def factors(self, pool: Pool | None = None) -> tuple[LowRank, Array] | None:
        """The change of one matrix as ``(pair, scale)``: it is ``scale · left @ right.T``.

        Or ``None`` where it is no product. Adapters of stacked layers are vmapped, with one
        pool for all.
        """
        del pool
        return None


class AdapterKind(eqx.Module):
    """The recipe of an adapter: hyper-parameters, and how to build one for a matrix."""

    takes_vectors: ClassVar[bool] = False

    @property
    def takes_data(self) -> bool:
        """Whether ``init`` needs ``data``, the statistic of its matrix."""
        return False

    @abc.abstractmethod
    def init(
        self, site: Site, *, key: PRNGKeyArray, pool: Pool | None, data: Any = None
    ) -> Adapter:
        """An adapter for the one matrix at ``site``."""

    def pool_name(self) -> str | None:
        """The name of the pool that adapters of this kind share, or ``None``."""
        return None

    def init_pool(self, sites: list[Site], *, key: PRNGKeyArray) -> Pool:
        """The pool for all sites of this kind."""
        raise NotImplementedError


class Around(Adapter):
    """An adapter around another one: shape, dropout and pool are those of the other."""

    inner: eqx.AbstractVar[Adapter]

    @property
    def shape(self):
        """That of the other adapter."""
        return self.inner.shape

    def dropout_rate(self):
        """That of the other adapter."""
        return self.inner.dropout_rate()

    def pool_name(self):
        """That of the other adapter."""
        return self.inner.pool_name()


class AroundKind(AdapterKind):
    """A kind around another one, whose pool and data it takes."""

    kind: eqx.AbstractVar[AdapterKind]

    def pool_name(self):
        """That of the other kind."""
        return self.kind.pool_name()

    def init_pool(self, sites, *, key):
        """That of the other kind."""
        return self.kind.init_pool(sites, key=key)

    @property
    def takes_data(self):
        """Whether the other kind does."""
        return self.kind.takes_data


def innermost(adapter: Any) -> Any:
    """The adapter that others are around."""
    while isinstance(adapter, Around):
        adapter = adapter.inner
    return adapter


def is_adapter(x: Any) -> bool:
    """Whether ``x`` is an adapter; the ``is_leaf`` of maps over adapters.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.LoRA(rank=2), key=jax.random.key(1))
        >>> len(jax.tree.leaves(adapters, is_leaf=lrjax.adapters.is_adapter))
        3
    """
    return isinstance(x, Adapter)


def trained(tree: Any, *nodes: Callable[[Any], Any]) -> Any:
    """False for all leaves of a tree but those of some nodes, which are True."""
    marks = jax.tree.map(lambda _: False, tree)
    for node in nodes:
        yes = jax.tree.map(lambda _: True, node(tree))
        marks = eqx.tree_at(node, marks, yes)
    return marks


def is_partial(node: Any) -> bool:
    """Whether a field that cannot be ``None`` is: one half of a partition."""
    if not isinstance(node, eqx.Module):
        return False
    for field in dataclasses.fields(node):
        value = getattr(node, field.name, None)
        if value is None and "None" not in str(field.type):
            return True
        if is_partial(value):
            return True
    return False


def with_stopped_gradients(adapter: Any) -> Any:
    """An adapter, or pool, through whose frozen leaves no gradient flows."""
    leaves, structure = jax.tree.flatten(adapter)
    trains = _trained_leaves(structure)
    return structure.unflatten(
        x if trained else jax.lax.stop_gradient(x)
        for x, trained in zip(leaves, trains, strict=True)
    )


@functools.lru_cache
def _trained_leaves(structure: Any) -> list[bool]:
    """What is trained of all adapters of one structure: models have many of the same."""
    placeholders = structure.unflatten(range(structure.num_leaves))
    return jax.tree.leaves(placeholders.trainable())

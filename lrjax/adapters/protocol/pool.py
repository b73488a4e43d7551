import abc
from typing import Literal

import equinox as eqx
import jax
from jaxtyping import Array, Float

from ..._sites import Held
from ..._tree import node_of
from ...lowrank import LowRank


class Pool(eqx.Module):
    """What all adapters of a group share."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the product, or of the one array."""

    @abc.abstractmethod
    def trainable(self) -> "Pool":
        """The same structure with a bool for each array."""


class FactorPool(Pool):
    """Factors that all adapters of a group share.

    They are two arrays and no :class:`lrjax.LowRank` node, so that transforms of pairs
    pass them by: each layer has numbers of its own between the two, and their product is
    no weight of the model. What is not a node goes to the optimizer of the other leaves.

    Attributes:
        left: ``(largest out, r)``; a layer uses the first rows that it needs.
        right: ``(largest in, r)``, as ``left``.
        train: which factors the optimizer sees.
    """

    left: Float[Array, "large r"]
    right: Float[Array, "wide r"]
    train: Literal["both", "none"] = eqx.field(static=True)

    def __init__(self, pair: LowRank, train: Literal["both", "none"]):
        self.left, self.right, self.train = pair.left, pair.right, train

    @property
    def pair(self) -> LowRank:
        """Both factors as a node."""
        return node_of(self.left, self.right)

    @property
    def shape(self):
        """That of the product."""
        return self.pair.shape

    def trainable(self):
        """Both factors, or none."""
        return jax.tree.map(lambda _: self.train == "both", self)


class VectorPool(Pool):
    """A trained vector that all adapters of a group share.

    Attributes:
        vector: ``(u,)``.
    """

    vector: Float[Array, " u"]

    @property
    def shape(self):
        """Its length."""
        return self.vector.shape

    def trainable(self):
        """All of it."""
        return jax.tree.map(lambda _: True, self)


class BasisPool(Pool):
    """Random bases that all adapters of a group share, frozen.

    Attributes:
        wide: ``(longest side, k r)``, the bases side by side; a layer uses the first rows
            and columns that it needs.
        narrow: ``(longest of the shorter sides, r)``, the one base of the other side.
    """

    wide: Float[Array, "large kr"]
    narrow: Float[Array, "small r"]

    @property
    def shape(self):
        """Of the largest change."""
        return self.wide.shape[0], self.narrow.shape[0]

    def trainable(self):
        """Nothing."""
        return jax.tree.map(lambda _: False, self)


class PoolRows(eqx.Module):
    """The first rows of the factors of a pool, cut out when they are asked for.

    Attributes:
        pool: the holder.
        rows: how many of each factor.
    """

    pool: Held
    rows: tuple[int, int] = eqx.field(static=True)

    @property
    def left(self) -> Float[Array, "out r"]:
        """Of the left factor."""
        return self.pool.pool.pair.left[: self.rows[0]]

    @property
    def right(self) -> Float[Array, "in r"]:
        """Of the right factor."""
        return self.pool.pool.pair.right[: self.rows[1]]

"""Adapters whose change is turned down, and several changes of one weight at once."""

import functools

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...protocol import Adapter, Around, Sum, Toward, trained


class Weighted(Around):
    """A share of another adapter's change: ``W' = W + share · (V − W)``.

    ``V`` is the weight that the other adapter gives; its bias goes the same way. A share of
    one is that adapter, of zero the layer as it is, whatever the kind, and then nothing of
    the adapter has a gradient.

    Attributes:
        inner: the adapter whose weight is V.
        share: ``(*b,)``, any number.
        train: whether the share has a gradient. One that says whether there is an adapter
            at all has none.
    """

    inner: Adapter
    share: Float[Array, "*b"]
    train: bool = eqx.field(static=True, default=False)

    def trainable(self):
        """What the other adapter trains, and perhaps the share."""
        spec = trained(self, *[lambda adapter: adapter.share] * self.train)
        return eqx.tree_at(lambda a: a.inner, spec, self.inner.trainable())

    def prepare(self, site, pool):
        """The other adapter, and the share of its change."""
        return Toward(self.inner.prepare(site, pool), self.share)

    def factors(self, pool=None):
        """Those of the other adapter, with the share in the scale."""
        found = self.inner.factors(pool)
        return None if found is None else (found[0], self.share * found[1])


class Summed(Adapter):
    """The changes of several adapters of one weight: ``W' = W + Σ_k (V_k − W)``.

    Attributes:
        parts: the adapters, one or more, which give the weights ``V_k``.
    """

    parts: tuple[Adapter, ...]

    @property
    def shape(self):
        """That of any of them."""
        return self.parts[0].shape

    def dropout_rate(self):
        """The largest of all: the input is dropped once."""
        rates = [part.dropout_rate() for part in self.parts]
        known = [rate for rate in rates if rate is not None]
        return functools.reduce(jnp.maximum, known) if known else None

    def pool_name(self):
        """That of any of them: they share one."""
        return self.parts[0].pool_name()

    def trainable(self):
        """What each of them trains."""
        return Summed(tuple(part.trainable() for part in self.parts))

    def prepare(self, site, pool):
        """All of them."""
        return Sum(tuple(part.prepare(site, pool) for part in self.parts))

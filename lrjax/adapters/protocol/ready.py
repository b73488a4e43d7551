import abc
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...linalg import cross, outer, times
from ...lowrank import LowRank
from .adapter import Ready
from .pool import PoolRows


class Beside(Ready):
    """The layer as it is, and a change beside it that is cheaper than a dense product."""

    def output(self, site, x):
        """The layer and the change."""
        y = site.base(x)
        return y + self.change(site, x).astype(y.dtype)


class Whole(Ready):
    """An output that is as cheap as the layer's, so the change is a difference."""

    def change(self, site, x):
        """What the output has more than the layer's."""
        return self.output(site, x) - site.base(x)


class PerInput(Beside):
    """A change that depends on the input by more than a product: it has no weight."""

    path: str = eqx.field(static=True)

    def weight(self, base):
        """Refused."""
        raise ValueError(
            f"The adapter at {self.path or 'the root'} is another one for each input, so "
            "there is no weight to merge or to read: call the bound layer, lrjax.bind, or "
            "fix the weights of the mixture, lrjax.adapters.select(stack, ids, weights), "
            "and merge that."
        )


class Product(Beside):
    """``W' = W + diag(gain) · left · core · rightᵀ``, applied from right to left.

    The dense change is never formed in a call. ``core`` is a number, a diagonal or a
    matrix. Factors out of a pool stay in it: only the rows in use are cut out, in the call,
    so that layers under ``scan`` do not hold a copy each.
    """

    pair: LowRank | PoolRows
    core: Float[Array, "..."]
    gain: Float[Array, " out"] | None = None

    def folded(self) -> tuple[Float[Array, "out r"], Float[Array, "in r"]]:
        """Two factors with all of the change in their product."""
        left, right = self.pair.left, self.pair.right
        left = times(left, self.core) if self.core.ndim == 2 else _scaled(left, self.core)
        return left if self.gain is None else self.gain[:, None] * left, right

    def weight(self, base):
        """``W`` plus the dense change."""
        left, right = (x.astype(base.dtype) for x in self.folded())
        return base + outer(left, right)

    def change(self, site, x):
        """Two thin products."""
        h = site.down(self.pair.right, x)
        # The core contracts its second axis: it stands to the left of rightᵀ x.
        mixed = jnp.matmul(h, self.core.T) if self.core.ndim == 2 else _scaled(h, self.core)
        y = site.up(self.pair.left, mixed.astype(h.dtype))
        return y if self.gain is None else site.along_outputs(self.gain) * y

    def row_norms(self, base):
        """Lengths of the rows of ``W'``, from products with thin matrices alone."""
        return _row_norms(base, *(x.astype(base.dtype) for x in self.folded()))

    def column_norms(self, base, gain):
        """The same of the transpose."""
        left, right = (x.astype(base.dtype) for x in self.folded())
        return _row_norms((gain[:, None] * base).T, right, gain[:, None] * left)


class Structured(Beside):
    """``W' = W + Δ``, where Δ meets a vector more cheaply than as a dense matrix.

    On layers that are no product with a vector, as convolutions, the dense Δ is used.
    """

    @abc.abstractmethod
    def delta(self) -> Float[Array, "out in"]:
        """The dense Δ."""

    @abc.abstractmethod
    def act(self, x: Float[Array, "*c in"]) -> Float[Array, "*c out"]:
        """``Δ x``."""

    def weight(self, base):
        """``W`` plus the dense change."""
        return base + self.delta().astype(base.dtype)

    def change(self, site, x):
        """The cheap way for a vector, else the dense one."""
        if site.kind == "linear":
            return site.along_outputs(self.act(jnp.atleast_1d(x)))
        dense = lambda ready, x: site.product(ready.delta(), x)
        return jax.checkpoint(dense)(self, x)


class Added(Beside):
    """``W' = W + Δ`` with a dense Δ that is there already: a call has one product."""

    delta: Float[Array, "out in"]

    def weight(self, base):
        """``W`` plus the change."""
        return base + self.delta.astype(base.dtype)

    def change(self, site, x):
        """The product with the change alone."""
        return site.product(self.delta, x)

    def output(self, site, x):
        """One product with the sum; of a lookup, two columns."""
        beside = site.kind == "lookup"
        return super().output(site, x) if beside else Ready.output(self, site, x)


class Gained(Whole):
    """``W' = diag(gain) · V`` around another adapter, whose weight is ``V``."""

    gain: Float[Array, " out"]
    inner: Ready

    def weight(self, base):
        """Its rows scaled."""
        return self.gain[:, None] * self.inner.weight(base)

    def output(self, site, x):
        """The outputs of the other adapter, scaled."""
        y = self.inner.output(site, x)
        return (site.along_outputs(self.gain) * y).astype(y.dtype)

    def bias(self, bias):
        """That of the other adapter: biases are not scaled."""
        return self.inner.bias(bias)


class GainedInputs(Whole):
    """``W' = V diag(gain)`` around another adapter, whose weight is ``V``."""

    gain: Float[Array, " in"]
    inner: Ready

    def weight(self, base):
        """Its columns scaled."""
        return self.inner.weight(base) * self.gain[None, :]

    def output(self, site, x):
        """The other adapter on scaled inputs; of convolutions the dense weight."""
        if site.kind == "linear":
            x = jnp.asarray(x)
            return self.inner.output(site, (self.gain * x).astype(x.dtype))
        if site.kind == "lookup":
            y = self.inner.output(site, x)
            return (self.gain[x] * y).astype(y.dtype)
        return super().output(site, x)

    def bias(self, bias):
        """That of the other adapter: biases are not scaled."""
        return self.inner.bias(bias)


class Copied(Ready):
    """``W'`` itself, whatever ``W`` is."""

    copy: Float[Array, "out in"]
    own_bias: Array | None

    def weight(self, base):
        """The copy."""
        return self.copy.astype(base.dtype)

    def bias(self, bias):
        """The copy of the bias."""
        return bias if self.own_bias is None else self.own_bias


class Toward(Beside):
    """``W' = W + share · (V − W)`` around another adapter, whose weight is ``V``."""

    inner: Ready
    share: Float[Array, ""]

    def weight(self, base):
        """The layer's weight, moved toward the other's."""
        return base + self.share.astype(base.dtype) * (self.inner.weight(base) - base)

    def change(self, site, x):
        """The other adapter's change, times the share."""
        return self.share * self.inner.change(site, x)

    def bias(self, bias):
        """Moved in the same way."""
        return _moved_bias(bias, [(self.share, self.inner)])


class Sum(Beside):
    """``W' = W + Σ_k (V_k − W)``, of adapters whose weights are ``V_k``."""

    parts: tuple[Ready, ...]

    def weight(self, base):
        """The weight and all changes."""
        return base + functools.reduce(
            jnp.add, (part.weight(base) - base for part in self.parts)
        )

    def change(self, site, x):
        """All changes."""
        changes = (part.change(site, x) for part in self.parts)
        return functools.reduce(jnp.add, changes)

    def bias(self, bias):
        """The bias and all changes of it."""
        return _moved_bias(bias, [(1.0, part) for part in self.parts])


def _moved_bias(
    bias: Array | None, parts: list[tuple[Array | float, Ready]]
) -> Array | None:
    """``b + Σ_k share_k (b_k − b)``; the bias itself where no part has another one."""
    moved = bias
    for share, part in parts:
        own = part.bias(bias)
        if bias is not None and moved is not None and own is not bias:
            moved = moved + share * (jnp.asarray(own) - bias)
    return moved


class OwnBias(Ready):
    """A bias of its own beside the weight of another adapter."""

    own: Array
    inner: Ready

    def weight(self, base):
        """That of the other adapter."""
        return self.inner.weight(base)

    def output(self, site, x):
        """That of the other adapter."""
        return self.inner.output(site, x)

    def change(self, site, x):
        """That of the other adapter."""
        return self.inner.change(site, x)

    def row_norms(self, base):
        """Those of the other adapter."""
        return self.inner.row_norms(base)

    def bias(self, bias):
        """Its own."""
        return self.own


@jax.jit  # traced once for all layers of one shape
def _row_norms(base, left, right):
    """``‖W'‖² = ‖W‖² + 2 (W R) · L + (L RᵀR) · L`` row by row, with ``W' = W + L Rᵀ``."""
    inner = 2 * times(base, right) + times(left, cross(right, right))
    square = jnp.sum(base**2, axis=1) + jnp.sum(inner * left, axis=1)
    return jnp.sqrt(jnp.maximum(square, 0))


def _scaled(x: Float[Array, "*c r"], core: Array) -> Array:
    """Columns times their own number, or one number for all."""
    return x * core.reshape(*(1,) * (x.ndim - core.ndim), *core.shape)

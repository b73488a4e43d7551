"""How the layers of Equinox act with a matrix in place of their weight."""

import abc
import dataclasses
import functools
import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .._dense import dense, frozen_dense
from .quantized import dense_array
from .sites import Site, check_weight, register_layer


def _replaced(layer: Any, weight: Array, bias: Array | None) -> Any:
    """The layer with another weight and bias, rounded to the dtypes of the old ones."""
    old = layer.weight
    new = eqx.tree_at(
        lambda x: x.weight, layer, weight.reshape(old.shape).astype(old.dtype)
    )
    if bias is None:
        return new
    if layer.bias is None:
        raise ValueError(
            f"{type(layer).__name__} has no bias to merge that of its adapter into: "
            "lrjax.bind adds it, or make the layer with one."
        )
    return eqx.tree_at(lambda x: x.bias, new, bias.astype(layer.bias.dtype))


@dataclasses.dataclass(frozen=True)
class _StockSite(Site):
    """A layer of Equinox; a subclass with a ``__call__`` of its own may do anything."""

    stopped: bool = False  # whether no gradient goes through the weight

    stock: ClassVar[type]

    @abc.abstractmethod
    def _shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the matrix, from that of the weight."""

    @functools.cached_property
    def struct(self) -> jax.ShapeDtypeStruct:
        if not isinstance(self.layer, self.stock):  # a site of own layers, made of this
            return super().struct
        weight = self.layer.weight
        return jax.ShapeDtypeStruct(self._shape(weight.shape), weight.dtype)

    def check(self) -> None:
        check_weight(self.path, self.layer.weight)

    def frozen(self) -> Site:
        # A stopped copy of the layer is made only where it has to be: see frozen_dense.
        own = isinstance(self.layer, self.stock)
        return dataclasses.replace(self, stopped=True) if own else super().frozen()

    def read(self):
        if self.index is None or not self.is_quantized:
            return super().read()
        cut = lambda x: x[self.index] if eqx.is_array(x) else x
        one = jax.tree.map(cut, self.layer)
        return dataclasses.replace(self, layer=one, index=None).read()

    @property
    def _weight(self) -> Array:
        weight = dense_array(self.layer.weight)
        return lax.stop_gradient(weight) if self.stopped else weight

    @property
    def acts(self) -> bool:
        return type(self.layer).__call__ is self.stock.__call__


@register_layer(eqx.nn.Linear)
class LinearSite(_StockSite):
    """``y = W x``; the site of ``eqx.nn.Linear``, and a start for that of own layers."""

    kind = "linear"
    stock = eqx.nn.Linear

    @property
    def acts(self) -> bool:
        """Whether the layer is a product with its weight, as all but subclasses are."""
        own = isinstance(self.layer, self.stock)
        return super().acts if own else True

    def check(self) -> None:
        """Refuse weights that are no floating-point arrays."""
        if isinstance(self.layer, self.stock):
            super().check()

    def matrix(self):
        """The weight."""
        return self._weight

    def _shape(self, weight):
        return weight

    def put(self, matrix, bias):
        """The layer with another weight and bias."""
        return _replaced(self.layer, matrix, bias)

    def product(self, matrix, x):
        """``matrix @ x``."""
        return self._output(dense(jnp.atleast_1d(x), matrix))

    def base(self, x):
        """``W x``, as one ``lax.dot_general``.

        A weight that is computed, as quantized ones are, is so again for the gradient.
        """
        x, weight = jnp.atleast_1d(x), getattr(self.layer, "weight", None)
        if isinstance(weight, jax.Array):
            return self._output(frozen_dense(x, weight))
        product = lambda layer, x: frozen_dense(x, self.of(layer).matrix())
        return self._output(eqx.filter_checkpoint(product)(self.layer, x))

    def down(self, right, x):
        """``rightᵀ x``, in the dtype of ``right``."""
        return dense(jnp.atleast_1d(x).astype(right.dtype), right.T)

    def up(self, left, h):
        """``left h``."""
        return self._output(dense(h, left))

    def along_outputs(self, vector):
        """The vector, or its one number where the layer gives a scalar."""
        return self._output(vector)

    def plus_bias(self, y, bias):
        """The sum, of two scalars where the layer gives one."""
        return y if bias is None else y + self._output(bias)

    def matrix_axes(self):
        """The last two axes of the weight of an ``eqx.nn.Linear``."""
        if not isinstance(self.layer, self.stock) or self.is_quantized:
            return None
        ndim = self.layer.weight.ndim
        return self.layer.weight, tuple(range(ndim - 2)), ndim - 2, ndim - 1

    def _output(self, y):
        return y[0] if getattr(self.layer, "out_features", None) == "scalar" else y


@register_layer(eqx.nn.Embedding)
class LookupSite(_StockSite):
    """A column of ``W = tableᵀ (size, vocabulary)``, the site of ``eqx.nn.Embedding``."""

    kind = "lookup"
    stock = eqx.nn.Embedding

    def matrix(self):
        """The table, transposed."""
        return self._weight.mT

    def _shape(self, weight):
        return (*weight[:-2], weight[-1], weight[-2])

    def put(self, matrix, bias):
        """The layer with another table."""
        return _replaced(self.layer, matrix.mT, bias)

    def product(self, matrix, x):
        """Column ``x``."""
        return matrix[:, x]

    def matrix_axes(self):
        """The last two axes of the table."""
        if self.is_quantized:
            return None
        ndim = self.layer.weight.ndim
        return self.layer.weight, tuple(range(ndim - 2)), ndim - 1, ndim - 2

    def base(self, x):
        """What the layer gives."""
        return lax.stop_gradient(self.layer(x))

    def down(self, right, x):
        """Row ``x`` of ``right``."""
        return right[x]

    def up(self, left, h):
        """``left h``."""
        return dense(h, left)


@register_layer(eqx.nn.Conv)
class ConvSite(_StockSite):
    """A convolution: the kernel with its input axes flattened, ``(out, in/groups · k)``."""

    kind = "conv"
    stock = eqx.nn.Conv

    def matrix(self):
        """The kernel, its input axes flattened."""
        weight, spatial = self._weight, self.layer.num_spatial_dims
        return weight.reshape(*weight.shape[: weight.ndim - spatial - 1], -1)

    def _shape(self, weight):
        lead = len(weight) - self.layer.num_spatial_dims - 1
        return (*weight[:lead], math.prod(weight[lead:]))

    @property
    def kernel_shape(self):
        """Output channels; input channels and taps."""
        inputs = self.layer.weight.shape[-self.layer.num_spatial_dims - 1 :]
        return self.shape[:1], inputs

    def put(self, matrix, bias):
        """The layer with another kernel."""
        return _replaced(self.layer, matrix, bias)

    def product(self, matrix, x):
        """The convolution with another kernel."""
        spatial = self.layer.num_spatial_dims
        dtype = jnp.promote_types(x.dtype, matrix.dtype)
        kernel = matrix.reshape(len(matrix), *self.layer.weight.shape[-spatial - 1 :])
        kernel = kernel.astype(dtype)
        layer = eqx.tree_at(lambda c: c.weight, self.layer, kernel)
        if layer.bias is not None:
            nothing = jnp.zeros((len(kernel),) + (1,) * spatial, kernel.dtype)
            layer = eqx.tree_at(lambda c: c.bias, layer, nothing)
        return layer(x.astype(dtype))

    def down(self, right, x):
        """A thin convolution; with groups every group meets the same kernel."""
        groups, rank = self.layer.groups, right.shape[1]
        y = self.product(jnp.tile(right.T, (groups, 1)), x.astype(right.dtype))
        return y.reshape(groups, rank, *y.shape[1:]).swapaxes(1, -1)

    def up(self, left, h):
        """A pointwise convolution."""
        h = h.swapaxes(1, -1)
        groups, rank = h.shape[:2]
        blocks = left.reshape(groups, -1, rank)
        y = lax.batch_matmul(blocks, h.reshape(groups, rank, -1))
        return y.reshape(-1, *h.shape[2:])

    def along_outputs(self, vector):
        """The vector with an axis for every spatial one."""
        return vector.reshape(-1, *(1,) * self.layer.num_spatial_dims)


@register_layer(eqx.nn.ConvTranspose)
class TransposedConvSite(ConvSite):
    """Transposed convolutions are seen, and refused."""

    def check(self) -> None:
        """Refuse it."""
        raise ValueError(
            f"{self.path or 'the root'} is a {type(self.layer).__name__}: transposed "
            "convolutions are not adapted. Exclude it with where=."
        )

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int, PyTree

from .._matrices import named_leaves
from ..linalg import working_dtype
from .held import Held
from .quantized import holds_quantized, is_quantized


@dataclasses.dataclass(frozen=True)
class Site(abc.ABC):
    """A weight in a model that can be adapted, seen as a matrix ``(out, in)``.

    Kinds of adapters see nothing else of a model. A subclass says for one class of layers
    how its weight is a matrix and how the layer acts with it; :func:`register_layer` makes
    it known. Matrices stacked for ``lax.scan`` are one site with leading axes; kinds are
    handed one of them at a time, in ``init`` with its ``index``.

    Attributes:
        path: where in the model, as ``"blocks.0.attention.query_proj"``.
        layer: the layer, or the array, itself.
        index: which of a stack this one is, or ``None`` for all of them.
        still: whether no gradient goes through what :meth:`read` gives.
    """

    path: str
    layer: Any
    index: tuple[Int[Array, ""], ...] | None = None
    still: bool = False

    kind: ClassVar[str]  # "linear", "conv", "lookup", "array" or "vector"

    @abc.abstractmethod
    def matrix(self) -> Float[Array, "*b out in"]:
        """The whole weight as matrices, in its own dtype."""

    @abc.abstractmethod
    def put(self, matrix: Float[Array, "*b out in"], bias: Array | None) -> Any:
        """The layer with another weight and bias, in the dtype of the old ones."""

    @abc.abstractmethod
    def product(self, matrix: Float[Array, "out in"], x: Array) -> Array:
        """What the layer gives for one input with ``matrix`` as weight, without a bias."""

    @abc.abstractmethod
    def down(self, right: Float[Array, "in r"], x: Array) -> Float[Array, "*c r"]:
        """The input of the layer, contracted with ``right``; the rank is the last axis."""

    @abc.abstractmethod
    def up(self, left: Float[Array, "out r"], h: Float[Array, "*c r"]) -> Array:
        """What :meth:`down` gave, expanded to the output of the layer."""

    def base(self, x: Array) -> Array:
        """What the layer itself gives without its bias; its weight has no gradient."""
        return self.product(self.matrix(), x)

    def along_outputs(self, vector: Float[Array, " out"]) -> Array:
        """One number for each output, in a shape that multiplies an output."""
        return vector

    def plus_bias(self, y: Array, bias: Array | None) -> Array:
        """An output and the bias."""
        return y if bias is None else y + bias

    @property
    def bias(self) -> Array | None:
        """The bias of the layer."""
        return getattr(self.layer, "bias", None)

    @property
    def acts(self) -> bool:
        """Whether the layer is the product with its weight plus its bias, no more."""
        return True

    @property
    def is_quantized(self) -> bool:
        """Whether a weight of the layer is a quantized array."""
        return holds_quantized(self.layer)

    def check(self) -> None:
        """Refuse a weight that cannot be adapted; raises a ``ValueError``."""
        return

    @functools.cached_property
    def struct(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of :meth:`matrix`, without reading it."""
        of = lambda layer: self.of(layer).matrix()
        return eqx.filter_eval_shape(of, self.layer)

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes: how many matrices there are."""
        return () if self.index is not None else self.struct.shape[:-2]

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of one matrix."""
        return self.struct.shape[-2:]

    @property
    def kernel_shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes that make the outputs, and those that make the inputs, by their sizes.

        Of a convolution ``((out,), (in / groups, *spatial))``.
        """
        m, n = self.shape
        return (m,), (n,)

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return self.struct.dtype

    def read(self) -> Float[Array, "*b out in"]:
        """The weight in float32 or higher, only read when asked for."""
        matrix = self.matrix()
        matrix = matrix if self.index is None else matrix[self.index]
        matrix = jax.lax.stop_gradient(matrix) if self.still else matrix
        return matrix.astype(working_dtype(matrix.dtype))

    def read_bias(self) -> Array | None:
        """The bias of one matrix."""
        bias = self.bias
        return bias if bias is None or self.index is None else bias[self.index]

    def of(self, layer: Any) -> "Site":
        """The same site of another such layer."""
        return dataclasses.replace(self, layer=layer)

    def at(self, index: tuple[Int[Array, ""], ...]) -> "Site":
        """One matrix of the stack."""
        return dataclasses.replace(self, index=index)

    def frozen(self) -> "Site":
        """The site with no gradient through its layer."""
        return self.of(stop_gradient(self.layer))

    def matrix_axes(self) -> tuple[Array, tuple[int, ...], int, int] | None:
        """The stored weight and its axes that stack, are outputs, are inputs.

        ``None`` where they are no axes of their own.
        """
        return None

    def parts(self) -> tuple[PyTree, Callable[[PyTree], "Site"]]:
        """What ``vmap`` goes over to meet the stack, and the site of one such part."""
        return self.layer, self.of


_REGISTERED: dict[type, type[Site]] = {}


def register_layer(layer: type) -> Callable[[type[Site]], type[Site]]:
    """Teach ``adapt`` a class of layers: how its weight is read, and how it acts.

    Own layers, quantized weights, layers of other libraries. Their call must be the
    product with the weight plus the bias, ``layer(x) = site.base(x) + bias``.

    Args:
        layer: the class; subclasses of it are meant as well.

    Returns:
        A decorator for a subclass of :class:`Site`, or of :class:`LinearSite` where only
        reading and writing the weight differ.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> class Int8(eqx.Module):
        ...     codes: jax.Array
        ...     scale: jax.Array
        ...     def __call__(self, x):
        ...         return (self.codes * self.scale) @ x
        >>> @lrjax.adapters.register_layer(Int8)
        ... class Int8Site(lrjax.adapters.LinearSite):
        ...     def matrix(self):
        ...         return self.layer.codes * self.layer.scale
        ...     def put(self, matrix, bias):
        ...         raise ValueError("int8 weights are not merged")
        >>> model = {"dense": Int8(jnp.ones((3, 4), jnp.int8), jnp.ones((3, 1)))}
        >>> adapters = lrjax.adapt(model, lrjax.LoRA(2), key=jax.random.key(0))
        >>> lrjax.bind(model, adapters)["dense"](jnp.ones(4)).tolist()
        [4.0, 4.0, 4.0]
    """

    def register(site: type[Site]) -> type[Site]:
        _REGISTERED[layer] = site
        return site

    return register


def is_layer(x: Any) -> bool:
    """Whether ``x`` is a layer of a registered class."""
    return any(cls in _REGISTERED for cls in type(x).__mro__)


def layer_site(path: str, layer: Any) -> Site:
    """The site of a layer of a registered class."""
    cls = next(cls for cls in type(layer).__mro__ if cls in _REGISTERED)
    return _REGISTERED[cls](path, layer)


def flat_leaves(model: PyTree) -> tuple[list[tuple[str, Any]], Any]:
    """Layers and other leaves of a model by path, and the structure above them."""
    return named_leaves(model, lambda x: is_layer(x) or is_quantized(x))


# Layers that take another layer apart and put it together with another weight.
_REWEIGHTING = (eqx.nn.WeightNorm, eqx.nn.SpectralNorm)


def reweighted(model: PyTree) -> dict[str, Any]:
    """The layers inside of which another one is given another weight, by path."""
    leaves, _ = named_leaves(model, lambda x: isinstance(x, _REWEIGHTING))
    return {path: leaf for path, leaf in leaves if isinstance(leaf, _REWEIGHTING)}


def check_reweighted(layers: dict[str, Any], quantized: Iterable[str]) -> None:
    """Refuse quantized weights, by path, inside layers that :func:`reweighted` found."""
    for path, node in layers.items():
        inside = [own for own in quantized if own.startswith(f"{path}." if path else "")]
        if inside:
            raise ValueError(
                f"{inside[0]} is inside {path or 'the root'}, a {type(node).__name__}, "
                "which computes another weight out of its own in every call and cannot do "
                "so with a quantized one: leave it out of lrjax.adapters.quantize with "
                "where=."
            )


def check_unique(paths: Iterable[str]) -> None:
    """Refuse two sites of one path."""
    seen = set()
    for path in paths:
        if path in seen:
            raise ValueError(
                f"Two layers have the same path {path!r} (a dict key with a dot in it?): "
                "rename the key, adapters are stored by path."
            )
        seen.add(path)


def over_stack(f: Callable, site: Site, *trees: PyTree) -> Any:
    """``f(site of one matrix, *trees)``, vmapped over the stack of a site."""
    parts, of = site.parts()
    g = lambda part, *rest: f(of(part), *rest)
    for _ in site.stack:
        g = in_turn(g) if site.is_quantized else eqx.filter_vmap(g)
    return g(parts, *trees)


def in_turn(f: Callable) -> Callable:
    """As ``vmap``, but in a loop: of quantized weights one at a time is dense."""

    def g(*args: PyTree) -> PyTree:
        arrays, static = eqx.partition(args, eqx.is_array)
        return jax.lax.map(lambda one: f(*eqx.combine(one, static)), arrays)

    return g


def stop_gradient(tree: PyTree) -> PyTree:
    """``lax.stop_gradient`` on the arrays of a tree, those of held pools too."""

    def stop(x: Any) -> Any:
        if isinstance(x, Held):
            return Held(stop_gradient(x.pool))
        # Not of integers: under scan they would be copied as residuals.
        return jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x

    return jax.tree.map(stop, tree, is_leaf=lambda x: isinstance(x, Held))


def check_weight(path: str, weight: Any) -> None:
    """Refuse a weight that is no real floating-point array."""
    at = path or "the root"
    if not hasattr(weight, "dtype"):
        if type(weight).__name__ == "SharedNode":
            raise ValueError(
                f"The weight of {at} is tied to another layer by eqx.nn.Shared: adapt the "
                "layer that keeps the weight; this one follows."
            )
        raise ValueError(
            f"The weight of {at} is no array but a {type(weight).__name__}: tell how it is "
            "read as a matrix with lrjax.adapters.register_layer, or leave it out with "
            "where=."
        )
    dtype = jax.numpy.dtype(weight.dtype)
    if not jax.numpy.issubdtype(dtype, jax.numpy.floating) or dtype.itemsize < 2:
        raise ValueError(
            f"The weight of {at} is {dtype}, which cannot be adapted: it takes real "
            "numbers of 16 bits or more. Leave it out with where=, or tell how it is "
            "dequantized with lrjax.adapters.register_layer."
        )

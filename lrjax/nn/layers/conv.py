from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from ..._arguments import check_key
from ..._sites import ConvSite, register_layer
from ._geometry import Geometry, geometry_of
from ._weights import (
    Form,
    Node,
    check_form,
    check_layer_rank,
    check_node,
    made_of,
    pair_of,
    spectral,
)
from .folding import (
    Scheme,
    fold_kernel,
    matrix_shape,
    taps_of_outputs,
    thin_kernels,
    unfold_matrix,
)


class LowRankConv(eqx.Module):
    """A convolution whose kernel, folded into a matrix, is a product of thin factors.

    It is computed as two convolutions through ``rank`` channels: over the axes that the
    scheme leaves with the inputs, then over those that go with the outputs; see
    :func:`~lrjax.nn.fold_kernel`. Stride, padding and dilation of an axis belong to the one
    that goes along it. With groups, each group has factors of its own. It is called as
    ``eqx.nn.Conv`` is.

    The start is that of ``eqx.nn.Conv`` with the same arguments, truncated. At full rank it
    is that layer.

    Args:
        num_spatial_dims: the number of spatial axes.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: the taps, one number for all axes or one for each.
        rank: the width of the factors, for each group.
        scheme: ``"inputs"``, ``"outputs"``, ``"first"`` or ``"last"``.
        stride: as of ``eqx.nn.Conv``.
        padding: as of ``eqx.nn.Conv``.
        dilation: as of ``eqx.nn.Conv``.
        groups: as of ``eqx.nn.Conv``.
        use_bias: whether there is a bias.
        padding_mode: as of ``eqx.nn.Conv``.
        form: ``"pair"`` or ``"svd"``, as of :class:`~lrjax.nn.LowRankLinear`.
        dtype: of weight and bias.
        key: for the start.

    Attributes:
        weight: the node of the folded kernel, ``(m, n)``, or ``(groups, m / groups, n)``.
        bias: ``(out, 1, …, 1)``, or ``None``.
        geometry: sizes, stride, padding and so on, under the names of ``eqx.nn.Conv``.
        scheme: how the kernel is folded.

    Raises:
        TypeError: for a rank that is no integer.
        ValueError: for a rank that the matrix cannot have, an unknown scheme or form.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> layer = lrjax.nn.LowRankConv(2, 8, 16, 3, 4, key=jax.random.key(0))
        >>> layer(jnp.ones((8, 32, 32))).shape, layer.weight.shape
        ((16, 30, 30), (16, 72))

    Reference:
        L. Liebenwein, A. Maalouf, O. Gal, D. Feldman, D. Rus, "Compressing neural networks:
        towards determining the optimal layer-wise decomposition" (2021), arXiv 2107.11442.
    """

    weight: Node
    bias: Float[Array, "..."] | None
    geometry: Geometry = eqx.field(static=True)
    scheme: Scheme = eqx.field(static=True)

    def __init__(
        self,
        num_spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        rank: int,
        *,
        scheme: Scheme = "inputs",
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] | Sequence[tuple[int, int]] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        use_bias: bool = True,
        padding_mode: str = "ZEROS",
        form: Form = "pair",
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        check_key("LowRankConv", key)
        check_form(form)
        start = eqx.nn.Conv(
            num_spatial_dims,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            use_bias,
            padding_mode,
            dtype,
            key=key,
        )
        shape = matrix_shape(start.weight.shape, scheme, groups)
        check_layer_rank("LowRankConv", rank, shape)
        matrix = fold_kernel(start.weight, scheme, groups=groups)
        self.weight, self.bias = spectral(matrix, rank, form), start.bias
        self.geometry, self.scheme = geometry_of(start), scheme

    @classmethod
    def from_node(
        cls,
        weight: Node,
        bias: Array | None = None,
        *,
        like: Any,
        scheme: Scheme = "inputs",
    ) -> "LowRankConv":
        """The layer of a folded kernel that is in factors already.

        Args:
            weight: ``(*b, m, n)``, or ``(*b, groups, m / groups, n)``.
            bias: ``(*b, out, 1, …, 1)``, or ``None`` for none.
            like: the convolution whose place it takes, an ``eqx.nn.Conv``.
            scheme: how the kernel was folded.

        Returns:
            The layer.

        Raises:
            TypeError: for a weight that is no node, or a ``like`` that is no convolution.
            ValueError: for a weight that is not that of such a kernel.
        """
        check_node(cls.__name__, weight)
        geometry = geometry_of(like)
        shape = matrix_shape(geometry.kernel_shape, scheme, geometry.groups)
        grouped = (geometry.groups, *shape) if geometry.groups > 1 else shape
        if weight.shape[-len(grouped) :] != grouped:
            raise ValueError(
                f"{cls.__name__} needs a weight of shape {grouped}, the kernel "
                f"{geometry.kernel_shape} in {geometry.groups} group(s) folded by "
                f"{scheme!r}; got {weight.shape}."
            )
        return made_of(cls, weight=weight, bias=bias, geometry=geometry, scheme=scheme)

    @property
    def use_bias(self) -> bool:
        """Whether there is a bias."""
        return self.bias is not None

    @property
    def is_stack(self) -> bool:
        """Whether it holds several layers."""
        return self.weight.ndim > 2 + (self.geometry.groups > 1)

    def __call__(
        self, x: Array, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "out ..."]:
        """The convolution of one input.

        Args:
            x: ``(in, size_1, …, size_d)``.
            key: not used, as in ``eqx.nn.Conv``.

        Returns:
            ``(out, new_1, …, new_d)``.

        Raises:
            ValueError: for an input of other axes or channels.
        """
        del key
        geometry = self.geometry
        geometry.check_input(self, x)
        pair = pair_of(self.weight)
        first, second = thin_kernels(
            pair.left, pair.right, geometry.kernel_shape, self.scheme, geometry.groups
        )
        last = taps_of_outputs(self.scheme, geometry.num_spatial_dims)
        x, pads = geometry.padded(x)
        h = geometry.convolve(x, first, pads, tuple(not mine for mine in last))
        y = geometry.convolve(h, second, pads, last)
        return y if self.bias is None else y + self.bias

    def to_dense(self) -> eqx.nn.Conv:
        """The same layer with its kernel multiplied out."""
        shape, groups = self.geometry.kernel_shape, self.geometry.groups
        unfold = lambda matrix: unfold_matrix(matrix, shape, self.scheme, groups=groups)
        for _ in range(self.weight.ndim - 2 - (groups > 1)):
            unfold = jax.vmap(unfold)
        return self.geometry.to_conv(unfold(self.weight.materialize()), self.bias)


@register_layer(LowRankConv)
class LowRankConvSite(ConvSite):
    """The site of a convolution in factors, adapted so and merged into a dense one."""

    @property
    def acts(self) -> bool:
        """It is the product with its weight."""
        return True

    @property
    def _plain(self) -> ConvSite:
        """That of a convolution with the same geometry and no numbers."""
        geometry, dtype = self.layer.geometry, self.layer.weight.dtype
        kernel = jax.ShapeDtypeStruct(geometry.kernel_shape, dtype)
        return ConvSite(self.path, geometry.to_conv(kernel, None))

    def check(self):
        """Nothing to refuse."""

    def matrix(self):
        """The kernel, multiplied out, its input axes flattened."""
        kernel, taps = self.layer.to_dense().weight, self.layer.geometry.num_spatial_dims
        return kernel.reshape(*kernel.shape[: kernel.ndim - taps - 1], -1)

    @property
    def kernel_shape(self):
        """Output channels; input channels and taps."""
        return self._plain.kernel_shape

    def put(self, matrix, bias):
        """An ``eqx.nn.Conv``."""
        geometry, old = self.layer.geometry, self.layer.bias
        kernel = matrix.reshape(*matrix.shape[:-1], *geometry.kernel_shape[1:])
        bias = bias if bias is None or old is None else bias.astype(old.dtype)
        return geometry.to_conv(kernel.astype(self.layer.weight.dtype), bias)

    def product(self, matrix, x):
        """The convolution with another kernel."""
        return self._plain.product(matrix, x)

    def down(self, right, x):
        """A thin convolution."""
        return self._plain.down(right, x)

    def along_outputs(self, vector):
        """The vector with an axis for every spatial one."""
        return self._plain.along_outputs(vector)

    def base(self, x):
        """Both thin convolutions, without the bias; the factors get no gradient."""
        layer = self.layer
        return made_of(
            LowRankConv,
            weight=jax.tree.map(lax.stop_gradient, layer.weight),
            bias=None,
            geometry=layer.geometry,
            scheme=layer.scheme,
        )(x)

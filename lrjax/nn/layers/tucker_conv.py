from collections.abc import Sequence
from typing import Any

import equinox as eqx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from ..._arguments import check_key
from ...lowrank import TuckerForm, higher_order_svd, multiply_axes
from ._geometry import Geometry, geometry_of
from ._weights import made_of


class TuckerConv(eqx.Module):
    """A convolution whose kernel is a Tucker form: pointwise, a small core, pointwise.

    ``kernel = core ×₁ U_out ×₂ U_in ×₃ U_1 …``. The input is taken to ``r_in`` channels by
    ``U_inᵀ``, convolved with the core to ``r_out``, and taken to the outputs by ``U_out``.
    The factors of the spatial axes, which are short, are multiplied into the core. It is
    called as ``eqx.nn.Conv`` is, and has no groups, since they would have to split the
    factors.

    The start is that of ``eqx.nn.Conv`` with the same arguments, truncated axis by axis.

    Args:
        num_spatial_dims: the number of spatial axes.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: the taps, one number for all axes or one for each.
        ranks: ``(r_out, r_in)``, or with those of the spatial axes behind, which are full
            otherwise.
        stride: as of ``eqx.nn.Conv``.
        padding: as of ``eqx.nn.Conv``.
        dilation: as of ``eqx.nn.Conv``.
        use_bias: whether there is a bias.
        padding_mode: as of ``eqx.nn.Conv``.
        dtype: of weight and bias.
        key: for the start.

    Attributes:
        weight: the kernel as a :class:`~lrjax.lowrank.TuckerForm`, ``(out, in, *taps)``.
        bias: ``(out, 1, …, 1)``, or ``None``.
        geometry: sizes, stride, padding and so on, under the names of ``eqx.nn.Conv``.

    Raises:
        ValueError: for a wrong number of ranks, or one out of range.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> layer = lrjax.nn.TuckerConv(2, 8, 16, 3, (6, 4), key=jax.random.key(0))
        >>> layer(jnp.ones((8, 32, 32))).shape, layer.weight.core.shape
        ((16, 30, 30), (6, 4, 3, 3))

    Reference:
        Y.-D. Kim et al., "Compression of deep convolutional neural networks for fast and
        low power mobile applications" (2015), arXiv 1511.06530.
    """

    weight: TuckerForm
    bias: Float[Array, "..."] | None
    geometry: Geometry = eqx.field(static=True)

    def __init__(
        self,
        num_spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        ranks: Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] | Sequence[tuple[int, int]] = 0,
        dilation: int | Sequence[int] = 1,
        use_bias: bool = True,
        padding_mode: str = "ZEROS",
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        check_key("TuckerConv", key)
        start = eqx.nn.Conv(
            num_spatial_dims,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            use_bias=use_bias,
            padding_mode=padding_mode,
            dtype=dtype,
            key=key,
        )
        self.weight, self.bias = tucker_node(start.weight, ranks), start.bias
        self.geometry = geometry_of(start)

    @classmethod
    def from_node(
        cls, weight: TuckerForm, bias: Array | None = None, *, like: Any
    ) -> "TuckerConv":
        """The layer of a kernel that is a Tucker form already.

        Args:
            weight: ``(*b, out, in, *taps)``.
            bias: ``(*b, out, 1, …, 1)``, or ``None`` for none.
            like: the convolution whose place it takes, an ``eqx.nn.Conv``.

        Returns:
            The layer.

        Raises:
            TypeError: for a weight that is no Tucker form, or a ``like`` that is no
                convolution.
            ValueError: for a weight of another shape, or a convolution with groups.
        """
        if not isinstance(weight, TuckerForm):
            raise TypeError(
                f"{cls.__name__}.from_node takes a lrjax.lowrank.TuckerForm, got "
                f"{type(weight)}: lrjax.lowrank.higher_order_svd makes one of a kernel."
            )
        geometry = geometry_of(like)
        check_groups(geometry)
        wanted = geometry.kernel_shape
        if weight.shape[-len(wanted) :] != wanted or len(weight.factors) != len(wanted):
            raise ValueError(
                f"{cls.__name__} needs a weight of shape {wanted} with a factor for each "
                f"axis, got {weight.shape} with {len(weight.factors)}."
            )
        return made_of(cls, weight=weight, bias=bias, geometry=geometry)

    @property
    def use_bias(self) -> bool:
        """Whether there is a bias."""
        return self.bias is not None

    @property
    def is_stack(self) -> bool:
        """Whether it holds several layers."""
        return len(self.weight.shape) > len(self.geometry.kernel_shape)

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
        geometry, spatial = self.geometry, self.geometry.num_spatial_dims
        geometry.check_input(self, x)
        outputs, inputs, *taps = self.weight.factors
        core = multiply_axes(self.weight.masked_core(), tuple(taps))
        pointwise = lambda matrix: matrix.reshape(*matrix.shape, *(1,) * spatial)
        nothing, everything = (False,) * spatial, (True,) * spatial
        x, pads = geometry.padded(x)
        h = geometry.convolve(x, pointwise(inputs.T), pads, nothing)
        h = geometry.convolve(h, core, pads, everything)
        y = geometry.convolve(h, pointwise(outputs), pads, nothing)
        return y if self.bias is None else y + self.bias

    def to_dense(self) -> eqx.nn.Conv:
        """The same layer with its kernel multiplied out."""
        return self.geometry.to_conv(self.weight.materialize(), self.bias)


def tucker_node(kernel: Float[Array, "out in *taps"], ranks: Sequence[int]) -> TuckerForm:
    """The truncated higher-order SVD of a kernel; spatial axes are full by default."""
    ranks = tuple(ranks)
    return higher_order_svd(kernel, (*ranks, *kernel.shape[max(len(ranks), 2) :]))


def check_groups(geometry: Geometry) -> None:
    """Refuse groups."""
    if geometry.groups > 1:
        raise ValueError(
            f"a Tucker form has no groups, got groups={geometry.groups}: take a "
            "lrjax.nn.LowRankConv, whose groups have factors of their own."
        )

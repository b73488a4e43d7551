"""How a convolution goes over its input, apart from the numbers of its kernel."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._weights import made_of


_PAD_MODES = {"REFLECT": "reflect", "REPLICATE": "edge", "CIRCULAR": "wrap"}


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The class and the static fields of an ``eqx.nn.Conv``, under the same names."""

    layer: type[eqx.nn.Conv]  # Conv2d, say
    num_spatial_dims: int
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """``(out, in / groups, k_1, …, k_d)``."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def padded(self, x: Array) -> tuple[Array, tuple[tuple[int, int], ...]]:
        """The input, and the zeros that its axes still lack on both sides."""
        pads = self.padding
        if isinstance(pads, str):
            pairs = zip(self.kernel_size, self.dilation, strict=True)
            reach = tuple(d * (k - 1) + 1 for k, d in pairs)
            pads = lax.padtype_to_pads(x.shape[1:], reach, self.stride, pads)
        pads = tuple((int(before), int(after)) for before, after in pads)
        if self.padding_mode == "ZEROS":
            return x, pads
        x = jnp.pad(x, ((0, 0), *pads), _PAD_MODES[self.padding_mode])
        return x, ((0, 0),) * len(pads)

    def convolve(
        self,
        x: Float[Array, "c ..."],
        kernel: Float[Array, "new _c ..."],
        pads: tuple[tuple[int, int], ...],
        axes: tuple[bool, ...],
    ) -> Float[Array, "new ..."]:
        """A convolution that has the stride and the padding of some axes alone."""
        of = lambda values, else_: [
            v if mine else else_ for v, mine in zip(values, axes, strict=True)
        ]
        dtype = jnp.result_type(x, kernel)
        y = lax.conv_general_dilated(
            x[None].astype(dtype),
            kernel.astype(dtype),
            window_strides=of(self.stride, 1),
            padding=of(pads, (0, 0)),
            rhs_dilation=of(self.dilation, 1),
            feature_group_count=self.groups,
        )
        return y[0]

    def check_input(self, layer: Any, x: Any) -> None:
        """Refuse an input of other axes or channels, and the call of a stack of layers."""
        name, got = type(layer).__name__, jnp.shape(x)
        if layer.is_stack:
            raise ValueError(
                f"this {name} is a stack, its weight has shape {layer.weight.shape}: call "
                "its members inside jax.lax.scan or jax.vmap."
            )
        if len(got) != self.num_spatial_dims + 1 or got[0] != self.in_channels:
            raise ValueError(
                f"{name} takes one input of {self.in_channels} channels and "
                f"{self.num_spatial_dims} spatial axes, got shape {got}: for a batch call "
                "jax.vmap(layer)(x)."
            )

    def to_conv(
        self, kernel: Array | jax.ShapeDtypeStruct, bias: Array | None
    ) -> eqx.nn.Conv:
        """The layer of Equinox with a kernel, or with its shape alone, and a bias."""
        fields = dict(vars(self), use_bias=bias is not None)
        return made_of(fields.pop("layer"), weight=kernel, bias=bias, **fields)


def geometry_of(conv: Any) -> Geometry:
    """The geometry of a convolution of Equinox, or of one of this room."""
    if isinstance(conv, eqx.nn.Conv):
        _, *fields = dataclasses.fields(Geometry)
        return Geometry(type(conv), *(getattr(conv, field.name) for field in fields))
    if isinstance(geometry := getattr(conv, "geometry", None), Geometry):
        return geometry
    raise TypeError(
        "like= is the convolution that the layer takes the place of, an eqx.nn.Conv or one "
        f"of lrjax.nn; got {type(conv)}."
    )

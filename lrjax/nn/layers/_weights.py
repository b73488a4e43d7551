"""What the layers share: the start of a factorized weight, and the product with one."""

from typing import Any, Literal, TypeVar, get_args

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._dense import dense
from ...linalg import TruncatedSVD, check_rank, identity_like, truncated_svd
from ...lowrank import LowRank, SVDForm


Form = Literal["pair", "svd"]
Node = LowRank | SVDForm
Module = TypeVar("Module", bound=eqx.Module)


def made_of(cls: type[Module], **fields: Any) -> Module:
    """A module out of its fields, past its ``__init__``, as ``jax.tree`` makes them."""
    module = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(module, name, value)
    return module


def check_form(form: str) -> None:
    """Refuse a form that is none."""
    if form not in get_args(Form):
        raise ValueError(
            "form must be 'pair', for a lrjax.LowRank, or 'svd', for a lrjax.SVDForm; got "
            f"{form!r}."
        )


def check_layer_rank(owner: str, rank: Any, shape: tuple[int, ...]) -> None:
    """Refuse a rank that is no integer, or none of a matrix of this shape."""
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"{owner} needs an integer as rank, got {rank!r}.")
    check_rank(rank, shape)


def check_node(owner: str, weight: Any) -> None:
    """Refuse a weight that is no node."""
    if not isinstance(weight, LowRank | SVDForm):
        raise TypeError(
            f"{owner}.from_node takes a lrjax.LowRank or a lrjax.SVDForm, got "
            f"{type(weight)}: lrjax.nn.factorize makes the layer of a dense one."
        )


def spectral(
    matrix: Float[Array, "*b m n"], rank: int, form: Form, dtype: Any = None
) -> Node:
    """The best approximation of this rank, as a node; by default of the dtype it has."""
    return node_of(truncated_svd(matrix, rank), rank, form, dtype or matrix.dtype)


def node_of(svd: TruncatedSVD, rank: int, form: Form, dtype: Any) -> Node:
    """The first ``rank`` singular triplets, in two factors or as orthonormal ones."""
    check_form(form)
    left, right = svd.left[..., :rank], svd.right[..., :rank]
    values = svd.values[..., :rank]
    if form == "pair":
        root = jnp.sqrt(values)[..., None, :]
        return LowRank((left * root).astype(dtype), (right * root).astype(dtype))
    square = values[..., :, None] * values[..., None, :]
    core = identity_like(square) * values[..., :, None]
    return SVDForm(*(x.astype(dtype) for x in (left, core, right)))


def pair_of(weight: Node) -> LowRank:
    """The weight in two factors."""
    return weight.to_low_rank() if isinstance(weight, SVDForm) else weight


def dense_linear(weight: Float[Array, "*b m n"], bias: Array | None) -> eqx.nn.Linear:
    """The layer of Equinox with a weight and a bias."""
    rows, columns = weight.shape[-2:]
    return made_of(
        eqx.nn.Linear,
        weight=weight,
        bias=bias,
        in_features=columns,
        out_features=rows,
        use_bias=bias is not None,
    )


def apply(weight: Node, x: Float[Array, " n"]) -> Float[Array, " m"]:
    """``W x`` from right to left, the thin products first."""
    return up(weight, dense(x, weight.right.mT))


def up(weight: Node, h: Float[Array, " r"]) -> Float[Array, " m"]:
    """``left h``, or ``left core h``."""
    if isinstance(weight, SVDForm):
        h = dense(h, weight.masked_core())
    return dense(h, weight.left)


def check_stack(layer: Any) -> None:
    """Refuse the call of a stack of layers."""
    if layer.weight.ndim > 2:
        raise ValueError(
            f"this {type(layer).__name__} is a stack, its weight has shape "
            f"{layer.weight.shape}: call its members inside jax.lax.scan or jax.vmap."
        )


def check_input(layer: Any, x: Any, shape: tuple[int, ...]) -> None:
    """Refuse an input of another shape, and the call of a stack of layers."""
    check_stack(layer)
    name = type(layer).__name__
    if jnp.shape(x) != shape:
        raise ValueError(
            f"{name} takes one input of shape {shape}, got {jnp.shape(x)}: for a batch "
            "call jax.vmap(layer)(x)."
        )

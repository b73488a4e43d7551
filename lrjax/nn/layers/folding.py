"""The matrices that the kernel of a convolution can be seen as."""

import math
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float


Scheme = Literal["inputs", "outputs", "first", "last"]


def fold_kernel(
    kernel: Float[Array, "out in *taps"], scheme: Scheme = "inputs", *, groups: int = 1
) -> Float[Array, "*groups m n"]:
    """The kernel of a convolution as a matrix: its taps go with the outputs or the inputs.

    A matrix of rank ``r`` is two convolutions through ``r`` channels: one over the axes
    that went with the inputs, then one over those that went with the outputs.

    - ``"inputs"``: ``(out) × (in · taps)``, a thin convolution and a pointwise one;
    - ``"outputs"``: ``(out · taps) × (in)``, the pointwise one first;
    - ``"first"``: ``(out · k_1) × (in · k_2 ⋯ k_d)``: the first spatial axis comes last;
    - ``"last"``: ``(out · k_d) × (in · k_1 ⋯ k_{d-1})``, the other separable one.

    With one spatial axis the last three are the same.

    Args:
        kernel: ``(out, in / groups, k_1, …, k_d)``, as ``eqx.nn.Conv`` keeps it.
        scheme: which of the four.
        groups: of the convolution: each has a matrix of its own.

    Returns:
        ``(m, n)``, or with groups ``(groups, m / groups, n)``.

    Raises:
        ValueError: for an unknown scheme, no spatial axis, or outputs that the groups do
            not divide.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> kernel = jnp.zeros((8, 4, 3, 5))
        >>> [lrjax.nn.fold_kernel(kernel, s).shape for s in ("inputs", "outputs")]
        [(8, 60), (120, 4)]
        >>> [lrjax.nn.fold_kernel(kernel, s).shape for s in ("first", "last")]
        [(24, 20), (40, 12)]

    Reference:
        L. Liebenwein, A. Maalouf, O. Gal, D. Feldman, D. Rus, "Compressing neural networks:
        towards determining the optimal layer-wise decomposition" (2021), arXiv 2107.11442.
    """
    rows, cols = _axes(kernel.shape, scheme)
    m, n = matrix_shape(kernel.shape, scheme, groups)
    order = (0, *(2 + a for a in rows), 1, *(2 + a for a in cols))
    matrix = kernel.transpose(order).reshape(groups, m, n)
    return matrix if groups > 1 else matrix[0]


def unfold_matrix(
    matrix: Float[Array, "*groups m n"],
    shape: tuple[int, ...],
    scheme: Scheme = "inputs",
    *,
    groups: int = 1,
) -> Float[Array, "out in *taps"]:
    """The kernel that :func:`fold_kernel` made a matrix of.

    Args:
        matrix: ``(m, n)``, or with groups ``(groups, m / groups, n)``.
        shape: of the kernel, ``(out, in / groups, k_1, …, k_d)``.
        scheme: the scheme it was folded by.
        groups: of the convolution.

    Returns:
        The kernel.

    Raises:
        ValueError: for an unknown scheme, or a matrix that is none of this kernel.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> kernel = jnp.arange(2 * 3 * 5.0).reshape(2, 3, 5)
        >>> matrix = lrjax.nn.fold_kernel(kernel, "last")
        >>> bool((lrjax.nn.unfold_matrix(matrix, (2, 3, 5), "last") == kernel).all())
        True
    """
    rows, cols = _axes(shape, scheme)
    wanted = matrix_shape(shape, scheme, groups)
    if matrix.shape != (*(() if groups == 1 else (groups,)), *wanted):
        raise ValueError(
            f"a kernel of shape {shape} in {groups} group(s) is folded by {scheme!r} into "
            f"matrices {wanted}, got shape {matrix.shape}."
        )
    taps = lambda axes: tuple(shape[2 + a] for a in axes)
    x = matrix.reshape(shape[0], *taps(rows), shape[1], *taps(cols))
    order = (0, *(2 + a for a in rows), 1, *(2 + a for a in cols))
    return x.transpose([order.index(axis) for axis in range(len(order))])


def matrix_shape(
    shape: tuple[int, ...], scheme: Scheme, groups: int = 1
) -> tuple[int, int]:
    """The shape of the matrix of one group."""
    rows, cols = _axes(shape, scheme)
    if groups < 1 or shape[0] % groups:
        raise ValueError(
            f"a convolution of {shape[0]} output channels cannot have groups={groups}."
        )
    size = lambda axes: math.prod(shape[2 + a] for a in axes)
    return shape[0] // groups * size(rows), shape[1] * size(cols)


def taps_of_outputs(scheme: Scheme, spatial: int) -> tuple[bool, ...]:
    """Of every spatial axis, whether it goes with the outputs."""
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme must be one of {get_args(Scheme)}, got {scheme!r}.")
    with_outputs = {
        "inputs": (),
        "outputs": range(spatial),
        "first": (0,),
        "last": (spatial - 1,),
    }
    return tuple(axis in with_outputs[scheme] for axis in range(spatial))


def _axes(shape: tuple[int, ...], scheme: Scheme) -> tuple[list[int], list[int]]:
    """The spatial axes that go with the outputs, and those that go with the inputs."""
    if len(shape) < 3:
        raise ValueError(
            f"a kernel has shape (out, in / groups, taps…), got one of {shape}."
        )
    outputs = taps_of_outputs(scheme, len(shape) - 2)
    axes = range(len(outputs))
    return [a for a in axes if outputs[a]], [a for a in axes if not outputs[a]]


def thin_kernels(
    left: Float[Array, "*groups m r"],
    right: Float[Array, "*groups n r"],
    shape: tuple[int, ...],
    scheme: Scheme,
    groups: int,
) -> tuple[Float[Array, "_gr _in *_k"], Float[Array, "_out _r *_l"]]:
    """The kernels of the two convolutions, first and second, that ``left rightᵀ`` is."""
    outputs, rank = taps_of_outputs(scheme, len(shape) - 2), left.shape[-1]
    taps = lambda mine: tuple(
        k if own == mine else 1 for k, own in zip(shape[2:], outputs, strict=True)
    )
    first = right.reshape(groups, shape[1], *taps(False), rank)
    first = jnp.moveaxis(first, -1, 1).reshape(groups * rank, shape[1], *taps(False))
    second = left.reshape(shape[0], *taps(True), rank)
    return first, jnp.moveaxis(second, -1, 1)

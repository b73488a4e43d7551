from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from ...linalg import nonzero, outer, working_dtype


def tangent_kernel(
    function: Callable[..., Any], params: PyTree, *args: Any
) -> Float[Array, "k k"]:
    """The neural tangent kernel, ``K = J Jᵀ``, of all outputs of a small model.

    ``J (k, number of parameters)`` has the derivatives of all k outputs, of all examples,
    by all parameters. It is formed: for some thousand outputs times parameters.

    Args:
        function: ``function(params, *args)``, an array or a tree of arrays.
        params: any tree; what is no floating-point array stays as it is.
        *args: for example the inputs.

    Returns:
        The kernel, the outputs in the order of ``jnp.ravel``, in float32 or wider.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> inputs = jnp.array([[3.0, 4.0], [0.0, 1.0]])
        >>> print(lrjax.metrics.tangent_kernel(lambda w, x: x @ w, jnp.ones(2), inputs))
        [[25.  4.]
         [ 4.  1.]]

    Reference:
        A. Jacot, F. Gabriel, C. Hongler, "Neural tangent kernel: convergence and
        generalization in neural networks" (2018), arXiv 1806.07572.
    """
    moving, fixed = eqx.partition(params, eqx.is_inexact_array)

    def outputs(moving):
        found = jax.tree.leaves(function(eqx.combine(moving, fixed), *args))
        return jnp.concatenate([jnp.ravel(x) for x in found])

    kernel = jnp.zeros([])
    for x in jax.tree.leaves(jax.jacrev(outputs)(moving)):
        rows = x.reshape(len(x), -1).astype(working_dtype(x.dtype))
        kernel = kernel + outer(rows, rows)
    return kernel


def kernel_alignment(
    x: Float[Array, "*batch k k"], y: Float[Array, "*batch k k"]
) -> Float[Array, "*batch"]:
    """The cosine between two kernels, ``⟨K, L⟩ / (‖K‖ ‖L‖)``; one for ``L = y yᵀ`` is best.

    Args:
        x: ``K``.
        y: ``L``, of another time or of the targets.

    Returns:
        Between 0 and 1 for positive semidefinite kernels; 0 if one is zero.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.metrics.kernel_alignment(jnp.eye(4), jnp.ones((4, 4))))
        0.5

    Reference:
        N. Cristianini, J. Shawe-Taylor, A. Elisseeff, J. Kandola, "On kernel-target
        alignment" (2001), NeurIPS.
    """
    x, y = (_unit(z.astype(working_dtype(z.dtype))) for z in (x, y))
    return jnp.sum(x * y, axis=(-2, -1))


def _unit(x: Array) -> Array:
    """A matrix over its Frobenius norm, whose square does not overflow."""
    x = x / nonzero(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True))
    return x / nonzero(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True))


def relative_change(new: PyTree, old: PyTree) -> Scalar:
    """``‖θ' − θ‖ / ‖θ‖`` over all arrays of two trees.

    Args:
        new: ``θ'``.
        old: ``θ``, of the same structure.

    Returns:
        The change; the absolute one of what was zero.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> old = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
        >>> new = {"a": jnp.array([3.0]), "b": jnp.array([4.5])}
        >>> print(lrjax.metrics.relative_change(new, old))
        0.1
    """
    new, old = (eqx.filter(tree, eqx.is_inexact_array) for tree in (new, old))
    wide = lambda x: x.astype(working_dtype(x.dtype))
    moved = jax.tree.map(lambda a, b: wide(a) - wide(b), new, old)
    sizes = [
        jnp.sqrt(sum(jnp.sum(wide(x) ** 2) for x in jax.tree.leaves(tree)))
        for tree in (moved, old)
    ]
    return sizes[0] / nonzero(sizes[1])


class KernelChange(NamedTuple):
    """How far training was from being linear in the parameters.

    Attributes:
        kernel: the relative change of the tangent kernel: zero in the lazy regime.
        misalignment: one minus the cosine between the two kernels, what is left of it
            where the kernel only grows.
        parameters: the relative change of the parameters.
    """

    kernel: Scalar
    misalignment: Scalar
    parameters: Scalar


def kernel_change(
    function: Callable[..., Any], new: PyTree, old: PyTree, *args: Any
) -> KernelChange:
    """Rich or lazy: how the tangent kernel of a model changed in training.

    Args:
        function: as for :func:`tangent_kernel`.
        new: the parameters after training.
        old: those before.
        *args: for example the inputs.

    Returns:
        A :class:`KernelChange`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> square = lambda w, x: x * w**2
        >>> one = jnp.ones(1)
        >>> print(lrjax.metrics.kernel_change(square, 2 * one, one, one).kernel)
        3.0

    Reference:
        L. Chizat, E. Oyallon, F. Bach, "On lazy training in differentiable programming"
        (2018), arXiv 1812.07956.
    """
    after, before = (tangent_kernel(function, params, *args) for params in (new, old))
    # Half the squared distance of unit vectors: no cosine, which stops at rounding.
    apart = 0.5 * jnp.sum((_unit(after) - _unit(before)) ** 2)
    return KernelChange(relative_change(after, before), apart, relative_change(new, old))

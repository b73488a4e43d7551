import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, DTypeLike, Float, Int, PyTree

from ...._arguments import checks_trees
from ...._matrices import check_real
from ...._sharding import einsum, placed_along
from ....linalg import eigh, increment, nonzero, times, working_dtype
from ..._checks import check_non_negative


class ScaleByGradientWindowState(NamedTuple):
    """The state of :func:`scale_by_gradient_window`.

    Attributes:
        count: the number of gradients so far.
        gradients: the last ``m`` of them, a tree like the parameters whose leaves have one
            more axis in front; zero before there were that many.
        gram: their inner products.
    """

    count: Int[Array, ""]
    gradients: PyTree
    gram: Float[Array, "m m"]


@checks_trees
def scale_by_gradient_window(
    window: int = 32,
    damping: ArrayLike = 1.0,
    *,
    relative: bool = True,
    dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Precondition by the second moment of the last gradients, of all parameters together.

    The last ``m`` gradients are the rows of ``G (m, N)``, this one ``g`` among them, and
    the update is that of the empirical Fisher matrix with damping::

        (λI + GᵀG/m)⁻¹ g = m Gᵀ (mλI + G Gᵀ)⁻¹ e        e the row of g in G

    ``G Gᵀ`` is kept and gets one new row a step; its eigendecomposition is of size ``m``.
    On the right nothing cancels, whatever ``λ``, as it does in the formula of Woodbury
    divided by ``λ``. With a relative damping the update is ``λ`` times that, and no
    longer than the gradient. The state has ``m`` numbers a parameter, and a step reads
    them twice. Leaves keep their sharding.

    Args:
        window: ``m``.
        damping: ``λ``, or its ratio to the mean of the diagonal of ``G Gᵀ/m``, see
            ``relative``. Never less than the rounding error of the Gram matrix, so zero is
            safe with an absolute one.
        relative: if True, ``damping`` multiplies that mean, and ``λ`` the update, which has
            then the units of a gradient and fades with it: learning rates are of the size
            of those of SGD. If False both are as in the paper, with an absolute ``λ``.
        dtype: in which gradients are kept, bfloat16 for half the memory; by default that
            of the parameters, and at least float32. The update is that of the gradient so
            rounded.

    Returns:
        The transform. A gradient that is not finite is not kept, and its update is zero.

    Raises:
        ValueError: for a window below one, or negative damping.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.scale_by_gradient_window(2, 0.5, relative=False)
        >>> g = jnp.array([3.0, 0.0])
        >>> print(tx.update(g, tx.init(g))[0])  # 3 / (0.5 + 9 / 2)
        [0.6 0. ]

    Reference:
        E. Frantar, E. Kurtic, D. Alistarh, "M-FAC: efficient matrix-free approximations of
        second-order information" (2021), arXiv 2107.03356. Special case: a window of one
        without damping is a step of length ``1/‖g‖``, with an absolute ``λ``.
    """
    if window < 1:
        raise ValueError(f"scale_by_gradient_window needs window >= 1, got {window}.")
    check_non_negative("scale_by_gradient_window", "damping", damping)

    def init(params):
        check_real("scale_by_gradient_window", params)

        def empty(x):
            kept = working_dtype(x.dtype) if dtype is None else dtype
            rows = jnp.zeros((window, *x.shape), kept)
            return placed_along(rows, x, (None, *range(x.ndim)))

        wide = [working_dtype(x.dtype) for x in jax.tree.leaves(params)]
        gram = jnp.zeros((window, window), jnp.result_type(jnp.float32, *wide))
        return ScaleByGradientWindowState(
            jnp.zeros((), jnp.int32), jax.tree.map(empty, params), gram
        )

    def update(updates, state, params=None, **extra):
        del params, extra
        leaves, treedef = jax.tree.flatten(updates)
        rows = treedef.flatten_up_to(state.gradients)
        if not leaves:
            return updates, state
        at = state.count % window
        g = [x.astype(row.dtype) for x, row in zip(leaves, rows, strict=True)]
        usable = jnp.isfinite(_total([jnp.sum(_wide(x) ** 2) for x in g]))
        keep = lambda new, old: jnp.where(usable, new, old)

        def put(row, x):
            # A gradient that is not finite changes nothing: the next one takes its place.
            old = lax.dynamic_index_in_dim(row, at, 0, keepdims=False)
            return lax.dynamic_update_index_in_dim(row, keep(x, old), at, 0)

        new = list(map(put, rows, g))
        g = [keep(x, jnp.zeros_like(x)) for x in g]
        products = _total(
            [
                einsum(f"m{_axes(x)},{_axes(x)}->m", _wide(row), _wide(x))
                for row, x in zip(new, g, strict=True)
            ]
        ).astype(state.gram.dtype)
        here = jnp.arange(window) == at
        gram = jnp.where(here[:, None], products[None], state.gram)
        gram = jnp.where(here[None], products[:, None], gram)
        weights = _weights(gram, here, damping, relative)
        out = [
            einsum(f"m{_axes(x)},m->{_axes(x)}", _wide(row), weights.astype(_wide(x).dtype))
            for row, x in zip(new, g, strict=True)
        ]
        zeros = map(jnp.zeros_like, out)
        out = [
            keep(u, zero).astype(x.dtype)
            for u, zero, x in zip(out, zeros, leaves, strict=True)
        ]
        return treedef.unflatten(out), ScaleByGradientWindowState(
            keep(increment(state.count), state.count),
            treedef.unflatten(new),
            keep(gram, state.gram),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _weights(gram: Array, here: Array, damping: ArrayLike, relative: bool) -> Array:
    """``m (mλI + G Gᵀ)⁻¹ e``, of each gradient in the update, or ``λ`` times that."""
    m, dtype = len(gram), gram.dtype
    values, vectors = eigh(gram)
    values = jnp.maximum(values, 0)
    damping = jnp.asarray(damping, dtype)
    shift = damping * (jnp.sum(values) / m if relative else m)
    # Rounding moves the eigenvalues by some eps of the largest one: those below are damped,
    # those well above are not.
    floor = 16 * jnp.finfo(dtype).eps * values[-1]
    least = floor**2 / nonzero(values + floor)
    inverse = 1 / nonzero(values + jnp.maximum(shift, least))
    inside = times(here.astype(dtype)[None], vectors) * inverse[None]
    return (shift if relative else m) * times(inside, vectors.T)[0]


def _total(parts: list[Array]) -> Array:
    return functools.reduce(operator.add, parts)


def _wide(x: Array) -> Array:
    return x.astype(working_dtype(x.dtype))


def _axes(x: Array) -> str:
    return "abcdefghijkl"[: x.ndim]

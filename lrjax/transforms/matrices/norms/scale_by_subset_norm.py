from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Int, PyTree

from ...._arguments import checks_trees
from ...._matrices import check_real
from ....linalg import increment, working_dtype


class ScaleBySubsetNormState(NamedTuple):
    """The state of :func:`scale_by_subset_norm`.

    Attributes:
        count: the number of steps.
        squares: the averaged sums of squares, of length one along the summed axis.
        numerator: the state of the transform of the numerator.
    """

    count: Int[Array, ""]
    squares: PyTree
    numerator: Any


@checks_trees
def scale_by_subset_norm(
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    numerator: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Divide by one second moment for each row of the longer side, not for each entry.

    For a matrix ``G (m, n)`` with ``m <= n``: ``v_j ← b2 v_j + (1−b2) Σ_i G_ij²`` and
    ``U_ij = N_ij / (√(v_j/(1−b2ᵗ)) + ε)``, ``n`` numbers of state; with ``m > n`` one for
    each row. It is a sum, not a mean, so that rates are some ten times Adam's. Vectors get
    a second moment for each entry. ``b2 = 1`` adds the squares up, as AdaGrad does.

    ``N`` is what ``numerator`` makes of the same gradient: momentum for example. A chain
    cannot say that, since each of its parts sees only what the one before it made.

    Args:
        b2: decay of the second moment.
        eps: added to its root.
        numerator: a transform; the gradient itself by default.

    Returns:
        The transform.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.scale_by_subset_norm()
        >>> g = jnp.array([[3.0, 0.0, 1.0], [4.0, 2.0, 0.0]])
        >>> print(tx.update(g, tx.init(g))[0].round(4))
        [[0.6 0.  1. ]
         [0.8 1.  0. ]]

    Reference:
        T. Nguyen, H. L. Nguyen, "Subset-norm and subspace-momentum: faster
        memory-efficient adaptive optimization with convergence guarantees" (2024), arXiv
        2411.07120.
    """
    top = optax.with_extra_args_support(
        optax.identity() if numerator is None else numerator
    )

    def init(params):
        check_real("scale_by_subset_norm", params)
        zeros = lambda p: _sums(jnp.zeros_like(p, working_dtype(p.dtype)))
        return ScaleBySubsetNormState(
            jnp.zeros((), jnp.int32), jax.tree.map(zeros, params), top.init(params)
        )

    def update(updates, state, params=None, **extra):
        count = increment(state.count)
        adds_up = jnp.asarray(b2) == 1
        new = jnp.where(adds_up, 1, 1 - b2)
        filled = jnp.where(adds_up, 1, 1 - b2**count)

        def mix(g, v):
            return (b2 * v + new * _sums(g.astype(v.dtype) ** 2)).astype(v.dtype)

        def divide(n, v):
            return (n / (jnp.sqrt(v / filled) + eps)).astype(n.dtype)

        squares = jax.tree.map(mix, updates, state.squares)
        steps, top_state = top.update(updates, state.numerator, params, **extra)
        steps = jax.tree.map(divide, steps, squares)
        return steps, ScaleBySubsetNormState(count, squares, top_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _sums(x: Array) -> Array:
    """The sums along the shorter of the last two axes, rows where they are as long."""
    if x.ndim < 2:
        return x
    return jnp.sum(x, axis=-2 if x.shape[-2] <= x.shape[-1] else -1, keepdims=True)

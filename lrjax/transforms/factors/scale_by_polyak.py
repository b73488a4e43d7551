import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike, PyTree

from ..._arguments import checks_trees
from ..._matrices import check_real
from ...linalg import nonzero, working_dtype
from .._checks import check_extra, check_non_negative


@checks_trees
def scale_by_polyak(
    f_min: ArrayLike = 0.0, *, cap: ArrayLike = math.inf
) -> optax.GradientTransformationExtraArgs:
    """Polyak's step size, in the metric of whatever stands before it in the chain.

    For the direction ``P`` that reaches it and the raw gradient ``G``::

        P ← P · min(cap, max(value − f_min, 0) / ⟨G, P⟩)

    so that the linear model of the loss along the step, ``value − ⟨G, ηP⟩``, is exactly
    ``f_min``. ``optax.scale_by_polyak`` divides by ``‖P‖²`` instead, which is the same
    only without a preconditioner. Place it after the preconditioner and before
    ``optax.scale_by_learning_rate(1.0)``.

    With a ``cap`` it is the truncated model of aProx: the step that minimizes
    ``max(value − ⟨G, d⟩, f_min) + ‖d‖²/(2 cap)``, in the metric in which ``P`` is the
    gradient. A step of length ``cap`` is cut where its linear model would fall below what
    the loss can reach. For a convex loss ``P = H G``, with a fixed ``H``, moves no farther
    from any point where the loss is ``f_min``, at any ``cap``; so on batches that one
    point fits all, a learning rate cannot be too large, and where noise is left the cap
    takes a schedule's part, ``optax.inject_hyperparams(lrjax.scale_by_polyak)``.

    A wrong ``f_min`` does limited harm with a cap: one too small makes steps longer, up to
    the cap; one too large stops all motion where the loss has fallen to it.

    Args:
        f_min: the smallest value of the loss. ``update(..., f_min=…)`` overrides it for
            one step, for rules that estimate it on the way.
        cap: the largest multiple of ``P`` that is taken.

    Returns:
        A stateless optax transform. ``update`` needs ``value``, the loss at ``params``,
        and ``grad``, its gradient (a tree like the updates). A direction with
        ``⟨G, P⟩ <= 0`` gives a zero step.

    Raises:
        TypeError: in ``init``, for complex parameters.
        ValueError: at construction, for a negative cap; in ``update``, if ``value`` or
            ``grad`` is missing.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.scale_by_polyak(f_min=1.0)
        >>> grad = jnp.array([3.0, 4.0])
        >>> step, _ = tx.update(grad, tx.init(grad), value=jnp.array(6.0), grad=grad)
        >>> print(step.round(4))
        [0.6 0.8]

    Reference:
        B. T. Polyak, "Introduction to optimization" (1987), Optimization Software;
        scaled: T. Tong, C. Ma, Y. Chi, "Low-rank matrix recovery with scaled subgradient
        methods: fast and robust convergence without the condition number" (2021), arXiv
        2010.13364; capped: H. Asi, J. C. Duchi, "Stochastic (approximate) proximal point
        methods: convergence, optimality, and adaptivity" (2019), arXiv 1810.05633.
    """
    check_non_negative("scale_by_polyak", "cap", cap)
    smallest = f_min

    def init(params):
        check_real("scale_by_polyak", params)
        return optax.EmptyState()

    def update(
        updates, state, params=None, *, value: Any = None, grad=None, f_min=None, **extra
    ):
        del params, extra
        check_extra("scale_by_polyak", value=value, grad=grad)
        gap = jnp.maximum(value - (smallest if f_min is None else f_min), 0)
        return polyak_step(updates, grad, gap, cap), state

    return optax.GradientTransformationExtraArgs(init, update)


def polyak_step(
    updates: PyTree, grad: PyTree, gap: ArrayLike, cap: ArrayLike = math.inf
) -> PyTree:
    """Scale a direction, at most by ``cap``, so that the linear loss falls by ``gap``."""
    dual = _inner(grad, updates)
    step = jnp.where(dual > 0, jnp.minimum(gap / nonzero(dual), cap), 0)
    return jax.tree.map(
        lambda u: (step.astype(working_dtype(u.dtype)) * u).astype(u.dtype), updates
    )


def _inner(x, y):
    """The inner product of two trees, summed in float32 or wider."""

    def product(a, b):
        dtype = working_dtype(jnp.promote_types(a.dtype, b.dtype))
        return jnp.sum(a.astype(dtype) * b.astype(dtype))

    products = jax.tree.leaves(jax.tree.map(product, x, y))
    return sum(products, start=jnp.zeros([], jnp.float32))

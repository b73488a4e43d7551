import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, PyTree

from ..._arguments import checks_trees
from ..._matrices import check_real
from ...linalg import nonzero
from .._checks import check_extra, check_non_negative
from .scale_by_polyak import polyak_step


SUFFICIENT = 0.3  # the share of the gap that has to be descended for a new level
DOUBTFUL = 0.5  # a loss that falls by this share of a gap that was given up disproves it
CORRECTION = 4.0  # what a level given up too soon multiplies the gap by
LEARN, FORGET = 3.0, 0.9  # what it multiplies the patience by, and one rightly given up


class ScaleByTargetLevelState(NamedTuple):
    """What the search knows about the loss.

    Attributes:
        best: the smallest loss so far.
        base: the smallest loss when the level was set.
        gap: how far below the base the level is.
        path: the length of the steps since then, in units of the gap.
        patience: how long a path may become.
        doubted: a loss that would show that the last level was given up too soon.
        inner: the state of ``inner``.
    """

    best: Float[Array, ""]
    base: Float[Array, ""]
    gap: Float[Array, ""]
    path: Float[Array, ""]
    patience: Float[Array, ""]
    doubted: Float[Array, ""]
    inner: Any = optax.EmptyState()


@checks_trees
def scale_by_target_level(
    fraction: ArrayLike = 0.1,
    *,
    patience: ArrayLike = 3.0,
    shrink: ArrayLike = 0.5,
    grow: ArrayLike = 1.5,
    inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Polyak's step without knowing the smallest value of the loss: aim at a level.

    For the direction ``P`` that reaches it and the raw gradient ``G``::

        P ← P · (value − level) / ⟨G, P⟩        level = base − gap

    that is :func:`scale_by_polyak` with a level in the place of ``f_min``, and a search
    for the level: the base is the smallest loss seen when the level was set. If the loss
    falls below ``base − 0.3 gap`` a new level is set as far (``grow`` times) below the new
    best loss. If the steps have become longer than ``patience`` gaps without that, the
    level is given up as too ambitious: the gap is halved (``shrink``).

    Near a sharp minimum of ratio χ between the largest and the smallest slope, as with
    many outliers or wide factors, even the true smallest loss takes about χ² steps to
    come nearer by half. How patient to be is therefore learned: if the loss falls to where
    half of a gap that was given up would have ended, it was given up too soon, the gap is
    multiplied by four and the patience by three; every level that is given up takes a
    tenth of the patience away, down to the first one. The gap then follows the true one
    and convergence is linear, in little more steps than with the true ``f_min``: one to
    three times as many. With noise the gap goes to zero, and so do the steps. State: six
    numbers.

    A preconditioner whose damping is to follow the gap has to know the level before it is
    applied: hand it over as ``inner``, which is told the level as ``f_min``.

    Args:
        fraction: the first gap as a share of the first loss.
        patience: when a level is given up, at first and at least; the path is measured in
            gaps, ``Σ (value − level)/gap``, so that far excursions end it sooner.
        shrink: what a level given up multiplies the gap by.
        grow: what a reached level multiplies the gap by, so that a gap that has become
            too small recovers.
        inner: a transform that makes the direction of the gradient, such as
            ``scale_by_gram(0.1, loss_power=1.0)``; its ``update`` is given ``f_min``, the
            level. By default the direction is what comes in.

    Returns:
        An optax transform. ``update`` needs ``value``, the loss at ``params``, and
        ``grad``, its gradient (a tree like the updates).

    Raises:
        TypeError: in ``init``, for complex parameters.
        ValueError: at construction, for a negative argument; in ``update``, if ``value``
            or ``grad`` is missing.

    Example:
        Half of the entries are far off; the loss at the solution is not known:

        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> y = jnp.where(jnp.arange(9) < 4, 50.0, 1.0)
        >>> loss = lambda x: jnp.sum(jnp.abs(x - y))
        >>> tx = lrjax.scale_by_target_level()
        >>> tx = optax.chain(tx, optax.scale_by_learning_rate(1.0))
        >>> x = jnp.array(7.0)
        >>> state = tx.init(x)
        >>> for _ in range(60):
        ...     value, grad = jax.value_and_grad(loss)(x)
        ...     updates, state = tx.update(grad, state, x, value=value, grad=grad)
        ...     x = optax.apply_updates(x, updates)
        >>> print(x.round(2))
        1.0

    Reference:
        J.-L. Goffin, K. C. Kiwiel, "Convergence of a simple subgradient level method"
        (1999), Mathematical Programming; U. Brännlund, "On relaxation methods for
        nonsmooth convex optimization" (1993), thesis, KTH Stockholm. The length of the
        path, a constant there, is learned here. Special case: with the level at the
        smallest value it is :func:`scale_by_polyak`.
    """
    arguments = {"fraction": fraction, "patience": patience, "shrink": shrink, "grow": grow}
    for name, argument in arguments.items():
        check_non_negative("scale_by_target_level", name, argument)
    direction = optax.identity() if inner is None else inner
    direction = optax.with_extra_args_support(direction)

    def init(params):
        check_real("scale_by_target_level", params)
        dtype = _loss_dtype(params)
        zero, unknown = jnp.zeros([], dtype), jnp.full([], jnp.finfo(dtype).max, dtype)
        first = jnp.asarray(patience, dtype)
        return ScaleByTargetLevelState(
            unknown, unknown, zero, zero, first, -unknown, direction.init(params)
        )

    def update(updates, state, params=None, *, value: Any = None, grad=None, **extra):
        check_extra("scale_by_target_level", value=value, grad=grad)
        value = jnp.asarray(value, state.best.dtype)
        # "Unknown" is the largest number: a state has no booleans to say that it is new.
        unknown = jnp.finfo(state.best.dtype).max
        first = state.best == unknown
        best = jnp.minimum(state.best, value)
        # Strictly: a gap below the rounding error of the loss is never descended.
        reached = ~first & (best < state.base - SUFFICIENT * state.gap)
        missed = ~first & ~reached & (state.path > state.patience)
        too_soon = ~first & (best < state.doubted)
        gap = state.gap * jnp.where(missed, shrink, jnp.where(reached, grow, 1))
        gap = gap * jnp.where(too_soon & ~missed, CORRECTION, 1)
        gap = jnp.where(first, fraction * jnp.abs(value), gap)
        learned = state.patience * jnp.where(too_soon, LEARN, jnp.where(missed, FORGET, 1))
        doubted = jnp.where(too_soon, -unknown, state.doubted)
        doubted = jnp.where(missed, state.base - DOUBTFUL * state.gap, doubted)
        renewed = first | reached | missed | too_soon
        # A missed level starts again from the best loss, however far off the path is.
        base = jnp.where(renewed, best, state.base)
        distance = value - base + gap
        walked = distance / nonzero(gap)
        path = jnp.where(renewed, 0, state.path) + walked
        updates, inner_state = direction.update(
            updates, state.inner, params, **extra, value=value, grad=grad, f_min=base - gap
        )
        numbers = (best, base, gap, path, jnp.maximum(learned, patience), doubted)
        numbers = (jnp.asarray(x, best.dtype) for x in numbers)
        new = ScaleByTargetLevelState(*numbers, inner=inner_state)
        return polyak_step(updates, grad, distance), new

    return optax.GradientTransformationExtraArgs(init, update)


def _loss_dtype(params: PyTree) -> jnp.dtype:
    """The loss has the precision of the parameters, and at least that of float32."""
    dtypes = [x.dtype for x in jax.tree.leaves(params) if hasattr(x, "dtype")]
    real = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return functools.reduce(jnp.promote_types, real, jnp.dtype(jnp.float32))

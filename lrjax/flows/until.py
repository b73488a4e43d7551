from collections.abc import Callable

from jaxtyping import Array, ArrayLike, Bool

from ._field import FlowState


def loss_below(
    value: ArrayLike, *, relative: bool = False
) -> Callable[[FlowState], Bool[Array, ""]]:
    """Stop a flow when the loss has come down to a value.

    Args:
        value: the loss to stop at.
        relative: if True, ``value`` is a multiple of the loss at the start; if False it is
            in the units of the loss.

    Returns:
        A rule for ``gradient_flow(until=…)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> half_square = lambda x: 0.5 * jnp.sum(x**2)
        >>> rule = lrjax.flows.loss_below(1e-4)
        >>> solution = lrjax.gradient_flow(half_square, jnp.ones(1), t1=99.0, until=rule)
        >>> bool(solution.stats.stopped), bool(solution.stats.time < 10)
        (True, True)
    """

    def rule(state: FlowState) -> Array:
        return state.loss <= value * (state.start_loss if relative else 1)

    return rule


def gradient_below(
    ratio: ArrayLike, *, after: ArrayLike = 0.0
) -> Callable[[FlowState], Bool[Array, ""]]:
    """Stop a flow when the gradient is small against the one at the start.

    A small initialization starts next to a saddle, where the gradient is as small as the
    initialization. Measured against itself it is not small there: with ``ratio < 1`` the
    rule does not fire before the flow has left the saddle.
    But from a very small start so small a gradient may never be resolved: where
    ``ratio`` times the start is below ``rtol``, :func:`stationary` is the rule to take.

    Args:
        ratio: of the norms of the two gradients.
        after: do not stop before this time.

    Returns:
        A rule for ``gradient_flow(until=…)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> half_square = lambda x: 0.5 * jnp.sum(x**2)
        >>> rule = lrjax.flows.gradient_below(1e-2)
        >>> solution = lrjax.gradient_flow(half_square, jnp.ones(1), t1=99.0, until=rule)
        >>> bool(solution.stats.time < 10)
        True
    """

    def rule(state: FlowState) -> Array:
        small = state.gradient_norm <= ratio * state.start_gradient_norm
        return small & (state.t >= after)

    return rule


def stationary(
    rate: ArrayLike = 1e-7, *, after: ArrayLike = 0.0
) -> Callable[[FlowState], Bool[Array, ""]]:
    """Stop a flow when the parameters change slowly against their own size.

    ``‖dθ/dt‖ <= rate · ‖θ‖``, with no absolute term: near a saddle at zero the relative
    rate is the growth rate, whatever the size of the initialization, so the rule waits
    for the flow to escape and to converge. Parameters that are exactly zero, or at an
    exact saddle, count as stationary. Frozen weights belong into the data of the loss,
    not among the parameters, whose norm they would inflate.

    Args:
        rate: in 1/time.
        after: do not stop before this time.

    Returns:
        A rule for ``gradient_flow(until=…)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> double_well = lambda x: 0.25 * jnp.sum((x**2 - 1) ** 2)
        >>> rule = lrjax.flows.stationary(1e-3)
        >>> start = jnp.array([1e-6])
        >>> solution = lrjax.gradient_flow(double_well, start, t1=99.0, until=rule)
        >>> print(solution.params.round(2))
        [1.]
    """

    def rule(state: FlowState) -> Array:
        return (state.speed <= rate * state.size) & (state.t >= after)

    return rule

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int


class Turn(NamedTuple):
    """What a schedule may look at to decide on a refresh.

    Attributes:
        count: the number of steps before this one.
        leaf: the index of the leaf among the projected ones.
        leaves: how many there are.
    """

    count: Int[Array, ""]
    leaf: int
    leaves: int


class Schedule(NamedTuple):
    """When a basis is refreshed.

    Attributes:
        due: ``(state, Turn) -> bool``, a Python bool if it is the same on every step.
        when: ``"before"``: the new basis serves the gradient that it was made from;
            ``"after"``: the next one, so that no gradient defines its own basis.
        init: ``(batch shape) -> state``, a pytree of arrays with these leading axes.
        observe: ``(state, overlap, Turn) -> state`` after a refresh; ``overlap`` is
            ``P_newᵀ P_old (*b, r, r)``.
        external: whether only ``update(…, refresh=True)`` asks for a refresh.
    """

    due: Callable[[Any, Turn], Bool[Array, "*b"] | bool]
    when: Literal["before", "after"] = "before"
    init: Callable[[tuple[int, ...]], Any] = lambda batch: ()
    observe: Callable[[Any, Array, Turn], Any] = lambda state, overlap, turn: state
    external: bool = False


def always(*, when: Literal["before", "after"] = "before") -> Schedule:
    """Refresh on every step: no branch in the program, the same cost each time.

    Args:
        when: see :class:`Schedule`.

    Returns:
        The schedule.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.power(4), schedule=sub.always()
        ... )
    """
    return Schedule(lambda state, turn: True, when)


def every(
    steps: int, *, stagger: bool = True, when: Literal["before", "after"] = "before"
) -> Schedule:
    """Refresh every so many steps.

    Args:
        steps: the period.
        stagger: spread the leaves evenly over the period instead of refreshing all on
            the same step. The first gradient sets every basis in either case.
        when: see :class:`Schedule`.

    Returns:
        The schedule.

    Raises:
        ValueError: if ``steps`` is below one.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.svd(4), schedule=sub.every(200)
        ... )
    """
    if steps < 1:
        raise ValueError(f"every needs a period of at least one step, got {steps}.")

    def due(state, turn):
        del state
        offset = turn.leaf * steps // turn.leaves if stagger else 0
        return (turn.count + offset) % steps == 0

    return Schedule(due, when)


def external() -> Schedule:
    """Refresh only when asked: ``tx.update(grads, state, params, refresh=True)``.

    ``refresh`` may be a Python bool, so that a step compiled without it holds no
    decomposition at all, or a traced one. Until the first refresh the basis is random.

    Returns:
        The schedule.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.svd(4), schedule=sub.external()
        ... )
    """
    return Schedule(lambda state, turn: False, external=True)


class AdaptiveState(NamedTuple):
    """The state of :func:`adaptive`: the present gap, the next step, recent overlaps."""

    gap: Int[Array, "*b"]
    next_step: Int[Array, "*b"]
    recent: Float[Array, "*b w"]
    seen: Int[Array, "*b"]


def adaptive(
    steps: int, *, threshold: ArrayLike = 0.4, window: int = 5, growth: int = 2
) -> Schedule:
    """Refresh a leaf less often once its subspace has stopped moving.

    After each refresh ``|⟨p₁_new, p₁_old⟩|`` of the first basis vectors is kept; when the
    last ``window`` of them average at least ``threshold``, the gap of this leaf grows
    by ``growth``. The absolute value makes it blind to the sign of singular vectors.

    Args:
        steps: the first gap.
        threshold: the mean overlap from which the gap grows.
        window: how many overlaps are averaged.
        growth: the factor.

    Returns:
        The schedule.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.svd(4), schedule=sub.adaptive(200)
        ... )

    Reference:
        Z. Zhang et al., "Q-GaLore" (2024), arXiv 2407.08296.
    """

    def init(batch):
        return AdaptiveState(
            gap=jnp.full(batch, steps, jnp.int32),
            next_step=jnp.zeros(batch, jnp.int32),
            recent=jnp.zeros((*batch, window), jnp.float32),
            seen=jnp.zeros(batch, jnp.int32),
        )

    def observe(state, overlap, turn):
        cosine = jnp.abs(overlap[..., 0, 0]).astype(jnp.float32)
        recent = jnp.concatenate([state.recent[..., 1:], cosine[..., None]], axis=-1)
        # The first refresh compares with the random start: it counts for nothing.
        seen = state.seen + 1
        still = (seen > window) & (jnp.mean(recent, axis=-1) >= threshold)
        gap = jnp.where(still, state.gap * growth, state.gap)
        return AdaptiveState(gap, turn.count + gap, recent, seen)

    return Schedule(
        lambda state, turn: turn.count >= state.next_step, init=init, observe=observe
    )

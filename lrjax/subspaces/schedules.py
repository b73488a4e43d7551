import abc
import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int


class ScheduleContext(NamedTuple):
    """What a schedule may look at to decide on a refresh.

    Attributes:
        count: the number of steps before this one.
        leaf: the index of the leaf among the projected ones.
        leaves: how many there are.
    """

    count: Int[Array, ""]
    leaf: int
    leaves: int


class Schedule(eqx.Module):
    """When a basis is refreshed.

    A matrix whose gradient is zero or not finite on the step of its refresh, an expert
    without tokens for example, is refreshed by its next usable one.

    Attributes:
        when: ``"before"``: the new basis serves the gradient that it was made from;
            ``"after"``: the next one, so that no gradient defines its own basis.
        waits: whether a refresh that finds no usable gradient waits for the next one.
        on_request: whether only ``update(…, refresh=True)`` asks for a refresh.
        observes: whether :meth:`observe` has to see every change of basis.
    """

    when: eqx.AbstractVar[Literal["before", "after"]]
    waits: ClassVar[bool] = True
    on_request: ClassVar[bool] = False
    observes: ClassVar[bool] = False

    def init(self, batch: tuple[int, ...]) -> Any:
        """The state, a pytree of arrays with these leading axes."""
        del batch
        return ()

    @abc.abstractmethod
    def due(self, state: Any, context: ScheduleContext) -> Bool[Array, "*b"] | bool:
        """Whether to refresh; a Python bool if it is the same on every step."""

    def observe(
        self, state: Any, overlap: Float[Array, "*b r r"], context: ScheduleContext
    ) -> Any:
        """The state after a refresh, ``overlap = P_newᵀ P_old``."""
        del overlap, context
        return state


class Always(Schedule):
    """Refresh on every step: no branch in the program, the same cost each time.

    Args:
        when: see :class:`Schedule`.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.Power(4), schedule=sub.Always()
        ... )
    """

    _: dataclasses.KW_ONLY
    when: Literal["before", "after"] = "before"
    waits: ClassVar[bool] = False

    def due(self, state: Any, context: ScheduleContext) -> bool:
        """Yes."""
        del state, context
        return True


class Periodic(Schedule):
    """Refresh every so many steps.

    Args:
        steps: the period; may be traced.
        stagger: spread the leaves evenly over the period instead of refreshing all on
            the same step. The first gradient sets every basis in either case.
        when: see :class:`Schedule`.

    Raises:
        ValueError: if ``steps`` is below one.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.SVD(4), schedule=sub.Periodic(200)
        ... )
    """

    steps: int | Array
    _: dataclasses.KW_ONLY
    stagger: bool = True
    when: Literal["before", "after"] = "before"

    def __check_init__(self):
        if not isinstance(self.steps, Tracer) and self.steps < 1:
            raise ValueError(
                f"Periodic needs a period of at least one step, got {self.steps}."
            )

    def due(self, state: Any, context: ScheduleContext) -> Bool[Array, ""]:
        """Once a period, at the turn of the leaf."""
        del state
        offset = context.leaf * self.steps // context.leaves if self.stagger else 0
        return (context.count + offset) % self.steps == 0


class OnRequest(Schedule):
    """Refresh only when asked: ``tx.update(grads, state, params, refresh=True)``.

    ``refresh`` may be a Python bool, so that a step compiled without it holds no
    decomposition at all, or a traced one. Until the first refresh the basis is the one
    that the state starts with, which no gradient has chosen.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.SVD(4), schedule=sub.OnRequest()
        ... )
    """

    _: dataclasses.KW_ONLY
    when: Literal["before", "after"] = "before"
    on_request: ClassVar[bool] = True
    waits: ClassVar[bool] = False

    def due(self, state: Any, context: ScheduleContext) -> bool:
        """Never by itself."""
        del state, context
        return False


class AdaptiveState(NamedTuple):
    """The state of :class:`Adaptive`: the present gap, the next step, recent overlaps."""

    gap: Int[Array, "*b"]
    next_step: Int[Array, "*b"]
    recent: Float[Array, "*b w"]
    seen: Int[Array, "*b"]


class Adaptive(Schedule):
    """Refresh a leaf less often once its subspace has stopped moving.

    After each refresh the overlap of the new basis with the old one is kept; when the last
    ``window`` of them average at least ``threshold``, the gap of this leaf grows by
    ``gap_growth``.

    Args:
        steps: the first gap.
        threshold: the mean overlap from which the gap grows.
        window: how many overlaps are averaged.
        gap_growth: the factor.
        compare: the overlap is ``"first"``: ``|⟨p₁_new, p₁_old⟩|`` of the first basis
            vectors, for bases whose columns are singular vectors in order; the absolute
            value makes it blind to their signs. Or ``"span"``: ``‖P_newᵀ P_old‖²_F / r``,
            the mean of ``cos²`` of the principal angles, which orthonormal columns may turn
            among themselves without notice (:func:`lrjax.linalg.subspace_overlap`).
        when: see :class:`Schedule`.

    Raises:
        ValueError: for another word in ``compare``.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.SVD(4), schedule=sub.Adaptive(200)
        ... )

    Reference:
        Z. Zhang et al., "Q-GaLore: quantized GaLore with INT4 projection and
        layer-adaptive low-rank gradients" (2024), arXiv 2407.08296.
    """

    steps: int | Array
    _: dataclasses.KW_ONLY
    threshold: ArrayLike = 0.4
    window: int = 5
    gap_growth: ArrayLike = 2
    compare: Literal["first", "span"] = "first"
    when: Literal["before", "after"] = "before"
    observes: ClassVar[bool] = True

    def __check_init__(self):
        if self.compare not in ("first", "span"):
            raise ValueError(
                "Adaptive compares the 'first' vectors of two bases or their whole 'span', "
                f"got {self.compare!r}."
            )

    def init(self, batch: tuple[int, ...]) -> AdaptiveState:
        """The first gap, and no overlaps yet."""
        return AdaptiveState(
            gap=jnp.full(batch, self.steps, jnp.int32),
            next_step=jnp.zeros(batch, jnp.int32),
            recent=jnp.zeros((*batch, self.window), jnp.float32),
            seen=jnp.zeros(batch, jnp.int32),
        )

    def due(self, state: AdaptiveState, context: ScheduleContext) -> Bool[Array, "*b"]:
        """When the gap is over."""
        return context.count >= state.next_step

    def observe(
        self, state: AdaptiveState, overlap: Array, context: ScheduleContext
    ) -> AdaptiveState:
        """Note the overlap, and lengthen the gap where nothing moves."""
        if self.compare == "first":
            kept = jnp.abs(overlap[..., 0, 0])
        else:
            kept = jnp.sum(overlap**2, axis=(-2, -1)) / overlap.shape[-1]
        kept = kept.astype(jnp.float32)[..., None]
        recent = jnp.concatenate([state.recent[..., 1:], kept], axis=-1)
        # The first refresh compares with a basis that no gradient chose: not counted.
        seen = state.seen + 1
        still = (seen > self.window) & (jnp.mean(recent, axis=-1) >= self.threshold)
        gap = jnp.where(still, state.gap * self.gap_growth, state.gap)
        return AdaptiveState(gap, context.count + gap, recent, seen)

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._batching import any_member
from .._matrices import MatrixLeaf
from .._moments import Moments
from .._sharding import placed_as_state, placed_beside, placed_like, select
from ..linalg import procrustes, times
from .bases import Basis, Projector, RefreshContext
from .error_feedback import ErrorFeedback
from .lifts import Lift
from .schedules import Schedule, ScheduleContext
from .transport import MomentTransport, carry_moments


class SubspaceConfig(NamedTuple):
    """The settings of one subspace optimizer: the plug points together."""

    basis: Basis
    schedule: Schedule
    carry: MomentTransport
    lift: Lift
    feedback: ErrorFeedback | None

    @property
    def reads_moments(self) -> bool:
        """Whether a refresh looks at the moments of the inner state at all."""
        wanted = self.carry.moves or self.basis.uses_momentum
        return wanted or self.feedback is not None


class Site(eqx.Module):
    """One projected leaf: what a step needs to know of it besides its numbers.

    Attributes:
        key: source of its random numbers.
        on_rows: whether the rows are the projected axis.
        size: the length of the projected axis.
        rank: the number of columns of its basis.
    """

    key: PRNGKeyArray
    on_rows: bool = eqx.field(static=True)
    size: int = eqx.field(static=True)
    rank: int = eqx.field(static=True)

    @property
    def axis(self) -> int:
        """The projected axis of the matrices."""
        return -2 if self.on_rows else -1

    def orient(self, g: Float[Array, "*b m n"]) -> Float[Array, "*b p q"]:
        """The matrices, or moments, with the projected axis first."""
        return g if self.on_rows else g.mT


def make_site(config: SubspaceConfig, leaf: MatrixLeaf, key: PRNGKeyArray) -> Site:
    """Decide orientation and rank of one leaf."""
    rows = leaf.projects_rows(config.basis.side)
    size = leaf.sides[0 if rows else 1]
    rank = leaf.rank(config.basis.rank)
    return Site(jr.fold_in(key, leaf.index), rows, size, rank)


class LeafState(NamedTuple):
    """What the subspace loop remembers of one projected leaf.

    Attributes:
        basis: the state of its basis.
        started: whether a gradient has set the basis, one bool a matrix; nothing for a
            basis that starts as it goes on.
        waiting: whether a refresh is due that has had no usable gradient yet.
        schedule: the state of its schedule.
        lift: the state of its lift.
        error: the error feedback buffer, in the shape of its matrices.
    """

    basis: Any
    started: Bool[Array, "*b"] | tuple
    waiting: Bool[Array, "*b"] | tuple
    schedule: Any
    lift: Any
    error: Any


def _first_state(
    config: SubspaceConfig,
    shape: tuple[int, ...],
    oriented: tuple[int, ...],
    rank: int,
    dtype: Any,
    key: PRNGKeyArray,
) -> LeafState:
    held = _held_by(config.basis, shape[:-2])
    starts = config.basis.has_start or config.carry.aligns
    feedback = config.feedback
    return LeafState(
        basis=config.basis.init((*held, *oriented[-2:]), rank, dtype, key),
        started=jnp.zeros(held, bool) if starts else (),
        waiting=jnp.ones(held, bool) if config.schedule.waits else (),
        schedule=config.schedule.init(held),
        lift=config.lift.init(shape, dtype),
        error=() if feedback is None else jnp.zeros(shape, feedback.dtype or dtype),
    )


def init_leaf(config: SubspaceConfig, site: Site, a: Float[Array, "*b m n"]) -> LeafState:
    """The state of a leaf whose matrices are ``a``."""
    oriented = site.orient(a)
    state = _first_state(config, a.shape, oriented.shape, site.rank, a.dtype, site.key)
    cut = lambda x: placed_as_state(x, a)
    along = lambda x: placed_like(x, a) if x.shape == a.shape else cut(x)
    basis = jax.tree.map(cut, state.basis)
    return jax.tree.map(along, state._replace(basis=()))._replace(basis=basis)


def state_structure(config: SubspaceConfig) -> Any:
    """The structure of the state of a leaf, the same for all leaves."""
    one = (1, 1)
    state = lambda: _first_state(config, one, one, 1, jnp.float32, jr.key(0))
    return jax.tree.structure(jax.eval_shape(state))


def projector(config: SubspaceConfig, site: Site, state: Any) -> Projector:
    """The basis of a leaf, as it lies in memory."""
    return config.basis.projector(state, site.key, site.size, site.rank, site.on_rows)


def placed_for_use(basis: Any, a: Float[Array, "*b p q"]) -> Any:
    """The state of a basis beside gradients: its rows along the axis that they span."""
    batch_ndim = a.ndim - 2
    of_rows = lambda x: (-2, None) if x.ndim == a.ndim else (None,) * (x.ndim - batch_ndim)
    return jax.tree.map(lambda x: placed_beside(x, a, of_rows(x)), basis)


def _shared_axis(basis: Basis, batch_ndim: int) -> int | None:
    """The batch axis along which one basis serves all, where a leaf has it."""
    if basis.shared_axis is None:
        return None
    axis = basis.shared_axis + 2 + batch_ndim
    return axis if axis >= 0 else None


def _held_by(basis: Basis, batch: tuple[int, ...]) -> tuple[int, ...]:
    """The batch shape of the basis: one along an axis that shares it."""
    axis = _shared_axis(basis, len(batch))
    return batch if axis is None else (*batch[:axis], 1, *batch[axis + 1 :])


def _usable(basis: Basis, a: Float[Array, "*b m n"], on_rows: bool) -> Bool[Array, "*h"]:
    """Which bases have a gradient that is finite and not zero: no other may set one.

    Judged by the sums of squares along the projected axis, which some lifts need too.
    """
    squares = jnp.sum(a**2, axis=-2 if on_rows else -1, keepdims=True)
    # Their maximum, not their sum: XLA would make that a second pass over the gradient.
    energy = jnp.max(squares, axis=(-2, -1))
    usable = jnp.isfinite(energy) & (energy > 0)
    axis = _shared_axis(basis, usable.ndim)
    return usable if axis is None else jnp.any(usable, axis=axis, keepdims=True)


def _finite(state: Any, batch_ndim: int) -> Bool[Array, "*b"] | bool:
    """Whether all numbers of each matrix's basis are finite."""
    ok: Any = True
    for x in jax.tree.leaves(state):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            ok &= jnp.all(jnp.isfinite(x), axis=tuple(range(batch_ndim, x.ndim)))
    return ok


class Refreshed(NamedTuple):
    """The result of a refresh.

    Attributes:
        state: of the leaf.
        moments: of the inner transform, in the coordinates of the new basis.
        lost: the part of the first moments that the new basis cannot hold, where error
            feedback asks for it.
        done: which matrices have a new basis.
    """

    state: LeafState
    moments: list[Moments]
    lost: Float[Array, "*b m n"] | None
    done: Bool[Array, "*h"]


def refresh_leaf(
    config: SubspaceConfig,
    requested: Bool[Array, ""] | bool,
    site: Site,
    a: Float[Array, "*b m n"],
    state: LeafState,
    moments: list[Moments],
    when: ScheduleContext,
    projected: Float[Array, "*b m2 n2"] | None,
) -> Refreshed:
    """Refresh the basis of one leaf if it is due, and carry its moments along.

    Only matrices whose gradient is finite and not zero are refreshed; for the others the
    refresh waits. The branch is taken if any matrix of the leaf, or any member of a
    ``vmap``, asks for it; those that do not keep their basis.
    """
    basis, schedule = config.basis, config.schedule
    usable = _usable(basis, a, site.on_rows)
    if basis.observes:
        oriented = site.orient(a)
        seen = basis.observe(placed_for_use(state.basis, oriented), oriented)
        state = state._replace(basis=select(usable, seen, state.basis))
    due: Any = requested if schedule.on_request else schedule.due(state.schedule, when)
    if schedule.waits:
        due = due | state.waiting
    take = usable & due

    def kept():
        loses = config.feedback is not None and _first(moments) is not None
        lost = jnp.zeros_like(a) if loses else None
        return Refreshed(state, moments, lost, jnp.zeros_like(take))

    def moved():
        return _move(config, site, a, state, moments, when, take, projected)

    if due is False:
        return kept()
    new = moved() if due is True else lax.cond(any_member(jnp.any(take)), moved, kept)
    if schedule.waits:
        waiting = jnp.broadcast_to(due & ~new.done, take.shape)
        new = new._replace(state=new.state._replace(waiting=waiting))
    return new


def _first(moments: list[Moments]) -> Array | None:
    return next((m.first for m in moments if m.first is not None), None)


def _move(config, site, a, state, moments, when, take, projected) -> Refreshed:
    """Give a leaf its new basis, and its moments the new coordinates."""
    basis, carry = config.basis, config.carry
    new = _new_basis(config, site, a, state, moments, when, projected)
    old_projector = projector(config, site, state.basis)
    if carry.aligns:
        overlap = projector(config, site, new).overlap(old_projector)
        # A first basis has no old one to be aligned with.
        new = select(state.started, times(new, procrustes(overlap)), new)
    done = take & _finite(new, take.ndim)
    new = select(done, new, state.basis)
    new_projector = projector(config, site, new)
    carried: list[Any] = moments
    lost: Any = None
    if carry.moves:
        # A rule with a start of its own turns all columns at once there.
        block = None if basis.has_start else basis.changed_columns(when.count, site.rank)
        carried = carry_moments(
            carry, moments, old_projector, new_projector, a, done, block
        )
    if config.feedback is not None and _first(moments) is not None:
        lost = sum(
            old_projector.beside(a).lift(m.first) - new_projector.beside(a).lift(c.first)
            for m, c in zip(moments, carried, strict=True)
            if m.first is not None
        )
    if config.schedule.observes:
        overlap = new_projector.overlap(old_projector)
        seen = config.schedule.observe(state.schedule, overlap, when)
        state = state._replace(schedule=select(done, seen, state.schedule))
    started = jax.tree.map(lambda x: x | done, state.started)
    return Refreshed(state._replace(basis=new, started=started), carried, lost, done)


def _new_basis(config, site, a, state, moments, when, projected) -> Any:
    momentum = _first(moments) if config.basis.uses_momentum else None
    oriented = lambda x: None if x is None else site.orient(lax.stop_gradient(x))

    def by(rule: Callable):
        # Oriented inside the branches: a transposed view that crosses into one is copied.
        context = RefreshContext(
            key=jr.fold_in(site.key, when.count),
            count=when.count,
            momentum=oriented(momentum),
            rank=site.rank,
            projected=oriented(projected),
            on_rows=site.on_rows,
        )
        whole = site.orient(lax.stop_gradient(a))
        old = state.basis
        if not config.basis.in_place:
            old = placed_for_use(old, whole)
        new = rule(old, whole, context)
        held = lambda n, o: placed_like(n.astype(o.dtype), o)
        return jax.tree.map(held, new, state.basis)

    basis = config.basis
    if not basis.has_start:
        return by(basis.refresh)
    started = state.started
    first = lambda: select(started, by(basis.refresh), by(basis.start))
    late = any_member(jnp.any(~started))
    return lax.cond(late, first, lambda: by(basis.refresh))

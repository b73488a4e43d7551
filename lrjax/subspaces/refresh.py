from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._batching import any_member
from .._sharding import einsum, placed_along, placed_like
from .bases.basis import Basis, Dense, Refresh, Rows, squares_along
from .carry import Carry, Change, Moments
from .lift import Feedback, Lift
from .schedule import Schedule, Turn
from .view import (
    MatrixSpec,
    as_matrices,
    from_matrices,
    matrix_shape,
    projects_rows,
    resolve_rank,
)


class Loop(NamedTuple):
    """The settings of one subspace optimizer: the plug points together."""

    basis: Basis
    schedule: Schedule
    carry: Carry
    lift: Lift
    feedback: Feedback | None


class Plan(NamedTuple):
    """What is known of one projected leaf before any number is.

    Attributes:
        path: its path in the tree.
        leaf: its index among the projected leaves; its random numbers depend on it.
        spec: which axes make its matrices.
        shape: its shape.
        rows: whether the rows are the projected axis.
        rank: the number of columns of its basis.
    """

    path: str
    leaf: int
    spec: MatrixSpec
    shape: tuple[int, ...]
    rows: bool
    rank: int

    def view(self, x: Array) -> Float[Array, "*b m n"]:
        """The leaf as a batch of matrices."""
        return as_matrices(x, self.spec)

    def restore(self, g: Float[Array, "*b m n"]) -> Array:
        """Undo :meth:`view`."""
        return from_matrices(g, self.spec, self.shape)

    def orient(self, g: Float[Array, "*b m n"]) -> Float[Array, "*b p q"]:
        """The matrices, or moments, with the projected axis first."""
        return g if self.rows else g.mT


def make_plan(
    path: str, leaf: int, shape: tuple[int, ...], spec: MatrixSpec, basis: Basis
) -> Plan:
    """Decide orientation and rank of one leaf.

    Raises:
        ValueError: if its matrices or the rank make no sense.
    """
    if len(shape) < 2:
        raise ValueError(
            f"where= chose {path} of shape {shape}, which is no matrix: return False for "
            "leaves with fewer than two axes."
        )
    m, n = matrix_shape(shape, spec)[-2:]
    rows = projects_rows(m, n, basis.side)
    return Plan(path, leaf, spec, shape, rows, resolve_rank(basis.rank, path, m, n))


class LeafState(NamedTuple):
    """What the subspace loop remembers of one projected leaf.

    Attributes:
        basis: the state of its basis.
        started: whether a usable gradient has set the basis, one bool a matrix.
        schedule: the state of its schedule.
        lift: the state of its lift.
        error: the error feedback buffer, in the shape of the leaf.
    """

    basis: Any
    started: Bool[Array, "*b"]
    schedule: Any
    lift: Any
    error: Any


def init_leaf(loop: Loop, plan: Plan, a: Array, key: PRNGKeyArray) -> LeafState:
    """The state of a leaf whose matrices are ``a``."""
    batch = a.shape[:-2]
    held = _held_by(loop.basis, batch)
    error = ()
    if loop.feedback is not None:
        error = plan.restore(jnp.zeros_like(a, loop.feedback.dtype or a.dtype))
    oriented = plan.orient(a)
    basis = loop.basis.init((*held, *oriented.shape[-2:]), plan.rank, a.dtype, key)
    return LeafState(
        basis=jax.tree.map(lambda x: _placed(x, oriented, rows=True), basis),
        started=_placed(jnp.zeros(held, bool), a),
        schedule=jax.tree.map(lambda x: _placed(x, a), loop.schedule.init(held)),
        lift=jax.tree.map(lambda x: _placed(x, a), loop.lift.init(a.shape, a.dtype)),
        error=error,
    )


def _placed(x: Array, a: Float[Array, "*b p q"], *, rows: bool = False) -> Array:
    """A state array sharded as steps will leave it, where the mesh is Explicit.

    Batch axes follow those of the gradient, the ``rows`` of a basis the projected axis,
    and what has the shape of the gradient follows it altogether.
    """
    if x.shape == a.shape and not rows:
        return placed_like(x, a)
    same = lambda k: k < a.ndim - 2 and x.shape[k] == a.shape[k]
    axes: list[int | None] = [k if same(k) else None for k in range(x.ndim)]
    if rows and x.ndim == a.ndim and x.shape[-2] == a.shape[-2]:
        axes[-2] = a.ndim - 2
    return placed_along(x, a, tuple(axes))


def use_frame(loop: Loop, plan: Plan, state: Any, key: PRNGKeyArray) -> Dense | Rows:
    """The basis of a leaf, ready to be applied to its matrices."""
    m, n = matrix_shape(plan.shape, plan.spec)[-2:]
    frame = loop.basis.frame(state, key, m if plan.rows else n, plan.rank)
    return frame._replace(rows=plan.rows)


def _held_by(basis: Basis, batch: tuple[int, ...]) -> tuple[int, ...]:
    """The batch shape of the basis: one along an axis that shares it."""
    axis = _shared_axis(basis, len(batch))
    return batch if axis is None else (*batch[:axis], 1, *batch[axis + 1 :])


def _shared_axis(basis: Basis, batch_ndim: int) -> int | None:
    """The batch axis along which one basis serves all, where a leaf has it."""
    if basis.shared_axis is None:
        return None
    axis = basis.shared_axis + 2 + batch_ndim
    return axis if axis >= 0 else None


def _usable(basis: Basis, a: Float[Array, "*b m n"], rows: bool) -> Bool[Array, "*h"]:
    """Which bases have a gradient that is finite and not zero: no other may set one.

    Judged by the sums of squares along the projected axis, which some lifts need too.
    """
    # Their maximum, not their sum: XLA would make that a second pass over the gradient.
    energy = jnp.max(squares_along(a, -2 if rows else -1), axis=(-2, -1))
    usable = jnp.isfinite(energy) & (energy > 0)
    axis = _shared_axis(basis, usable.ndim)
    if axis is not None:
        usable = jnp.any(usable, axis=axis, keepdims=True)
    return usable


def _select(mask: Bool[Array, "*b"], new: Any, old: Any) -> Any:
    """``new`` where the mask of the leading axes is true, in the dtype of ``old``."""

    def pick(n, o):
        wide = jnp.broadcast_to(
            mask.reshape(*mask.shape, *(1,) * (o.ndim - mask.ndim)), o.shape
        )
        return jnp.where(placed_like(wide, o), placed_like(n.astype(o.dtype), o), o)

    return jax.tree.map(pick, new, old)


def _finite(state: Any, batch_ndim: int) -> Bool[Array, "*b"] | bool:
    """Whether all numbers of each matrix's basis are finite."""
    ok: Any = True
    for x in jax.tree.leaves(state):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            ok &= jnp.all(jnp.isfinite(x), axis=tuple(range(batch_ndim, x.ndim)))
    return ok


class Refreshed(NamedTuple):
    """The result of a refresh: new states, and the momentum that no longer fits."""

    leaf: LeafState
    moments: list[Moments]
    lost: Any


def refresh_leaf(
    loop: Loop,
    plan: Plan,
    a: Float[Array, "*b m n"],
    leaf: LeafState,
    moments: list[Moments],
    turn: Turn,
    key: PRNGKeyArray,
    requested: Bool[Array, ""] | bool,
    projected: Float[Array, "*b m2 n2"] | None = None,
) -> Refreshed:
    """Refresh the basis of one leaf if it is due, and carry its moments along.

    A scheduled refresh and a basis that has not started yet both call for one, but only
    of matrices whose gradient is finite and not zero. The branch is taken if any matrix
    of the leaf, or any member of a ``vmap``, asks for it; the others keep their basis.
    """
    basis, schedule = loop.basis, loop.schedule
    if basis.observe is not None:
        seen = basis.observe(leaf.basis, plan.orient(a))
        leaf = leaf._replace(basis=_select(_usable(basis, a, plan.rows), seen, leaf.basis))
    due = requested if schedule.external else schedule.due(leaf.schedule, turn)
    wanted = due if schedule.external else due | ~leaf.started
    take = _usable(basis, a, plan.rows) & wanted

    def moved():
        return _move(loop, plan, a, leaf, moments, turn, key, take, projected)

    def kept():
        lost = jnp.zeros_like(a) if _loses(loop, moments) else ()
        return Refreshed(leaf, moments, lost)

    if due is True:
        return moved()
    if due is False and schedule.external:
        return kept()
    return lax.cond(any_member(jnp.any(take)), moved, kept)


def _loses(loop: Loop, moments: list[Moments]) -> bool:
    return loop.feedback is not None and any(m.first is not None for m in moments)


def _move(loop, plan, a, leaf, moments, turn, key, take, projected) -> Refreshed:
    # Any: the frames of one basis are all of one class.
    frame: Callable[..., Any] = lambda state: use_frame(loop, plan, state, key)
    momentum = next((m.first for m in moments if m.first is not None), None)
    oriented = lambda x: None if x is None else plan.orient(lax.stop_gradient(x))

    def inputs():
        # Oriented inside the branches: a transposed view that crosses into one is copied.
        to = Refresh(
            key=jr.fold_in(key, turn.count),
            count=turn.count,
            momentum=oriented(momentum),
            rank=plan.rank,
            projected=oriented(projected),
            rows=plan.rows,
        )
        return oriented(a), to

    new = _new_basis(loop.basis, leaf, inputs)
    old_frame, new_frame = frame(leaf.basis), frame(new)
    if loop.carry.align and isinstance(new_frame, Dense):
        # The orthogonal polar factor; with both factors of the SVD it stays orthogonal
        # where the two subspaces share no direction.
        u, _, vt = jnp.linalg.svd(new_frame.overlap(old_frame))
        matrix = einsum("...pr,...rk,...ks->...ps", new_frame.matrix, u, vt)
        # A fresh basis has no old one to be aligned with.
        new = _select(leaf.started, matrix, new)
        new_frame = frame(new)
    ok = take & _finite(new, take.ndim)
    new = _select(ok, new, leaf.basis)
    new_frame = frame(new)
    carried = _carry(loop, plan, a, moments, old_frame, new_frame, turn, ok)
    overlap = new_frame.overlap(old_frame)
    observed = loop.schedule.observe(leaf.schedule, overlap, turn)
    leaf = leaf._replace(
        basis=new,
        started=leaf.started | ok,
        schedule=_select(ok, observed, leaf.schedule),
    )
    lost = ()
    if _loses(loop, moments):
        lost = sum(
            old_frame.up(m.first) - new_frame.up(c.first)
            for m, c in zip(moments, carried, strict=True)
            if m.first is not None
        )
    return Refreshed(leaf, carried, lost)


def _new_basis(basis: Basis, leaf: LeafState, inputs: Callable[[], tuple]) -> Any:
    like = lambda n, o: placed_like(n.astype(o.dtype), o)
    as_held = lambda new: jax.tree.map(like, new, leaf.basis)
    refresh = lambda: as_held(basis.refresh(leaf.basis, *inputs()))
    start: Callable | None = basis.start
    if start is None:
        return refresh()

    def first():
        return _select(leaf.started, refresh(), as_held(start(leaf.basis, *inputs())))

    return lax.cond(any_member(jnp.any(~leaf.started)), first, refresh)


def _carry(loop, plan, a, moments, old_frame, new_frame, turn, ok) -> list[Moments]:
    """Apply the carry to the moments, of the turned columns alone where it knows them."""
    apply = loop.carry.apply
    if apply is None or not moments:
        return moments
    if loop.basis.moved is None:
        change = Change(new_frame.overlap(old_frame), new_frame.down(a), plan.rows)
        return [_masked_carry(apply, m, change, ok) for m in moments]
    first, size = loop.basis.moved(turn.count, plan.rank)
    cut = lambda x, axis: lax.dynamic_slice_in_dim(x, first, size, axis=axis)
    old, new = (f._replace(matrix=cut(f.matrix, -1)) for f in (old_frame, new_frame))
    change = Change(new.overlap(old), new.down(a), plan.rows)
    axis = new.axis

    def carry_block(m):
        part = m._replace(**{name: cut(x, axis) for name, x in _arrays(m).items()})
        part = _masked_carry(apply, part, change, ok)
        whole = {
            name: lax.dynamic_update_slice_in_dim(x, getattr(part, name), first, axis=axis)
            for name, x in _arrays(m).items()
        }
        return m._replace(**whole)

    return [carry_block(m) for m in moments]


def _arrays(m: Moments) -> dict[str, Array]:
    fields = {"first": m.first, "second": m.second}
    return {name: x for name, x in fields.items() if x is not None}


def _masked_carry(apply, m: Moments, change: Change, ok: Array) -> Moments:
    new = apply(m, change)
    return m._replace(
        **{name: _select(ok, getattr(new, name), x) for name, x in _arrays(m).items()}
    )

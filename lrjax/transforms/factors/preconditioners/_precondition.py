"""Directions of factors, whitened by their partners: without memory, and with moments."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Bool, Int, PyTree

from ...._moments import check_moments_known, map_moments
from ...._sharding import select
from ...._tree import like, map_nodes, node_of, sides
from ....linalg import (
    cross,
    inverse_grams,
    inverse_root_grams,
    orthonormalizers,
    outer,
    times,
    working_dtype,
)
from ....lowrank import LowRank, is_low_rank
from .scale_by_matrix_adam import ScaleByMatrixAdamState


Phi = Callable[[LowRank], LowRank]
Order = Literal["jacobi", "alternating", "greedy"]


def precondition(
    g: LowRank, x: LowRank, damping: ArrayLike, relative: bool, phi: Phi | None = None
) -> LowRank:
    """The directions of the factors that move, in float32 or wider."""
    gradients, _, partners = zip(*sides(g, x), strict=True)
    if phi is None:
        return _in_place_of(g, _scaled(gradients, partners, damping, relative))
    roots = inverse_root_grams(*partners, damping=damping, relative=relative)
    whitened = phi(_in_place_of(g, map(_apply, gradients, roots)))
    back = map(jnp.matrix_transpose, roots)
    return _in_place_of(g, map(times, jax.tree.leaves(whitened), back))


@functools.partial(jax.jit, static_argnames="relative")  # layers of a shape share its trace
def _scaled(
    gradients: tuple[Array, ...],
    partners: tuple[Array, ...],
    damping: ArrayLike,
    relative: bool,
) -> list[Array]:
    inverses = inverse_grams(*partners, damping=damping, relative=relative)
    return list(map(_apply, gradients, inverses))


def _in_place_of(g: LowRank, factors: Iterable[Array]) -> LowRank:
    """A node with the factors that ``g`` has, in their own dtype."""
    return jax.tree.structure(g).unflatten(factors)


def _apply(tall: Array, small: Array) -> Array:
    return times(tall.astype(small.dtype), small)


def in_turn(order: Order, count: Int[Array, ""] | None, g: LowRank, move: LowRank):
    """What of the direction of a node is left in this step."""
    if order == "jacobi" or len(jax.tree.leaves(g)) == 1:
        return move
    if order == "alternating":
        assert count is not None
        turn = count % 2 == 0
        keep = lambda now, x: jnp.where(now, x, 0)
    else:
        turn = _promise(g.left, move.left) >= _promise(g.right, move.right)
        keep = lambda now, x: select(now, x, jnp.zeros_like(x))
    return like(move, keep(turn, move.left), keep(~turn, move.right))


def _promise(gradient: Array, move: Array) -> Array:
    """``⟨G, P⟩``, by how much a small step lowers the loss, for each member of a stack."""
    return jnp.sum(gradient.astype(move.dtype) * move, axis=(-2, -1))


class PhiState(NamedTuple):
    """What a transform of whitened gradients remembers.

    Attributes:
        frames: of each factor of a whole pair the orthonormal columns of its partner in
            which its moments are held; none where the partner is frozen.
        inner: the state of the transform.
    """

    frames: PyTree
    inner: Any


class _Whitened(NamedTuple):
    gradient: LowRank
    frame: LowRank
    back: LowRank


@functools.partial(jax.jit, static_argnames="relative")
def _whitened(g: LowRank, x: LowRank, damping: ArrayLike, relative: bool) -> _Whitened:
    gradients, _, partners = zip(*sides(g, x), strict=True)
    maps = orthonormalizers(*partners, damping=damping, relative=relative)
    there, back = zip(*maps, strict=True)
    return _Whitened(
        _in_place_of(g, map(_apply, gradients, there)),
        _in_place_of(g, map(_apply, partners, there)),
        _in_place_of(g, back),
    )


class Whitened(NamedTuple):
    """A transform with moments of whitened gradients, in the frames of the partners.

    Each factor that has turns of its own has a state of its own, that only sees those.
    """

    phi: optax.GradientTransformationExtraArgs
    order: Order

    def init(self, params: PyTree) -> tuple[PhiState, ...]:
        """Moments of zero in frames of zero."""
        moments = _map_nodes(lambda x: jax.tree.map(_zeros, x), params)
        of_partner = lambda x: node_of(x.right, x.left) if _is_whole(x) else _of_whole(x)
        frames = jax.tree.map(_zeros, _map_nodes(of_partner, params))
        states = []
        for part in self._parts():
            inner = self.phi.init(part(moments))
            _check_carried(inner)
            states.append(PhiState(part(frames), inner))
        return tuple(states)

    def update(
        self,
        updates: PyTree,
        states: tuple[PhiState, ...],
        params: PyTree,
        *,
        frozen: PyTree,
        damping: ArrayLike,
        relative: bool,
        count: Int[Array, ""],
    ) -> tuple[PyTree, tuple[PhiState, ...]]:
        """The directions, in the dtypes of the updates, and the new states."""

        def whiten(g: LowRank, x: LowRank) -> _Whitened:
            moved = _whitened(g, x, damping, relative)
            return moved._replace(frame=_of_whole(moved.frame))

        whitened = map_nodes(whiten, updates, params, frozen=frozen)
        pick = lambda k: _map_nodes(lambda w: w[k], whitened, kind=_Whitened)
        parts = [pick(k) for k in range(3)]
        moves, new = [], []
        for part, due, state in zip(self._parts(), self._due(count), states, strict=True):
            gradient, frames, back = map(part, parts)
            move, state_now = self._of_part(gradient, frames, back, state)
            if due is not None:
                keep = lambda now, before, due=due: jnp.where(due, now, before)
                move = jax.tree.map(lambda x, keep=keep: keep(x, 0), move)
                state_now = jax.tree.map(keep, state_now, state)
            moves.append(move)
            new.append(state_now)

        def finish(u: Any, move: Any) -> Any:
            if not is_low_rank(u) or not jax.tree.leaves(u):
                return u
            if self.order == "greedy":
                move = in_turn(self.order, count, u, move)
            return like(u, *jax.tree.leaves(move))

        merged = functools.reduce(_joined, moves)
        return jax.tree.map(finish, updates, merged, is_leaf=is_low_rank), tuple(new)

    def _of_part(
        self, gradient: PyTree, frames: PyTree, back: PyTree, state: PhiState
    ) -> tuple[PyTree, PhiState]:
        turn = jax.tree.map(cross, frames, state.frames)
        carry = lambda m, p: outer(m, p.astype(m.dtype)) if eqx.is_array(p) else m
        carried = lambda tree, _: jax.tree.map(carry, tree, turn)
        inner = map_moments(carried, state.inner)
        moments, inner = self.phi.update(gradient, inner, turn=turn)
        return jax.tree.map(times, moments, back), PhiState(frames, inner)

    def _parts(self) -> list[Callable[[PyTree], PyTree]]:
        """Which factors share a state: those whose turns are the same."""
        if self.order != "alternating":
            return [lambda tree: tree]
        return [functools.partial(_map_nodes, f) for f in (_left, _right, _alone)]

    def _due(self, count: Int[Array, ""]) -> list[Bool[Array, ""] | None]:
        if self.order != "alternating":
            return [None]
        return [count % 2 == 0, count % 2 == 1, None]


def _map_nodes(f: Callable, *trees: PyTree, kind: type = LowRank) -> PyTree:
    """``f`` of the nodes alone; all other leaves are masked out."""
    is_node = lambda x: isinstance(x, kind)
    pick = lambda x, *rest: f(x, *rest) if is_node(x) else optax.MaskedNode()
    return jax.tree.map(pick, *trees, is_leaf=is_node)


def _zeros(x: Array) -> Array:
    return jnp.zeros_like(x, dtype=working_dtype(x.dtype))


def _of_whole(x: LowRank) -> LowRank:
    """A node of two factors; nothing in the place of others."""
    return x if _is_whole(x) else _kept(x, False)


def _check_carried(state: PyTree) -> None:
    """Refuse moments that no change of the frame is known to move."""
    own = lambda x: isinstance(x, ScaleByMatrixAdamState)
    rest = jax.tree.map(lambda x: () if own(x) else x, state, is_leaf=own)
    check_moments_known(rest)
    map_moments(_check_linear, rest)


def _check_linear(tree: PyTree, signed: bool) -> PyTree:
    if not signed:
        raise ValueError(
            "scale_by_gram cannot take elementwise second moments from one frame of the "
            "partner to the next: give it phi=lrjax.scale_by_matrix_adam(…), or place Adam "
            "behind it."
        )
    return tree


def _left(x: LowRank) -> LowRank:
    """The left factor of a node of two."""
    return _kept(x, node_of(_is_whole(x), False))


def _right(x: LowRank) -> LowRank:
    return _kept(x, node_of(False, _is_whole(x)))


def _alone(x: LowRank) -> LowRank:
    """The factor whose partner is frozen."""
    return _kept(x, not _is_whole(x))


def _kept(x: LowRank, marks: PyTree[bool]) -> LowRank:
    return eqx.filter(x, marks, replace=optax.MaskedNode())


def _joined(one: PyTree, other: PyTree) -> PyTree:
    """The factors of two trees that have different ones."""
    either = lambda a, b: a if eqx.is_array(a) else b
    join = lambda x, y: node_of(either(x.left, y.left), either(x.right, y.right))
    return _map_nodes(join, one, other)


def _is_whole(x: LowRank) -> bool:
    return len(jax.tree.leaves(x)) == 2

"""Random directions of a subspace of the parameters, drawn anew wherever they are used."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..._matrices import MatrixLeaf, Where, choose
from ..._sharding import placed_like, shards_of
from ...linalg import working_dtype
from ...lowrank import LowRank
from ..bases import (
    Basis,
    DenseProjector,
    Gaussian,
    Projector,
    RandomOrthonormal,
    RefreshContext,
    SelectedRows,
)
from .affine_subspace import AffineSubspace


PIECE = 2**18  # how many numbers are drawn at a time


class Directions(NamedTuple):
    """A subspace by what is done in it; keys ``(q,)`` and weights ``(q,)`` name directions.

    Attributes:
        moved: from keys and weights, the parameters plus that sum of normal directions.
        draw: the same sum alone, in coordinates.
        lift: from coordinates to a tree like the parameters.
        factors: the same with products left in factors.
    """

    moved: Callable[[Array, Float[Array, " q"]], PyTree]
    draw: Callable[[Array, Float[Array, " q"]], PyTree]
    lift: Callable[[PyTree], PyTree]
    factors: Callable[[PyTree], PyTree]


def directions(
    params: PyTree, subspace: Any, key: PRNGKeyArray, where: Where | None
) -> Directions:
    """The directions of all numbers, of bases drawn for each matrix, or of one of all."""
    if isinstance(subspace, AffineSubspace):
        return _of_all_together(params, subspace)
    leaves, values, treedef = choose("zeroth_order_gradient", params, where)
    sides = _sides(subspace)
    places = [
        _Place(x) if leaf is None or not sides else _with_bases(leaf, x, sides, key)
        for leaf, x in zip(leaves, values, strict=True)
    ]

    def at_each(f: Callable) -> Callable[..., list]:
        def apply(keys, weights):
            own = lambda i: jax.vmap(jr.fold_in, in_axes=(0, None))(keys, i)
            return [f(place, own(i), weights) for i, place in enumerate(places)]

        return apply

    def in_tree(f: Callable) -> Callable[[list], PyTree]:
        return lambda coordinates: treedef.unflatten(list(map(f, places, coordinates)))

    moved = at_each(_moved)
    return Directions(
        lambda keys, weights: treedef.unflatten(moved(keys, weights)),
        at_each(_drawn),
        in_tree(_lifted),
        in_tree(_in_factors),
    )


class _Place(NamedTuple):
    """A leaf, and the bases in which it is moved; all of it without any."""

    x: Array
    leaf: MatrixLeaf | None = None
    bases: tuple[Projector, ...] = ()
    shape: tuple[int, ...] = ()


def _drawn(place: _Place, keys: Array, weights: Array) -> Array:
    shape = place.shape if place.bases else place.x.shape
    return _normal(keys, weights, shape, working_dtype(place.x.dtype))


def _moved(place: _Place, keys: Array, weights: Array) -> Array:
    x = place.x
    if place.bases or math.prod(shards_of(x)) > 1:
        return _add(x, _lifted(place, _drawn(place, keys, weights)))
    return _normal(keys, weights, x.shape, working_dtype(x.dtype), start=x)


def _lifted(place: _Place, z: Array) -> Array:
    for basis in place.bases:
        z = basis.lift(z)
    return placed_like(z, place.x) if place.leaf is None else place.leaf.restore(z, place.x)


def _in_factors(place: _Place, z: Array) -> Array | LowRank:
    if not place.bases:
        return _lifted(place, z)
    first, *rest = place.bases
    if rest:  # of the rows, and of the columns
        return LowRank(first.lift(z), _columns(rest[0], z))
    if first.on_rows:
        return LowRank(_columns(first, z), z.mT)
    return LowRank(z, _columns(first, z))


def _columns(basis: Projector, z: Array) -> Array:
    """The basis as a matrix."""
    if isinstance(basis, DenseProjector):
        matrix = basis.matrix.astype(z.dtype)
        return jnp.broadcast_to(matrix, (*z.shape[:-2], *matrix.shape[-2:]))
    rank = z.shape[basis.axis]
    eye = jnp.broadcast_to(jnp.eye(rank, dtype=z.dtype), (*z.shape[:-2], rank, rank))
    lifted = basis.lift(eye)
    return lifted if basis.on_rows else lifted.mT


def _add(x: Array, z: Array) -> Array:
    return (x.astype(z.dtype) + z).astype(x.dtype)


def _normal(
    keys: Array,
    weights: Float[Array, " q"],
    shape: tuple[int, ...],
    dtype: Any,
    start: Array | None = None,
) -> Array:
    """``start + Σ_k weights_k N_k`` of normal numbers, drawn in pieces.

    Where random bits are made by a loop, as on CPU, drawing takes several times the memory
    of what is drawn; so it never is of all numbers at once.
    """
    rows, size = math.prod(shape[:-1]), math.prod(shape[-1:])
    most = max(1, min(rows, PIECE // max(1, size * weights.size)))
    piece = next(n for n in range(most, 0, -1) if rows % n == 0)
    weights = weights.astype(dtype)

    def row(i: Array) -> Array:
        one = lambda key: jr.normal(jr.fold_in(key, i), (size,), dtype)
        return jnp.sum(weights[:, None] * jax.vmap(one)(keys), axis=0)

    def fill(k: Array, out: Array) -> Array:
        z = jax.vmap(row)(k * piece + jnp.arange(piece))
        if start is not None:
            own = lax.dynamic_slice_in_dim(start.reshape(rows, size), k * piece, piece)
            z = _add(own, z)
        return lax.dynamic_update_slice_in_dim(out, z, k * piece, 0)

    # Filled with a number that is known when the drawing begins: a constant would be made,
    # and take its memory, before the losses are taken.
    out = jnp.full((rows, size), weights[0], dtype if start is None else start.dtype)
    return lax.fori_loop(0, rows // piece, fill, out).reshape(shape)


def _sides(subspace: Any) -> tuple[tuple[Basis, bool | None], ...]:
    """The bases, and whether they act on rows; None leaves it to the basis."""
    if subspace is None:
        return ()
    bases = subspace if isinstance(subspace, tuple) else (subspace,)
    if len(bases) > 2 or not all(map(_is_random, bases)):
        raise TypeError(
            "zeroth_order_gradient takes an AffineSubspace, or one basis or a pair of them "
            "that look at no gradient: Gaussian, RandomOrthonormal or "
            f"SelectedRows(choice='uniform'). Got {subspace!r}."
        )
    return tuple(zip(bases, (True, False) if len(bases) == 2 else (None,), strict=True))


def _is_random(basis: Any) -> bool:
    if isinstance(basis, SelectedRows):
        return basis.choice == "uniform"
    return isinstance(basis, Gaussian | RandomOrthonormal)


def _with_bases(leaf: MatrixLeaf, x: Array, sides: tuple, key: PRNGKeyArray) -> _Place:
    """A leaf with the bases that are drawn for it."""
    a = leaf.view(x)
    bases, shape = [], list(a.shape)
    for i, (basis, on_rows) in enumerate(sides):
        on_rows = leaf.projects_rows(basis.side) if on_rows is None else on_rows
        own = jr.fold_in(jr.fold_in(key, leaf.index), i)
        projected = (a if on_rows else a.mT).astype(working_dtype(a.dtype))
        rank, size = leaf.rank(basis.rank), projected.shape[-2]
        state = basis.init(projected.shape, rank, projected.dtype, own)
        context = RefreshContext(own, jnp.zeros([], jnp.int32), None, rank)
        state = basis.refresh(state, projected, context)
        bases.append(basis.projector(state, own, size, rank, on_rows).beside(a))
        shape[bases[-1].axis] = rank
    return _Place(x, leaf, tuple(bases), tuple(shape))


def _of_all_together(params: PyTree, subspace: AffineSubspace) -> Directions:
    shapes = lambda tree: [x.shape for x in jax.tree.leaves(tree)]
    like = jax.eval_shape(subspace.lift, jnp.zeros(subspace.dim))
    if jax.tree.structure(like) != jax.tree.structure(params) or shapes(like) != shapes(
        params
    ):
        raise ValueError(
            "zeroth_order_gradient was given an AffineSubspace of other parameters: make "
            "it by lrjax.random_subspace(params, dim, key=key)."
        )
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
    draw = lambda keys, weights: _normal(keys, weights, (subspace.dim,), dtype)
    moved = lambda *drawn: jax.tree.map(_add, params, subspace.lift(draw(*drawn)))
    return Directions(moved, draw, subspace.lift, subspace.lift)

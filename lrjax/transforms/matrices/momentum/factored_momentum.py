from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from ...._arguments import checks_trees
from ...._batching import any_member
from ...._matrices import Rank, Where, map_init, map_matrices
from ...._sharding import placed_like
from ....linalg import (
    TruncatedSVD,
    cross,
    identity_like,
    orthonormalize,
    outer,
    product_svd,
    times,
    truncated_svd,
    working_dtype,
)


class FactoredMomentumState(NamedTuple):
    """The state of :func:`factored_momentum`, one tree for each part of the SVD.

    Attributes:
        left: ``U (*b, m, r)`` of each chosen leaf, an empty tuple for each other one.
        values: the singular values ``(*b, r)``, zero until a gradient has come.
        right: ``V (*b, n, r)``.
    """

    left: PyTree
    values: PyTree
    right: PyTree


@checks_trees
def factored_momentum(
    rank: Rank,
    momentum: ArrayLike = 0.95,
    *,
    where: Where | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformation:
    """Replace each matrix by the polar factor of a momentum that is kept as its SVD.

    The momentum ``M = U diag(s) Vᵀ`` has rank ``r``, and ``r (m + n + 1)`` numbers. For a
    gradient ``G (m, n)``::

        M ← SVD_r(μ M + U Uᵀ G + G V Vᵀ − U Uᵀ G V Vᵀ)          update  U Vᵀ

    that is the gradient enters by its projection onto the tangent space of the matrices
    of rank ``r`` at ``M``, and the sum, of rank at most ``2r``, is truncated. Neither is
    formed: the cost is two products with ``G``, two bases of ``2r`` columns and an SVD of
    a ``2r × 2r`` matrix. The first gradient sets ``M = SVD_r(G)``, from a randomized SVD.
    ``U Vᵀ`` has singular values one where ``M`` has rank ``r``; null directions of ``M``
    are left out of it.

    Args:
        rank: an int, a fraction of ``min(m, n)`` or a callable of ``(path, (m, n))``.
        momentum: ``μ``.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            leaves to treat; other axes are a batch. The leaves that are not chosen pass.
        key: of the randomized SVD of the first gradient.

    Returns:
        The transform. A non-finite gradient gives a zero update and keeps the momentum.

    Raises:
        ValueError: at ``init``, if no leaf is chosen, a chosen leaf is no matrix, or the
            rank makes no sense.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.factored_momentum(2)
        >>> g = {"weight": jnp.diag(jnp.arange(8.0, 0.0, -1.0))}
        >>> updates, state = tx.update(g, tx.init(g))
        >>> print(jnp.diag(updates["weight"]).round(3) + 0.0)
        [1. 1. 0. 0. 0. 0. 0. 0.]

    Reference:
        P. Mahdavinia, M. Mahdavi, "Low-rank momentum factorization for memory efficient
        training" (2025), arXiv 2507.08091. Special case: at full rank the polar factor of
        heavy-ball momentum.
    """
    at = lambda leaf: jr.fold_in(jr.key(0) if key is None else key, leaf.index)

    def init(params):
        start = lambda leaf, x: _zero(leaf.view(x), leaf.rank(rank), at(leaf))
        return FactoredMomentumState(
            *map_init("factored_momentum", where, start, params, 3)
        )

    def update(updates, state, params=None):
        del params

        def one(leaf, g, *parts):
            step, new = _step(leaf.view(g), TruncatedSVD(*parts), momentum, at(leaf))
            return leaf.restore(step, g).astype(g.dtype), *new

        out, *new = map_matrices("factored_momentum", where, one, updates, *state)
        return out, FactoredMomentumState(*new)

    return optax.GradientTransformation(init, update)


def _zero(x: Array, rank: int, key: PRNGKeyArray) -> TruncatedSVD:
    """A zero momentum with any orthonormal factors, sharded like the rows and columns."""
    *batch, m, n = x.shape
    dtype = working_dtype(x.dtype)
    draw = lambda key, size: jnp.broadcast_to(
        orthonormalize(jr.normal(key, (size, rank), dtype)), (*batch, size, rank)
    )
    left, right = jr.split(key)
    zeros = jnp.zeros_like(x, dtype)
    rows = jnp.sum(zeros, axis=-1, keepdims=True)
    columns = jnp.sum(zeros, axis=-2, keepdims=True).mT
    values = jnp.sum(rows, axis=-2) + jnp.zeros((*batch, rank), dtype)
    return TruncatedSVD(draw(left, m) + rows, values, draw(right, n) + columns)


def _step(
    g: Array, old: TruncatedSVD, decay: ArrayLike, key: PRNGKeyArray
) -> tuple[Array, TruncatedSVD]:
    g = lax.stop_gradient(g).astype(old.values.dtype)
    size = jnp.sum(jnp.abs(g), axis=(-2, -1))
    finite = jnp.isfinite(size)
    g = jnp.where(finite[..., None, None], g, 0)
    empty = (old.values[..., 0] == 0) & (size > 0) & finite

    there = lambda new: jax.tree.map(placed_like, new, old)

    def started():
        return there(accumulate(old, g, decay))

    def starting():
        first = truncated_svd(g, old.values.shape[-1], method="randomized", key=key)
        return _where(empty, there(first), started())

    new = lax.cond(any_member(jnp.any(empty)), starting, started)
    new = _where(finite, new, old)
    largest = max(g.shape[-2:]) * jnp.finfo(g.dtype).eps * new.values[..., :1]
    full = (new.values > largest) & finite[..., None]
    kept = jnp.where(full[..., None, :], new.left, 0)
    return outer(kept, new.right), new


def accumulate(
    old: TruncatedSVD, g: Float[Array, "*b m n"], decay: ArrayLike
) -> TruncatedSVD:
    """``SVD_r(decay · M + P(g))``, P the projection onto the tangent space at ``M``."""
    left, values, right = old
    g_right = times(g, right)
    g_left = cross(g, left)
    inside = cross(left, g_right)
    identity = identity_like(inside)
    corner = decay * values[..., None, :] * identity - inside
    top = jnp.concatenate([corner, identity], axis=-1)
    bottom = jnp.concatenate([identity, jnp.zeros_like(identity)], axis=-1)
    return product_svd(
        jnp.concatenate([left, g_right], axis=-1),
        jnp.concatenate([top, bottom], axis=-2),
        jnp.concatenate([right, g_left], axis=-1),
        values.shape[-1],
    )


def _where(condition: Array, new: TruncatedSVD, old: TruncatedSVD) -> TruncatedSVD:
    matrix = condition[..., None, None]
    return TruncatedSVD(
        jnp.where(matrix, new.left, old.left),
        jnp.where(condition[..., None], new.values, old.values),
        jnp.where(matrix, new.right, old.right),
    )

from typing import NamedTuple

import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from ..._batching import any_member
from ..._sharding import einsum
from ...linalg import TruncatedSVD, orthonormalize, product_svd, truncated_svd
from ...linalg.gram import identity_like, working_dtype
from ...subspaces.view import Rank, is_hidden_matrix
from ._leaves import Where, choose


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


def factored_momentum(
    rank: Rank,
    decay: ArrayLike = 0.95,
    *,
    where: Where = is_hidden_matrix,
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
        decay: ``μ``.
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
        P. Mahdavinia, M. Mahdavi, "MoFaSGD" (2025), arXiv 2507.08091. Special case: at
        full rank the polar factor of heavy-ball momentum.
    """

    def init(params):
        chosen, leaves, treedef = choose("factored_momentum", params, where)
        parts = [[], [], []]
        base = jr.key(0) if key is None else key
        for leaf, x in zip(chosen, leaves, strict=True):
            if leaf is None:
                start = ((), (), ())
            else:
                start = _zero(leaf.view(x), leaf.rank(rank), jr.fold_in(base, leaf.index))
            for part, value in zip(parts, start, strict=True):
                part.append(value)
        return FactoredMomentumState(*map(treedef.unflatten, parts))

    def update(updates, state, params=None):
        del params
        chosen, leaves, treedef = choose("factored_momentum", updates, where)
        parts = [treedef.flatten_up_to(part) for part in state]
        out = list(leaves)
        base = jr.key(0) if key is None else key
        for i, (leaf, g) in enumerate(zip(chosen, leaves, strict=True)):
            if leaf is None:
                continue
            old = TruncatedSVD(*(part[i] for part in parts))
            at = jr.fold_in(base, leaf.index)
            step, new = _step(leaf.view(g), old, decay, at)
            out[i] = leaf.restore(step).astype(g.dtype)
            for part, value in zip(parts, new, strict=True):
                part[i] = value
        return treedef.unflatten(out), FactoredMomentumState(*map(treedef.unflatten, parts))

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

    def started():
        return accumulate(old, g, decay)

    def starting():
        first = truncated_svd(g, old.values.shape[-1], method="randomized", key=key)
        return _where(empty, first, started())

    new = lax.cond(any_member(jnp.any(empty)), starting, started)
    new = _where(finite, new, old)
    largest = max(g.shape[-2:]) * jnp.finfo(g.dtype).eps * new.values[..., :1]
    full = (new.values > largest) & finite[..., None]
    kept = jnp.where(full[..., None, :], new.left, 0)
    return einsum("...mr,...nr->...mn", kept, new.right), new


def accumulate(
    old: TruncatedSVD, g: Float[Array, "*b m n"], decay: ArrayLike
) -> TruncatedSVD:
    """``SVD_r(decay · M + P(g))``, P the projection onto the tangent space at ``M``."""
    left, values, right = old
    g_right = einsum("...mn,...nr->...mr", g, right)
    g_left = einsum("...mn,...mr->...nr", g, left)
    inside = einsum("...mr,...ms->...rs", left, g_right)
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

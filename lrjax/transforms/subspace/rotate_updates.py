from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from ..._batching import any_member
from ..._sharding import einsum
from ...linalg import orthonormalize
from ...linalg.gram import identity_like, working_dtype
from ...subspaces.carry import Moments, check_roles, read_moments, write_moments
from ...subspaces.schedule import Turn, every
from ...subspaces.view import is_hidden_matrix, projects_rows
from ._leaves import Leaf, Where, choose


class Rotation(NamedTuple):
    """The eigenbasis of one side of a leaf.

    Attributes:
        gram: the running average of ``G Gᵀ (*b, m, m)``, or of ``Gᵀ G (*b, n, n)``.
        basis: orthogonal ``Q`` of the same shape, its eigenvectors up to a few power
            steps.
    """

    gram: Float[Array, "*b p p"]
    basis: Float[Array, "*b p p"]


class RotateUpdatesState(NamedTuple):
    """The state of :func:`rotate_updates`.

    Attributes:
        count: the number of steps.
        inner: the state of the inner transform, on the rotated tree.
        left: a tree like the parameters, with a :class:`Rotation` for each leaf whose
            rows are rotated and an empty tuple for each other one.
        right: the same for columns.
    """

    count: Int[Array, ""]
    inner: Any
    left: PyTree
    right: PyTree


def rotate_updates(
    inner: optax.GradientTransformation,
    decay: ArrayLike = 0.95,
    *,
    refresh_every: int = 10,
    side: Literal["both", "short", "long", "left", "right"] = "both",
    max_side: int = 10000,
    where: Where = is_hidden_matrix,
) -> optax.GradientTransformationExtraArgs:
    """Run any optax transform in the eigenbases of the averaged Gram matrices.

    For a matrix with gradient ``G (m, n)`` a step is, in this order::

        N = inner(Q_lᵀ G Q_r)                  U = Q_l N Q_rᵀ
        L ← β L + (1−β) G Gᵀ                   R ← β R + (1−β) Gᵀ G
        every k steps:  Q_l ← orth(L Q_l)      Q_r ← orth(R Q_r)

    so that no gradient sets its own basis. The first gradient gives the first bases, by
    an eigendecomposition, and no update: the inner transform does not see it. Before a
    refresh the columns of ``Q`` are put in falling order of ``diag(Qᵀ L Q)``. At a
    refresh first moments of the inner state are rotated into the new basis, which is
    exact; second moments only follow the reordering. Leaves take turns, so that they do
    not all refresh on the same step.

    One gradient spans only a part of its long side. In what no gradient has reached yet
    an elementwise inner transform divides rounding errors by rounding errors: for nearly
    deterministic gradients in float32 take ``side="short"``, or an inner ``eps`` well
    above ``1e-7`` of the gradient.

    The state holds ``2 m² + 2 n²`` numbers a matrix besides the inner state; a side that
    keeps the identity costs nothing.

    Args:
        inner: the transform that works in the eigenbases.
        decay: ``β``.
        refresh_every: ``k``.
        side: which sides are rotated; ``"short"`` or ``"long"`` looks at each matrix.
        max_side: sides longer than this keep the identity.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            leaves to rotate. The others reach the inner transform as they are.

    Returns:
        The transform. Under ``vmap`` the members share the branch that refreshes.

    Raises:
        ValueError: for ``refresh_every`` below one; at ``init``, if no leaf is chosen, a
            chosen leaf is no matrix, or the moments of the inner state are not known
            (see :func:`lrjax.subspaces.register_roles`).

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.rotate_updates(optax.scale_by_adam(), side="short")
        >>> state = tx.init({"weight": jnp.ones((8, 16))})
        >>> state.left["weight"].basis.shape, state.right["weight"]
        ((8, 8), ())

    Reference:
        N. Vyas et al., "SOAP" (2024), arXiv 2409.11321. Special case: with the identity
        on both sides (``max_side=0``) the inner transform itself, from the second
        gradient on.
    """
    schedule = every(refresh_every)
    inner = optax.with_extra_args_support(inner)

    def rotates(leaf: Leaf) -> tuple[bool, bool]:
        m, n = leaf.sides
        rows = side == "both" or projects_rows(m, n, side)
        columns = side == "both" or not rows
        return rows and m <= max_side, columns and n <= max_side

    def init(params):
        chosen, leaves, treedef = choose("rotate_updates", params, where)
        lefts, rights, proxies = [], [], []
        for leaf, x in zip(chosen, leaves, strict=True):
            if leaf is None:
                proxies.append(_working(x))
                lefts.append(())
                rights.append(())
                continue
            a = jnp.zeros_like(_working(leaf.view(x)))
            rows, columns = rotates(leaf)
            proxies.append(a)
            lefts.append(_start(a) if rows else ())
            rights.append(_start(a.mT) if columns else ())
        inner_state = inner.init(treedef.unflatten(proxies))
        check_roles(inner_state)
        return RotateUpdatesState(
            jnp.zeros((), jnp.int32),
            inner_state,
            treedef.unflatten(lefts),
            treedef.unflatten(rights),
        )

    def update(updates, state, params=None, **extra):
        del params
        chosen, leaves, treedef = choose("rotate_updates", updates, where)
        lefts = treedef.flatten_up_to(state.left)
        rights = treedef.flatten_up_to(state.right)
        mine = [(i, leaf) for i, leaf in enumerate(chosen) if leaf is not None]
        gradients = [
            _working(x if leaf is None else leaf.view(x))
            for leaf, x in zip(chosen, leaves, strict=True)
        ]
        rotated = list(gradients)
        for i, _ in mine:
            rotated[i] = _to_basis(gradients[i], lefts[i], rights[i])
        steps, inner_state = inner.update(
            treedef.unflatten(rotated), state.inner, None, **extra
        )
        # The first gradient only gives the bases.
        first = state.count == 0
        keep_old = lambda new, old: jnp.where(first, old, new)
        inner_state = jax.tree.map(keep_old, inner_state, state.inner)
        out = [jnp.where(first, 0, u) for u in treedef.flatten_up_to(steps)]
        moments = read_moments(inner_state, treedef)
        for i, leaf in mine:
            out[i] = leaf.restore(_from_basis(out[i], lefts[i], rights[i]))
            due = schedule.due((), Turn(state.count, leaf.index, len(mine)))
            lefts[i], rights[i], moments[i] = _refresh(
                gradients[i], lefts[i], rights[i], moments[i], decay, first, due
            )
        return treedef.unflatten(
            [u.astype(x.dtype) for u, x in zip(out, leaves, strict=True)]
        ), RotateUpdatesState(
            jnp.asarray(optax.safe_increment(state.count)),
            write_moments(inner_state, treedef, moments),
            treedef.unflatten(lefts),
            treedef.unflatten(rights),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _working(x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    return x.astype(working_dtype(x.dtype))


def _start(a: Float[Array, "*b p q"]) -> Rotation:
    # By a sum, which keeps a sharding of the stack.
    stack = jnp.sum(a, axis=(-2, -1), keepdims=True)
    gram = stack + jnp.zeros((*a.shape[:-1], a.shape[-2]), a.dtype)
    return Rotation(gram, identity_like(gram))


def _to_basis(a: Array, left: Rotation | tuple, right: Rotation | tuple) -> Array:
    """``Q_lᵀ a Q_r``, without the side that is not rotated."""
    if isinstance(left, Rotation):
        a = einsum("...mk,...mn->...kn", left.basis, a)
    return (
        einsum("...mn,...nk->...mk", a, right.basis) if isinstance(right, Rotation) else a
    )


def _from_basis(a: Array, left: Rotation | tuple, right: Rotation | tuple) -> Array:
    """``Q_l a Q_rᵀ``."""
    if isinstance(left, Rotation):
        a = einsum("...mk,...kn->...mn", left.basis, a)
    return (
        einsum("...mk,...nk->...mn", a, right.basis) if isinstance(right, Rotation) else a
    )


class _Side(NamedTuple):
    """A new basis of one side, and how coordinates of the old one reach it."""

    rotation: Rotation | tuple
    overlap: Array | None = None
    order: Array | None = None


def _refresh(
    a: Float[Array, "*b m n"],
    left: Rotation | tuple,
    right: Rotation | tuple,
    moments: list[Moments],
    decay: ArrayLike,
    first: Bool[Array, ""],
    due: Bool[Array, ""] | bool,
) -> tuple[Rotation | tuple, Rotation | tuple, list[Moments]]:
    """Average the Gram matrices and, on a turn of this leaf, move the bases."""
    a = lax.stop_gradient(a)
    finite = jnp.isfinite(jnp.sum(a, axis=(-2, -1), keepdims=True))
    average = lambda old, new: jnp.where(finite, decay * old + (1 - decay) * new, old)
    if isinstance(left, Rotation):
        gram = einsum("...mn,...kn->...mk", a, a)
        left = left._replace(gram=average(left.gram, gram))
    if isinstance(right, Rotation):
        gram = einsum("...mn,...mk->...nk", a, a)
        right = right._replace(gram=average(right.gram, gram))

    if not left and not right:
        return left, right, moments

    def move():
        turn = lambda x: (
            _move(x, first, first | due) if isinstance(x, Rotation) else _Side(())
        )
        sides = [turn(left), turn(right)]
        carried = [_carry(m, *sides) for m in moments]
        return sides[0].rotation, sides[1].rotation, carried

    keep = lambda: (left, right, moments)
    return lax.cond(any_member(first | due), move, keep)


def _move(rotation: Rotation, first: Bool[Array, ""], take: Bool[Array, ""]) -> _Side:
    gram, old = rotation
    image = einsum("...pq,...qr->...pr", gram, old)
    sizes = jnp.sum(old * image, axis=-2)
    order = jnp.argsort(-sizes, axis=-1, stable=True)
    ordered, image = (
        jnp.take_along_axis(x, order[..., None, :], axis=-1) for x in (old, image)
    )
    scale = jnp.sqrt(jnp.sum(image**2, axis=(-2, -1), keepdims=True))
    # The shift, of rounding size, keeps null directions where they are.
    shift = 8 * jnp.finfo(image.dtype).eps * scale
    power_step = lambda: orthonormalize(image + shift * ordered)
    eigenvectors = lambda: jnp.linalg.eigh(gram)[1][..., ::-1]
    start = lambda: jnp.where(first, eigenvectors(), power_step())
    new = lax.cond(any_member(first), start, power_step)
    usable = jnp.isfinite(jnp.sum(new, axis=(-2, -1), keepdims=True)) & (scale > 0)
    take = take & usable
    new = jnp.where(take, new, old)
    # Nothing has been learned in the first basis that a reordering could move.
    unmoved = jnp.broadcast_to(jnp.arange(order.shape[-1]), order.shape)
    order = jnp.where(take[..., 0] & ~first, order, unmoved)
    return _Side(Rotation(gram, new), einsum("...ps,...pr->...sr", new, old), order)


def _carry(moments: Moments, left: _Side, right: _Side) -> Moments:
    """First moments into the new coordinates, second moments into the new order."""
    first, second = moments.first, moments.second
    if first is not None and left.overlap is not None:
        first = einsum("...km,...mn->...kn", left.overlap, first)
    if first is not None and right.overlap is not None:
        first = einsum("...mn,...kn->...mk", first, right.overlap)
    if second is not None and left.order is not None:
        second = jnp.take_along_axis(second, left.order[..., :, None], axis=-2)
    if second is not None and right.order is not None:
        second = jnp.take_along_axis(second, right.order[..., None, :], axis=-1)
    return moments._replace(first=first, second=second)

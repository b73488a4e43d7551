import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from ...._arguments import checks_trees
from ...._batching import any_member
from ...._matrices import MatrixLeaf, Where, choose
from ...._moments import Moments, check_moments_known, read_moments, write_moments
from ...._sharding import by_compiler, placed_as_state, placed_like, sharding_along
from ....linalg import (
    cross,
    eigh,
    identity_like,
    increment,
    orthonormalize,
    outer,
    product_rounding,
    products_at,
    rounding,
    times,
    working_dtype,
)
from ....subspaces import Periodic, ScheduleContext


class Rotation(NamedTuple):
    """The eigenbases of one side of the leaves, two trees like the parameters.

    Attributes:
        gram: running averages of ``G Gᵀ (*b, m, m)``, or of ``Gᵀ G (*b, n, n)``.
        basis: orthogonal ``Q`` of the same shape, their eigenvectors up to a few power
            steps; ``optax.MaskedNode()`` for leaves that are not rotated from this side.
    """

    gram: PyTree
    basis: PyTree


class RotateUpdatesState(NamedTuple):
    """The state of :func:`rotate_updates`.

    Attributes:
        count: the number of steps.
        inner: the state of the inner transform, on the rotated tree.
        left: the bases of the rows.
        right: those of the columns.
    """

    count: Int[Array, ""]
    inner: Any
    left: Rotation
    right: Rotation


@checks_trees
def rotate_updates(
    inner: optax.GradientTransformation,
    decay: ArrayLike = 0.95,
    *,
    refresh_every: int | Array = 10,
    side: Literal["both", "short", "long", "left", "right"] = "both",
    max_side: int = 10000,
    where: Where | None = None,
    precision: str | None = None,
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
        precision: of the products with the gradient, as ``jax.default_matmul_precision``
            takes it; None for the one in force. See :func:`lrjax.project_updates`.

    Returns:
        The transform. Under ``vmap`` the members share the branch that refreshes.

    Raises:
        ValueError: for ``refresh_every`` below one; at ``init``, if a given ``where``
            chooses nothing or what is no matrix, or the moments of the inner state are not
            known (see :func:`lrjax.subspaces.register_moments`).

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.rotate_updates(optax.scale_by_adam(), side="short")
        >>> state = tx.init({"weight": jnp.ones((8, 16))})
        >>> state.left.basis["weight"].shape, state.right.basis["weight"]
        ((8, 8), MaskedNode())

    Reference:
        N. Vyas et al., "SOAP: improving and stabilizing Shampoo using Adam" (2024), arXiv
        2409.11321. Special case: with the identity on both sides (``max_side=0``) the
        inner transform itself, from the second gradient on.
    """
    schedule = Periodic(refresh_every)
    inner = optax.with_extra_args_support(inner)

    def rotates(leaf: MatrixLeaf) -> tuple[bool, bool]:
        m, n = leaf.sides
        rows = side == "both" or leaf.projects_rows(side)
        columns = side == "both" or not rows
        return rows and m <= max_side, columns and n <= max_side

    def init(params):
        chosen, leaves, treedef = choose("rotate_updates", params, where)
        lefts, rights, proxies = [], [], []
        for leaf, x in zip(chosen, leaves, strict=True):
            a = _working(x) if leaf is None else jnp.zeros_like(_working(leaf.view(x)))
            rows, columns = (False, False) if leaf is None else rotates(leaf)
            proxies.append(a)
            lefts.append(_start(a) if rows else None)
            rights.append(_start(a.mT) if columns else None)
        inner_state = inner.init(treedef.unflatten(proxies))
        check_moments_known(inner_state)
        return RotateUpdatesState(
            jnp.zeros((), jnp.int32),
            inner_state,
            _to_trees(lefts, treedef),
            _to_trees(rights, treedef),
        )

    def update(updates, state, params=None, **extra):
        del params
        chosen, leaves, treedef = choose("rotate_updates", updates, where)
        lefts = _to_leaves(state.left, treedef)
        rights = _to_leaves(state.right, treedef)
        mine = [(i, leaf) for i, leaf in enumerate(chosen) if leaf is not None]
        gradients = [
            _working(x if leaf is None else leaf.view(x))
            for leaf, x in zip(chosen, leaves, strict=True)
        ]
        rotated = list(gradients)
        at_precision = lambda i: products_at(precision, leaves[i].dtype)
        for i, _ in mine:
            with at_precision(i):
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
            when = ScheduleContext(state.count, leaf.index, len(mine))
            with at_precision(i):
                turned = _from_basis(out[i], lefts[i], rights[i])
                out[i] = leaf.restore(turned, leaves[i])
                lefts[i], rights[i], moments[i] = _refresh(
                    gradients[i],
                    lefts[i],
                    rights[i],
                    moments[i],
                    decay,
                    first,
                    schedule.due((), when),
                )
        return treedef.unflatten(
            [u.astype(x.dtype) for u, x in zip(out, leaves, strict=True)]
        ), RotateUpdatesState(
            increment(state.count),
            write_moments(inner_state, treedef, moments),
            _to_trees(lefts, treedef),
            _to_trees(rights, treedef),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _working(x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    return x.astype(working_dtype(x.dtype))


def _to_trees(rotations: list[Rotation | None], treedef: Any) -> Rotation:
    """The rotations of the leaves as two trees like the parameters."""
    none = Rotation(optax.MaskedNode(), optax.MaskedNode())
    pairs = [none if x is None else x for x in rotations]
    return Rotation(*(treedef.unflatten([x[k] for x in pairs]) for k in range(2)))


def _to_leaves(trees: Rotation, treedef: Any) -> list[Rotation | None]:
    """Undo :func:`_to_trees`."""
    pairs = zip(*map(treedef.flatten_up_to, trees), strict=True)
    masked = lambda x: isinstance(x, optax.MaskedNode)
    return [None if masked(gram) else Rotation(gram, q) for gram, q in pairs]


def _start(a: Float[Array, "*b p q"]) -> Rotation:
    gram = placed_as_state(jnp.zeros((*a.shape[:-1], a.shape[-2]), a.dtype), a)
    return Rotation(gram, identity_like(gram))


def _to_basis(a: Array, left: Rotation | None, right: Rotation | None) -> Array:
    """``Q_lᵀ a Q_r``, without the side that is not rotated, and without rounding.

    A direction that the gradient does not have is left with rounding errors, which an
    elementwise inner transform would scale up to full steps: they become exact zeros.
    """
    if left is not None:
        turned = placed_like(cross(left.basis, a, precision=None), a)
        a = _without_rounding(turned, a, axis=-2)
    if right is not None:
        turned = placed_like(times(a, right.basis, precision=None), a)
        a = _without_rounding(turned, a, axis=-1)
    return a


def _without_rounding(turned: Array, a: Array, axis: int) -> Array:
    size = jnp.sqrt(jnp.sum(a**2, axis=axis, keepdims=True))
    error = product_rounding(a.dtype, a.shape[axis])
    return jnp.where(jnp.abs(turned) > error * size, turned, 0)


def _from_basis(a: Array, left: Rotation | None, right: Rotation | None) -> Array:
    """``Q_l a Q_rᵀ``."""
    if left is not None:
        a = placed_like(times(left.basis, a, precision=None), a)
    if right is not None:
        a = placed_like(outer(a, right.basis, precision=None), a)
    return a


class _Side(NamedTuple):
    """A new basis of one side, and how coordinates of the old one reach it."""

    rotation: Rotation | None
    overlap: Array | None = None
    order: Array | None = None


def _refresh(
    a: Float[Array, "*b m n"],
    left: Rotation | None,
    right: Rotation | None,
    moments: list[Moments],
    decay: ArrayLike,
    first: Bool[Array, ""],
    due: Bool[Array, ""],
) -> tuple[Rotation | None, Rotation | None, list[Moments]]:
    """Average the Gram matrices and, on a turn of this leaf, move the bases."""
    a = lax.stop_gradient(a)
    finite = jnp.isfinite(jnp.sum(a, axis=(-2, -1), keepdims=True))

    def average(old, new):
        return jnp.where(finite, decay * old + (1 - decay) * placed_like(new, old), old)

    if left is not None:
        left = left._replace(gram=average(left.gram, outer(a, a, precision=None)))
    if right is not None:
        right = right._replace(gram=average(right.gram, cross(a, a, precision=None)))
    if left is None and right is None:
        return left, right, moments

    def move():
        turn = lambda x: _Side(None) if x is None else _move(x, first, first | due)
        sides = [turn(left), turn(right)]
        carried = [_carry(m, *sides) for m in moments]
        return sides[0].rotation, sides[1].rotation, carried

    keep = lambda: (left, right, moments)
    return lax.cond(any_member(first | due), move, keep)


def _move(rotation: Rotation, first: Bool[Array, ""], take: Bool[Array, ""]) -> _Side:
    gram, old = rotation
    image = placed_like(times(gram, old), old)
    sizes = jnp.sum(old * image, axis=-2)
    order = jnp.argsort(-sizes, axis=-1, stable=True)
    ordered, image = (_reordered(x, order[..., None, :], axis=-1) for x in (old, image))
    scale = jnp.sqrt(jnp.sum(image**2, axis=(-2, -1), keepdims=True))
    # Null directions stay where they are: their image, of rounding size, is no direction,
    # and the shift, of the same size, keeps them independent.
    error = rounding(image.dtype, image.shape[-1]) * scale
    known = jnp.sqrt(jnp.sum(image**2, axis=-2, keepdims=True)) > error
    power_step = lambda: orthonormalize(jnp.where(known, image, 0) + error * ordered)
    eigenvectors = lambda: _eigenvectors(gram)
    start = lambda: jnp.where(first, eigenvectors(), power_step())
    new = lax.cond(any_member(first), start, power_step)
    usable = jnp.isfinite(jnp.sum(new, axis=(-2, -1), keepdims=True)) & (scale > 0)
    take = take & usable
    new = jnp.where(take, new, old)
    # Nothing has been learned in the first basis that a reordering could move.
    unmoved = jnp.broadcast_to(jnp.arange(order.shape[-1]), order.shape)
    order = jnp.where(take[..., 0] & ~first, order, unmoved)
    return _Side(Rotation(gram, new), cross(new, old), order)


def _reordered(x: Array, order: Array, axis: int) -> Array:
    pick = functools.partial(jnp.take_along_axis, axis=axis)
    return by_compiler(pick, x, order, out=sharding_along(x))


def _eigenvectors(gram: Float[Array, "*b p p"]) -> Float[Array, "*b p p"]:
    """In falling order of the eigenvalues, completed by fixed directions.

    The solver's basis of the null space is an accident of rounding: another batch size
    gives another one, and with it another optimizer once gradients reach into it. So are
    the signs, on which only the state depends: here each makes an acute angle with a
    fixed direction.
    """
    values, vectors = eigh(gram)
    values, vectors = values[..., None, ::-1], vectors[..., ::-1]
    known = values > rounding(gram.dtype, gram.shape[-1]) * values[..., :1]
    others = jr.normal(jr.key(0), gram.shape[-2:], gram.dtype)
    others = jnp.broadcast_to(others, gram.shape)
    angles = jnp.sum(vectors * others[..., :1], axis=-2, keepdims=True)
    vectors = jnp.where(angles < 0, -vectors, vectors)
    return placed_like(orthonormalize(jnp.where(known, vectors, others)), gram)


def _carry(moments: Moments, left: _Side, right: _Side) -> Moments:
    """First moments into the new coordinates, second moments into the new order."""
    first, second = moments.first, moments.second
    if first is not None and left.overlap is not None:
        first = placed_like(times(left.overlap, first), first)
    if first is not None and right.overlap is not None:
        first = placed_like(outer(first, right.overlap), first)
    if second is not None and left.order is not None:
        second = _reordered(second, left.order[..., :, None], axis=-2)
    if second is not None and right.order is not None:
        second = _reordered(second, right.order[..., None, :], axis=-1)
    if first is not None and second is not None:
        # Without any energy yet a rotated moment is rounding, and over it a huge step.
        first = jnp.where(second == 0, 0, first)
    return moments._replace(first=first, second=second)

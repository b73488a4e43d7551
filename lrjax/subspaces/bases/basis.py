from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..._sharding import einsum, gathered
from ...linalg import orthonormalize, truncated_svd
from ..view import Rank, Side


class Dense(NamedTuple):
    """A basis held as a matrix ``P (*b, p, r)``, and the side it is applied from.

    Attributes:
        matrix: ``P``.
        rows: whether ``p`` indexes the rows of the gradient. Then ``R = Pᵀ G (r, n)``,
            else ``R = G P (m, r)``: nothing is ever transposed in memory.
    """

    matrix: Float[Array, "*b p r"]
    rows: bool = True

    @property
    def axis(self) -> int:
        """The axis of the gradient, and of its projection, that the basis acts on."""
        return -2 if self.rows else -1

    def down(self, g: Float[Array, "*b m n"]) -> Float[Array, "*b m2 n2"]:
        """The projection ``Pᵀ G`` or ``G P``."""
        if self.rows:
            # Transposed in memory, which is small: XLA on CPU is then a third faster.
            rows = lax.optimization_barrier(self.matrix.mT)
            return einsum("...rp,...pq->...rq", rows, g)
        return einsum("...qp,...pr->...qr", g, self.matrix)

    def up(self, x: Float[Array, "*b m2 n2"]) -> Float[Array, "*b m n"]:
        """The lift ``P X`` or ``X Pᵀ``."""
        if self.rows:
            return einsum("...pr,...rq->...pq", self.matrix, x)
        return einsum("...qr,...pr->...qp", x, self.matrix)

    def overlap(self, old: "Dense") -> Float[Array, "*b r r"]:
        """``Pᵀ P_old``."""
        return einsum("...pr,...ps->...rs", self.matrix, old.matrix)


class Rows(NamedTuple):
    """A basis of scaled unit vectors: column ``k`` is ``scale_k · e_{index_k}``.

    Attributes:
        index: which entries of the projected axis.
        size: how long that axis is.
        scale: factors, one where absent.
        rows: as in :class:`Dense`.
    """

    index: Int[Array, "*b r"]
    size: int
    scale: Float[Array, "*b r"] | None = None
    rows: bool = True

    @property
    def axis(self) -> int:
        """The axis of the gradient, and of its projection, that the basis acts on."""
        return -2 if self.rows else -1

    def _along(self, x: Array) -> Array:
        return jnp.expand_dims(x, -1 if self.rows else -2)

    def _scaled(self, x: Array) -> Array:
        return x if self.scale is None else x * self._along(self.scale)

    def down(self, g: Float[Array, "*b m n"]) -> Float[Array, "*b m2 n2"]:
        """Pick the rows or columns: no arithmetic but the scale."""
        return self._scaled(jnp.take_along_axis(g, self._along(self.index), self.axis))

    def up(self, x: Float[Array, "*b m2 n2"]) -> Float[Array, "*b m n"]:
        """Put the rows or columns back; those drawn twice add."""

        def put(index, x):
            shape = (self.size, x.shape[-1]) if self.rows else (x.shape[-2], self.size)
            zeros = jnp.zeros(shape, x.dtype)
            return zeros.at[index].add(x) if self.rows else zeros.at[:, index].add(x)

        for _ in range(x.ndim - 2):
            put = jax.vmap(put)
        index = jnp.broadcast_to(self.index, (*x.shape[:-2], self.index.shape[-1]))
        return put(index, self._scaled(x))

    def overlap(self, old: "Rows") -> Float[Array, "*b r r"]:
        """``Pᵀ P_old``: one where both hold the same row."""
        same = self.index[..., :, None] == old.index[..., None, :]
        if self.scale is None or old.scale is None:
            return same.astype(jnp.float32)
        return same * self.scale[..., :, None] * old.scale[..., None, :]


class Refresh(NamedTuple):
    """What a basis may look at while it is refreshed, besides the gradient.

    Attributes:
        key: a key of this leaf and step.
        count: the number of steps before this one.
        momentum: the inner transform's first moment ``(*b, r, q)`` in the coordinates
            of the old basis, or None if it has none.
        rank: the number of columns.
        projected: ``Pᵀ a`` with the old basis where the step has it anyway, else None.
        rows: whether ``a`` lies in memory as it is seen here; if not it is a transposed
            view, and a product is fast where ``a`` is its second operand.
    """

    key: PRNGKeyArray
    count: Int[Array, ""]
    momentum: Float[Array, "*b r q"] | None
    rank: int
    projected: Float[Array, "*b r q"] | None = None
    rows: bool = True


def squares_along(x: Array, axis: int) -> Array:
    """The sums of squares along an axis, which stays with length one.

    One expression for all that need it, so that the compiler computes it once.
    """
    return jnp.sum(x**2, axis=axis, keepdims=True)


def _dense_init(
    shape: tuple[int, ...], rank: int, dtype: Any, key: PRNGKeyArray
) -> Float[Array, "*b p r"]:
    """A random orthonormal basis, the same for every member of the batch."""
    *batch, p, _ = shape
    start = orthonormalize(jr.normal(key, (p, rank), dtype))
    return jnp.broadcast_to(start, (*batch, p, rank))


def _dense_frame(state: Array, key: PRNGKeyArray, size: int, rank: int) -> Dense:
    del key, size, rank
    return Dense(state)


class Basis(NamedTuple):
    """A rule for the subspace: how its basis starts, moves and is applied.

    The gradient comes as ``a (*b, p, q)`` with the projected axis first, and so do the
    momentum and the projection ``(*b, r, q)`` of :class:`Refresh`. States are
    pytrees of arrays whose leading axes are the batch axes.

    Attributes:
        rank: number of columns: an int, a fraction of ``min(m, n)``, or a callable of
            ``(path, (rows, columns))``.
        side: the projected axis: ``"short"``, ``"long"``, ``"left"`` (rows, ``P`` is
            ``(m, r)``) or ``"right"`` (columns, ``P`` is ``(n, r)``).
        refresh: ``(state, a, Refresh) -> state``.
        init: ``(shape of a, rank, dtype, key) -> state``.
        frame: ``(state, key, p, rank) -> Dense | Rows``, the basis ready for use; the
            loop sets its ``rows``.
        start: replaces ``refresh`` until the basis has seen its first usable gradient.
        observe: ``(state, a) -> state``, called on every step, before any refresh.
        moved: ``(count, rank) -> (first row, number of rows)`` when one refresh turns
            only these columns of the basis, so that only their moments are carried.
        orthonormal: whether ``PᵀP = I``, so that ``a − P Pᵀ a`` is what was left out.
        shared_axis: batch axis of ``a`` (negative) along which one basis serves all, in
            leaves that have it.
    """

    rank: Rank
    side: Side
    refresh: Callable[[Any, Array, Refresh], Any]
    init: Callable[..., Any] = _dense_init
    frame: Callable[..., Dense | Rows] = _dense_frame
    start: Callable[[Any, Array, Refresh], Any] | None = None
    observe: Callable[[Any, Array], Any] | None = None
    moved: Callable[[Array, int], tuple[Array, int]] | None = None
    orthonormal: bool = True
    shared_axis: int | None = None


def svd(rank: Rank, *, side: Side = "short") -> Basis:
    """The leading left singular vectors of the gradient, by a full SVD.

    ``a = U S Vᵀ``, ``P = U[:, :r]``. Exact and slow: tens of times the cost of the rest
    of a step. :func:`power` finds nearly the same subspace for the price of a matmul.

    Args:
        rank: see :class:`Basis`.
        side: see :class:`Basis`.

    Returns:
        The basis rule.

    Example:
        >>> import lrjax, optax
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), lrjax.subspaces.svd(4))

    Reference:
        J. Zhao et al., "GaLore" (2024), arXiv 2403.03507.
    """
    return Basis(rank, side, lambda _, a, to: truncated_svd(a, to.rank).left)


def gram_eigh(rank: Rank, *, side: Side = "short") -> Basis:
    """The leading eigenvectors of ``a aᵀ``: the span of :func:`svd`, several times faster.

    Singular values below ``sqrt(eps)`` of the largest are lost in rounding, so prefer
    it where the rank stays well inside the numerical rank.

    Args:
        rank: see :class:`Basis`.
        side: see :class:`Basis`.

    Returns:
        The basis rule.

    Example:
        >>> import lrjax, optax
        >>> basis = lrjax.subspaces.gram_eigh(4)
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)
    """

    def refresh(state, a, to):
        del state
        return leading_eigenvectors(einsum("...pq,...sq->...ps", a, a), to.rank)

    return Basis(rank, side, refresh)


def leading_eigenvectors(g: Array, rank: int) -> Array:
    """The eigenvectors ``(*b, p, r)`` of the largest eigenvalues, in falling order."""
    return jnp.linalg.eigh(lax.stop_gradient(gathered(g)))[1][..., ::-1][..., :rank]


def randomized_svd(
    rank: Rank, *, power_iters: int = 1, oversample: int = 8, side: Side = "short"
) -> Basis:
    """The leading left singular vectors, from a Gaussian sketch.

    Args:
        rank: see :class:`Basis`.
        power_iters: subspace iterations of the sketch.
        oversample: extra columns of the sketch.
        side: see :class:`Basis`.

    Returns:
        The basis rule.

    Example:
        >>> import lrjax, optax
        >>> basis = lrjax.subspaces.randomized_svd(4)
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)

    Reference:
        N. Halko, P.-G. Martinsson, J. A. Tropp (2011), arXiv 0909.4061; used by D. Su
        et al., "GaLore 2" (2025), arXiv 2504.20437.
    """

    def refresh(state, a, to):
        del state
        return truncated_svd(
            a,
            to.rank,
            method="randomized",
            key=to.key,
            power_iters=power_iters,
            oversample=oversample,
        ).left

    return Basis(rank, side, refresh)


def range_finder(rank: Rank, *, side: Side = "short") -> Basis:
    """An orthonormal basis of ``a Ω`` with Gaussian ``Ω (q, r)``: one matmul, no memory.

    Args:
        rank: see :class:`Basis`.
        side: see :class:`Basis`.

    Returns:
        The basis rule.

    Example:
        >>> import lrjax, optax
        >>> basis = lrjax.subspaces.range_finder(4)
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)
    """

    def refresh(state, a, to):
        del state
        sketch = jr.normal(to.key, (a.shape[-1], to.rank), a.dtype)
        sketch = jnp.broadcast_to(sketch, (*a.shape[:-2], *sketch.shape))
        return orthonormalize(einsum("...pq,...qr->...pr", a, sketch))

    return Basis(rank, side, refresh)


def fixed(matrix: Float[Array, "p r"], *, side: Side = "left") -> Basis:
    """A basis that never moves, given by the caller.

    Args:
        matrix: ``P (p, r)`` with orthonormal columns, for every projected leaf.
        side: the axis of the leaves that has length ``p``.

    Returns:
        The basis rule.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> basis = lrjax.subspaces.fixed(jnp.eye(16)[:, :4])
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)
    """
    size, rank = matrix.shape

    def init(shape, _, dtype, key):
        del key
        if shape[-2] != size:
            raise ValueError(
                f"fixed was given a basis of {size} rows, for a projected axis of length "
                f"{shape[-2]}: choose other leaves with where=, or another side=."
            )
        return jnp.broadcast_to(matrix.astype(dtype), (*shape[:-2], size, rank))

    return Basis(rank, side, lambda state, *_: state, init)


def switch(before: Basis, after: Basis, at: Any) -> Basis:
    """One basis rule until step ``at``, another from then on.

    Args:
        before: the first rule.
        after: the second; rank and side are taken from the first. Both keep a dense
            basis.
        at: the step of the change; may be traced.

    Returns:
        The basis rule.

    Raises:
        ValueError: if either rule keeps a state of its own.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> basis = sub.switch(sub.svd(4), sub.random_orthonormal(4), at=1000)
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)
    """
    from ..._batching import any_member

    if before.frame is not _dense_frame or after.frame is not _dense_frame:
        raise ValueError("switch needs two rules whose state is the basis matrix itself.")

    def refresh(state, a, to):
        late = any_member(to.count >= at)
        return lax.cond(
            late,
            lambda: after.refresh(state, a, to).astype(state.dtype),
            lambda: before.refresh(state, a, to).astype(state.dtype),
        )

    return Basis(before.rank, before.side, refresh)

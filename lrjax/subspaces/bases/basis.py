import abc
import functools
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..._matrices import Rank, Side
from ..._sharding import by_compiler, einsum, placed_beside, projected_along, sharding_along


class Projector(eqx.Module):
    """A basis ``P (*b, p, r)`` ready to be applied to the gradients of a leaf.

    Attributes:
        on_rows: whether ``p`` indexes the rows of the gradient. Then ``R = Pᵀ G (r, n)``,
            else ``R = G P (m, r)``: nothing is ever transposed in memory.
    """

    on_rows: eqx.AbstractVar[bool]

    @property
    def axis(self) -> int:
        """The axis of the gradient, and of its projection, that the basis acts on."""
        return -2 if self.on_rows else -1

    def beside(self, a: Float[Array, "*b m n"]) -> "Projector":
        """The same, placed for use with the gradients of a leaf on a mesh."""
        del a
        return self

    @abc.abstractmethod
    def project(self, g: Float[Array, "*b m n"]) -> Float[Array, "*b m2 n2"]:
        """The projection ``Pᵀ G`` or ``G P``."""

    @abc.abstractmethod
    def lift(self, x: Float[Array, "*b m2 n2"]) -> Float[Array, "*b m n"]:
        """The lift ``P X`` or ``X Pᵀ``."""

    @abc.abstractmethod
    def overlap(self, old: Any) -> Float[Array, "*b r r"]:
        """``Pᵀ P_old`` with another projector of this class."""


class DenseProjector(Projector):
    """A basis held as a matrix ``P (*b, p, r)``.

    It meets gradients at the precision in force, and other bases at full precision.
    """

    matrix: Float[Array, "*b p r"]
    on_rows: bool = eqx.field(default=True, static=True)

    def beside(self, a: Float[Array, "*b m n"]) -> "DenseProjector":
        """The rows of the matrix beside the entries that they multiply."""
        matrix = placed_beside(self.matrix, a, (self.axis, None))
        return DenseProjector(matrix=matrix, on_rows=self.on_rows)

    def project(self, g: Float[Array, "*b m n"]) -> Float[Array, "*b m2 n2"]:
        """The projection ``Pᵀ G`` or ``G P``.

        Where the projected axis is the sharded one, the other one of the result is.
        """
        if self.on_rows:
            # Transposed in memory, which is small: XLA on CPU is then a third faster.
            turned = lax.optimization_barrier(self.matrix.mT)
            return einsum("...rp,...pq->...rq", turned, g, precision=None, onto="q")
        return einsum("...qp,...pr->...qr", g, self.matrix, precision=None, onto="q")

    def lift(self, x: Float[Array, "*b m2 n2"]) -> Float[Array, "*b m n"]:
        """The lift ``P X`` or ``X Pᵀ``."""
        if self.on_rows:
            return einsum("...pr,...rq->...pq", self.matrix, x, precision=None, first="p")
        return einsum("...qr,...pr->...qp", x, self.matrix, precision=None, first="p")

    def overlap(self, old: "DenseProjector") -> Float[Array, "*b r r"]:
        """``Pᵀ P_old``."""
        return einsum("...pr,...ps->...rs", self.matrix, old.matrix)

    def columns(self, first: Array, size: int) -> "DenseProjector":
        """The basis of some consecutive columns alone."""
        cut = lax.dynamic_slice_in_dim(self.matrix, first, size, axis=-1)
        return DenseProjector(matrix=cut, on_rows=self.on_rows)


class RowProjector(Projector):
    """A basis of scaled unit vectors: column ``k`` is ``scale_k · e_{index_k}``.

    Attributes:
        index: which entries of the projected axis.
        size: how long that axis is.
        scale: factors, one where absent.
        on_rows: as in :class:`Projector`.
    """

    index: Int[Array, "*b r"]
    size: int = eqx.field(static=True)
    scale: Float[Array, "*b r"] | None = None
    on_rows: bool = eqx.field(default=True, static=True)

    def _along(self, x: Array) -> Array:
        return jnp.expand_dims(x, -1 if self.on_rows else -2)

    def _scaled(self, x: Array) -> Array:
        return x if self.scale is None else x * self._along(self.scale)

    def project(self, g: Float[Array, "*b m n"]) -> Float[Array, "*b m2 n2"]:
        """Pick the rows or columns: no arithmetic but the scale."""
        pick = functools.partial(jnp.take_along_axis, axis=self.axis)
        out = projected_along(g, self.axis)
        return self._scaled(by_compiler(pick, g, self._along(self.index), out=out))

    def lift(self, x: Float[Array, "*b m2 n2"]) -> Float[Array, "*b m n"]:
        """Put the rows or columns back; those drawn twice add."""

        def put(index, x):
            shape = (self.size, x.shape[-1]) if self.on_rows else (x.shape[-2], self.size)
            zeros = jnp.zeros(shape, x.dtype)
            return zeros.at[index].add(x) if self.on_rows else zeros.at[:, index].add(x)

        for _ in range(x.ndim - 2):
            put = jax.vmap(put)
        index = jnp.broadcast_to(self.index, (*x.shape[:-2], self.index.shape[-1]))
        out = sharding_along(x)
        return by_compiler(put, index, self._scaled(x), out=out)

    def overlap(self, old: "RowProjector") -> Float[Array, "*b r r"]:
        """``Pᵀ P_old``: one where both hold the same row."""
        same = self.index[..., :, None] == old.index[..., None, :]
        if self.scale is None or old.scale is None:
            return same.astype(jnp.float32)
        return same * self.scale[..., :, None] * old.scale[..., None, :]


class RefreshContext(NamedTuple):
    """What a basis may look at while it is refreshed, besides the gradient.

    Attributes:
        key: a key of this leaf and step.
        count: the number of steps before this one.
        momentum: the inner transform's first moment ``(*b, r, q)`` in the coordinates
            of the old basis, or None if it has none or the basis does not ask for it.
        rank: the number of columns.
        projected: ``Pᵀ a`` with the old basis where the step has it anyway, else None.
        on_rows: whether ``a`` lies in memory as it is seen here; if not it is a transposed
            view, and a product is fast where ``a`` is its second operand.
    """

    key: PRNGKeyArray
    count: Int[Array, ""]
    momentum: Float[Array, "*b r q"] | None
    rank: int
    projected: Float[Array, "*b r q"] | None = None
    on_rows: bool = True


class Basis(eqx.Module):
    """A rule for the subspace: how its basis starts, moves and is applied.

    The gradient comes as ``a (*b, p, q)`` with the projected axis first, and so do the
    momentum and the projection ``(*b, r, q)`` of :class:`RefreshContext`. States are
    pytrees of arrays whose leading axes are the batch axes.

    Attributes:
        rank: number of columns: an int, a fraction of ``min(m, n)``, or a callable of
            ``(path, (rows, columns))``.
        side: the projected axis: ``"short"``, ``"long"``, ``"left"`` (rows, ``P`` is
            ``(m, r)``) or ``"right"`` (columns, ``P`` is ``(n, r)``).
        orthonormal: whether ``PᵀP = I``, so that ``a − P Pᵀ a`` is what was left out.
        uses_momentum: whether a refresh looks at the inner transform's first moment.
        has_start: whether :meth:`start`, and not a refresh, sets the first basis.
        observes: whether :meth:`observe` has to see every gradient.
        in_place: whether on a mesh a refresh takes the state as it lies in memory; else
            its rows are brought beside the entries of the gradient that they multiply.
        shared_axis: batch axis of ``a`` (negative) along which one basis serves all.
    """

    rank: eqx.AbstractVar[Rank]
    side: eqx.AbstractVar[Side]
    orthonormal: ClassVar[bool] = True
    uses_momentum: ClassVar[bool] = False
    has_start: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    in_place: ClassVar[bool] = False
    shared_axis: ClassVar[int | None] = None

    def init(self, shape: tuple[int, ...], rank: int, dtype: Any, key: PRNGKeyArray) -> Any:
        """The state for gradients ``a`` of a shape: the first coordinates.

        It serves until the first gradient that is finite and not zero.
        """
        del key
        return jnp.broadcast_to(jnp.eye(shape[-2], rank, dtype=dtype), (*shape[:-1], rank))

    @abc.abstractmethod
    def refresh(
        self, state: Any, a: Float[Array, "*b p q"], context: RefreshContext
    ) -> Any:
        """The state that a gradient makes of the present one."""

    def start(self, state: Any, a: Float[Array, "*b p q"], context: RefreshContext) -> Any:
        """The state that the first usable gradient makes."""
        return self.refresh(state, a, context)

    def observe(self, state: Any, a: Float[Array, "*b p q"]) -> Any:
        """See a gradient, on every step and before any refresh."""
        del a
        return state

    def changed_columns(self, count: Array, rank: int) -> tuple[Array, int] | None:
        """The first one and the number of the columns that a refresh turns; None: all."""
        del count, rank
        return None

    @abc.abstractmethod
    def projector(
        self, state: Any, key: PRNGKeyArray, size: int, rank: int, on_rows: bool
    ) -> Projector:
        """The basis of ``size`` rows and ``rank`` columns, ready for use."""


class MatrixBasis(Basis):
    """A rule whose state is the basis matrix ``P (*b, p, r)`` itself."""

    def projector(
        self, state: Array, key: PRNGKeyArray, size: int, rank: int, on_rows: bool
    ) -> DenseProjector:
        """The state, applied from the left or the right."""
        del key, size, rank
        return DenseProjector(matrix=state, on_rows=on_rows)

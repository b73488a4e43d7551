# ruff: noqa: D102 - what overrides a method of the base class is documented there
import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..._sharding import matvec
from ...linalg import times
from ...lowrank import LowRank


BLOCK = 1 << 15  # entries that are gathered at a time


class Operator(eqx.Module):
    """A linear map from matrices ``(m, n)`` to measurements, known by its products.

    An operator of your own needs no more than ``shape`` and ``__call__``: its adjoint is
    the transpose of the call. Nothing of size ``m × n`` is formed that the operator does
    not hold already. The arrays that define it are leaves: pass an operator through
    ``jit`` as an argument, and ``vmap`` over members that share one with ``in_axes=None``.

    Example:
        The sums of the columns:

        >>> import jax.numpy as jnp, lrjax
        >>> class ColumnSums(lrjax.recovery.Operator):
        ...     shape = (3, 2)
        ...
        ...     def __call__(self, x):
        ...         return x.right @ x.left.sum(axis=0)
        >>> print(ColumnSums().adjoint(jnp.array([1.0, 5.0])))
        [[1. 5.]
         [1. 5.]
         [1. 5.]]
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(m, n)``, the shape of the matrices that it measures."""

    @abc.abstractmethod
    def __call__(self, x: LowRank) -> Float[Array, "..."]:
        """The measurements of a matrix in factors."""

    def adjoint_matmul(
        self, y: Float[Array, "..."], v: Float[Array, "n k"]
    ) -> Float[Array, "m k"]:
        """The product ``A*(y) v`` of the adjoint with a thin matrix."""
        # ⟨A(L vᵀ), y⟩ = ⟨L, A*(y) v⟩: the transpose of the measurement as a map of L.
        left = jax.ShapeDtypeStruct((self.shape[0], v.shape[-1]), v.dtype)
        return jax.linear_transpose(lambda left: self(LowRank(left, v)), left)(y)[0]

    def adjoint_rmatmul(
        self, y: Float[Array, "..."], u: Float[Array, "m k"]
    ) -> Float[Array, "n k"]:
        """The product ``A*(y)ᵀ u`` of the transpose of the adjoint with a thin matrix."""
        right = jax.ShapeDtypeStruct((self.shape[1], u.shape[-1]), u.dtype)
        return jax.linear_transpose(lambda right: self(LowRank(u, right)), right)(y)[0]

    def adjoint(self, y: Float[Array, "..."]) -> Float[Array, "m n"]:
        """The adjoint ``A*(y)`` as a dense matrix."""
        return self.adjoint_matmul(y, jnp.eye(self.shape[1], dtype=y.dtype))


class DenseSensing(Operator):
    """Inner products with dense matrices, ``y_k = ⟨A_k, X⟩``.

    The matrices are stored as the rows of one ``(count, m n)`` array: a ``vmap`` over
    matrices ``X`` that share the operator then lowers to one matrix product, which reads
    the operator once for all of them.

    Attributes:
        matrices: ``(count, m n)``, each row a matrix ``A_k`` in row-major order.
        dims: ``(m, n)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> a = lrjax.recovery.DenseSensing(jnp.arange(6.0)[None], (2, 3))
        >>> print(a(lrjax.LowRank(jnp.ones((2, 1)), jnp.ones((3, 1)))))
        [15.]
    """

    matrices: Float[Array, "count size"]
    dims: tuple[int, int] = eqx.field(static=True)

    def __check_init__(self):
        _check_columns("DenseSensing", self.matrices, math.prod(self.dims), self.dims)

    @property
    def shape(self) -> tuple[int, int]:
        return self.dims

    def __call__(self, x: LowRank) -> Float[Array, " count"]:
        _check_measured(self, x)
        return matvec(self.matrices, x.materialize().reshape(-1))


class RankOneSensing(Operator):
    """Bilinear measurements ``y_k = a_kᵀ X b_k``; the matrices ``a_k b_kᵀ`` are not formed.

    With ``b = a`` these are quadratic measurements: of ``X = U Uᵀ`` they are
    ``‖Uᵀ a_k‖²``, phase retrieval when U has one column.

    Attributes:
        a: ``(count, m)``.
        b: ``(count, n)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> a = jnp.array([[3.0, 4.0]])
        >>> x = lrjax.LowRank(jnp.ones((2, 1)), jnp.ones((2, 1)))
        >>> print(lrjax.recovery.RankOneSensing(a, a)(x))
        [49.]
    """

    a: Float[Array, "count m"]
    b: Float[Array, "... n"]

    def __check_init__(self):
        if not (self.a.ndim == self.b.ndim and self.a.shape[:-1] == self.b.shape[:-1]):
            raise ValueError(
                "RankOneSensing needs as many vectors a (count, m) as b (count, n), got "
                f"shapes {self.a.shape} and {self.b.shape}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.a.shape[-1], self.b.shape[-1]

    def __call__(self, x: LowRank) -> Float[Array, " count"]:
        _check_measured(self, x)
        return jnp.sum(times(self.a, x.left) * times(self.b, x.right), axis=-1)


class Entries(Operator):
    """Single entries, ``y_k = X[rows_k, cols_k]``, by gather; for few observed entries.

    Rows of the factors are gathered for a block of entries at a time, also when
    differentiated: the measurements and both gradients take less than twice the memory
    of indices and values, where gathering all at once would take ``rank`` times it.

    Attributes:
        rows: ``(count,)`` integers in ``[0, m)``.
        cols: ``(count,)`` integers in ``[0, n)``.
        dims: ``(m, n)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.arange(3.0)[:, None], jnp.arange(2.0)[:, None])
        >>> at = lrjax.recovery.Entries(jnp.array([2, 0]), jnp.array([1, 1]), (3, 2))
        >>> print(at(x))
        [2. 0.]
    """

    rows: Int[Array, "..."]
    cols: Int[Array, "..."]
    dims: tuple[int, int] = eqx.field(static=True)

    def __check_init__(self):
        if self.rows.shape != self.cols.shape:
            raise ValueError(
                "Entries needs as many row as column indices, got shapes "
                f"{self.rows.shape} and {self.cols.shape}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.dims

    def __call__(self, x: LowRank) -> Float[Array, " count"]:
        _check_measured(self, x)
        return _entries(x.left, x.right, self.rows, self.cols)


def _entries(left: Array, right: Array, rows: Array, cols: Array) -> Array:
    """Inner products of rows of two factors, a block of entries at a time."""

    # Without the checkpoint the gathered rows of all blocks are kept for the gradient.
    @jax.checkpoint
    def measure(_, block):
        i, j = block
        return None, jnp.sum(left[i] * right[j], axis=-1)

    count = rows.shape[0]
    blocks = -(-count // BLOCK)
    if blocks <= 1:
        return measure(None, (rows, cols))[1]

    def split(indices):
        # Every block takes one entry in ``blocks``: where entries are sharded over
        # devices, each device then works on its share of every block.
        return jnp.pad(indices, (0, -count % blocks)).reshape(-1, blocks).T

    _, values = lax.scan(measure, None, (split(rows), split(cols)))
    return values.T.reshape(-1)[:count]


class Masked(Operator):
    """The whole matrix with the entries outside a mask set to zero; for many observed ones.

    Attributes:
        mask: ``(m, n)`` booleans, true where the matrix is observed.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.ones((2, 1)), jnp.ones((2, 1)))
        >>> print(lrjax.recovery.Masked(jnp.eye(2, dtype=bool))(x))
        [[1. 0.]
         [0. 1.]]
    """

    mask: Bool[Array, "m n"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.mask.shape[-2], self.mask.shape[-1]

    def __call__(self, x: LowRank) -> Float[Array, "m n"]:
        _check_measured(self, x)
        return jnp.where(self.mask, x.materialize(), 0)


class Identity(Operator):
    """The whole matrix.

    Attributes:
        dims: ``(m, n)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.ones((1, 1)), jnp.array([[2.0], [3.0]]))
        >>> print(lrjax.recovery.Identity((1, 2))(x))
        [[2. 3.]]
    """

    dims: tuple[int, int] = eqx.field(static=True)

    @property
    def shape(self) -> tuple[int, int]:
        return self.dims

    def __call__(self, x: LowRank) -> Float[Array, "m n"]:
        _check_measured(self, x)
        return x.materialize()


def _check_columns(owner: str, matrices: Array, size: int, dims: tuple[int, int]) -> None:
    if matrices.shape[-1] != size:
        raise ValueError(
            f"{owner} measures {dims[0]}x{dims[1]} matrices, so its rows need {size} "
            f"columns; got shape {matrices.shape}. Flatten each matrix in row-major order."
        )


def _check_measured(operator: Operator, x: LowRank) -> None:
    if x.shape != operator.shape:
        raise ValueError(
            f"this {type(operator).__name__} measures matrices of shape "
            f"{operator.shape}, got one of shape {x.shape}."
        )

# ruff: noqa: D102 - what overrides a method of the base class is documented there
import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._sharding import einsum, matvec
from ..lowrank import LowRank


BLOCK = 1 << 15  # entries that are gathered at a time


class Operator(eqx.Module):
    """A linear map from matrices ``(m, n)`` to measurements, known by its products.

    Nothing of size ``m × n`` is formed that the operator does not hold already. The
    arrays that define it are leaves: pass an operator through ``jit`` as an argument,
    and ``vmap`` over members that share one with ``in_axes=None``.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(m, n)``, the shape of the matrices that it measures."""

    @property
    @abc.abstractmethod
    def T(self) -> "Operator":
        """The operator that gives the same measurements of the transpose."""

    @abc.abstractmethod
    def __call__(self, x: LowRank) -> Float[Array, "..."]:
        """The measurements of a matrix in factors."""

    @abc.abstractmethod
    def adjoint_matmul(
        self, y: Float[Array, "..."], v: Float[Array, "n k"]
    ) -> Float[Array, "m k"]:
        """The product ``A*(y) v`` of the adjoint with a thin matrix."""

    def adjoint(self, y: Float[Array, "..."]) -> Float[Array, "m n"]:
        """The adjoint ``A*(y)`` as a dense matrix."""
        return self.adjoint_matmul(y, jnp.eye(self.shape[1], dtype=y.dtype))


class DenseSensing(Operator):
    """Inner products with dense matrices, ``y_k = ⟨A_k, X⟩``.

    The matrices are stored as the rows of one ``(count, m n)`` array: a ``vmap`` over
    matrices ``X`` that share the operator then lowers to one matrix product, which reads
    the operator once for all of them.

    Attributes:
        rows: ``(count, m n)``, each row a matrix ``A_k`` in row-major order.
        dims: ``(m, n)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> a = lrjax.recovery.DenseSensing(jnp.arange(6.0)[None], (2, 3))
        >>> print(a(lrjax.LowRank(jnp.ones((2, 1)), jnp.ones((3, 1)))))
        [15.]
    """

    rows: Float[Array, "count size"]
    dims: tuple[int, int] = eqx.field(static=True)

    def __check_init__(self):
        _check_columns("DenseSensing", self.rows, math.prod(self.dims), self.dims)

    @property
    def shape(self) -> tuple[int, int]:
        return self.dims

    @property
    def T(self) -> "DenseSensing":
        m, n = self.dims
        rows = self.rows.reshape(-1, m, n).mT.reshape(-1, m * n)
        return DenseSensing(rows, (n, m))

    def __call__(self, x: LowRank) -> Float[Array, " count"]:
        _check_measured(self, x)
        return matvec(self.rows, x.materialize().reshape(-1))

    def adjoint_matmul(self, y, v):
        return self.adjoint(y) @ v

    def adjoint(self, y):
        return einsum("ks,k->s", self.rows, y).reshape(self.dims)


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

    @property
    def T(self) -> "RankOneSensing":
        return RankOneSensing(self.b, self.a)

    def __call__(self, x: LowRank) -> Float[Array, " count"]:
        _check_measured(self, x)
        left = einsum("km,mr->kr", self.a, x.left)
        return jnp.sum(left * einsum("kn,nr->kr", self.b, x.right), axis=-1)

    def adjoint_matmul(self, y, v):
        return einsum("km,kr->mr", self.a, y[:, None] * einsum("kn,nr->kr", self.b, v))


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

    @property
    def T(self) -> "Entries":
        return Entries(self.cols, self.rows, (self.dims[1], self.dims[0]))

    def __call__(self, x: LowRank) -> Float[Array, " count"]:
        _check_measured(self, x)
        return _entries(x.left, x.right, self.rows, self.cols)

    def adjoint_matmul(self, y, v):
        measure = lambda left: _entries(left, v, self.rows, self.cols)
        zeros = jnp.zeros((self.dims[0], v.shape[-1]), v.dtype)
        return jax.linear_transpose(measure, zeros)(y)[0]


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

    @property
    def T(self) -> "Masked":
        return Masked(self.mask.mT)

    def __call__(self, x: LowRank) -> Float[Array, "m n"]:
        _check_measured(self, x)
        return jnp.where(self.mask, x.materialize(), 0)

    def adjoint_matmul(self, y, v):
        return einsum("mn,nk->mk", jnp.where(self.mask, y, 0), v)


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

    @property
    def T(self) -> "Identity":
        return Identity((self.dims[1], self.dims[0]))

    def __call__(self, x: LowRank) -> Float[Array, "m n"]:
        _check_measured(self, x)
        return x.materialize()

    def adjoint_matmul(self, y, v):
        return einsum("mn,nk->mk", y, v)


def _check_columns(owner: str, rows: Array, size: int, dims: tuple[int, int]) -> None:
    if rows.shape[-1] != size:
        raise ValueError(
            f"{owner} measures {dims[0]}x{dims[1]} matrices, so its rows need {size} "
            f"columns; got shape {rows.shape}. Flatten each matrix in row-major order."
        )


def _check_measured(operator: Operator, x: LowRank) -> None:
    if x.shape != operator.shape:
        raise ValueError(
            f"this {type(operator).__name__} measures matrices of shape "
            f"{operator.shape}, got one of shape {x.shape}."
        )

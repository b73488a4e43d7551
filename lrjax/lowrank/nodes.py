from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

from .._sharding import einsum
from ..linalg import cross, identity_like, outer, times
from ._arithmetic import NoSilentArithmetic


def _check_factor(owner: str, name: str, x: Any) -> None:
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise TypeError(
            f"{owner}.{name} must be an array (*batch, size, rank), got {type(x)}."
        )
    if len(x.shape) < 2:
        raise ValueError(
            f"{owner}.{name} must have at least two axes (*batch, size, rank), got "
            f"shape {x.shape}."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{owner}.{name} must be real floating point, got {x.dtype}.")


def _check_pair(owner: str, left: Any, right: Any) -> None:
    _check_factor(owner, "left", left)
    _check_factor(owner, "right", right)
    shapes = f"left has shape {left.shape}, right has shape {right.shape}"
    if left.shape[-1] != right.shape[-1]:
        raise ValueError(
            f"{owner} needs factors of one rank (their last axes): {shapes}. The value "
            "is left @ right.T: a right factor of shape (rank, n) must be transposed."
        )
    if left.shape[:-2] != right.shape[:-2]:
        raise ValueError(f"{owner} needs factors with the same batch axes: {shapes}.")
    if left.dtype != right.dtype:
        raise ValueError(
            f"{owner} needs factors of one dtype: left is {left.dtype}, right is "
            f"{right.dtype}."
        )


def _check_vector(method: str, x: Any, factor: Any) -> None:
    size, most = factor.shape[-2], factor.ndim - 1
    if jnp.ndim(x) > most or jnp.shape(x)[-1:] != (size,):
        raise ValueError(
            f"{method} takes a vector of {size} numbers for each matrix of the node, "
            f"{(*factor.shape[:-2], size)}, got shape {jnp.shape(x)}. The columns of a "
            "matrix are multiplied by x @ columns, its rows by rows @ x.T."
        )


class LowRank(NoSilentArithmetic, eqx.Module):
    """A matrix in factorized form, ``left @ right.T``; or a stack of them.

    A pytree node with two leaves and nothing else: no scale, no ``__call__``, no silent
    conversion to a dense array. ``x @ v`` and ``v @ x`` are taken in factors, of arrays and
    of other nodes; ``+`` and ``*`` say what to call. Copies made by ``jax.tree.map`` may
    hold anything in place of the factors (bools, labels, ``None``); only construction
    checks.

    A LoRA pair of PEFT, ``W (out, in) + s·B A``, is ``left = B``, ``right = Aᵀ``.

    Attributes:
        left: ``(*batch, m, r)``.
        right: ``(*batch, n, r)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.ones((3, 1)), jnp.arange(2.0)[:, None])
        >>> x.shape, x.rank, x.materialize()[0].tolist()
        ((3, 2), 1, [0.0, 1.0])
    """

    left: Float[Array, "*batch m r"]
    right: Float[Array, "*batch n r"]

    def __check_init__(self):
        _check_pair("LowRank", self.left, self.right)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*batch, m, n)``, the shape of the dense value."""
        return (*self.left.shape[:-1], self.right.shape[-2])

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of both factors."""
        return self.left.dtype

    @property
    def rank(self) -> int:
        """The width of the factors: the rank of the value is at most this."""
        return self.left.shape[-1]

    @property
    def T(self) -> "LowRank":
        """The transpose: the factors change places."""
        return LowRank(self.right, self.left)

    def materialize(self) -> Float[Array, "*batch m n"]:
        """The dense matrix ``left @ right.T``."""
        return outer(self.left, self.right)

    def matvec(self, x: Float[Array, "*c n"]) -> Float[Array, "*d m"]:
        """The product with a vector ``(*batch, n)``, in O((m + n) r)."""
        _check_vector("matvec", x, self.right)
        return einsum(
            "...mr,...r->...m", self.left, einsum("...nr,...n->...r", self.right, x)
        )

    def rmatvec(self, y: Float[Array, "*c m"]) -> Float[Array, "*d n"]:
        """The product of the transpose with a vector ``(*batch, m)``."""
        _check_vector("rmatvec", y, self.left)
        return self.T.matvec(y)

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, SVDForm):
            other = other.to_low_rank()
        if jnp.ndim(other) == 1:
            return self.matvec(other)
        if self.shape[-1] != other.shape[-2]:
            raise ValueError(
                f"x @ y needs as many columns as rows, got shapes {self.shape} and "
                f"{other.shape}."
            )
        if not isinstance(other, LowRank):
            return times(self.left, cross(self.right, other))
        between = cross(self.right, other.left)
        if self.rank <= other.rank:
            return LowRank(self.left, outer(other.right, between))
        return LowRank(times(self.left, between), other.right)

    def __rmatmul__(self, other: Any) -> Any:
        if jnp.ndim(other) == 1:
            return self.rmatvec(other)
        return (self.T @ jnp.matrix_transpose(other)).mT


class SVDForm(NoSilentArithmetic, eqx.Module):
    """A matrix ``left @ core @ right.T`` whose outer factors are orthonormal.

    The number of columns in use may be an array, ``rank``: columns from ``rank`` on are
    masked out of the value. So the rank changes under ``jit`` without recompiling, and
    each member of a batch may have its own.

    Attributes:
        left: ``(*batch, m, r)`` with orthonormal columns.
        core: ``(*batch, r, r)``, any matrix.
        right: ``(*batch, n, r)`` with orthonormal columns.
        active: ``(*batch,)`` integers, the columns in use, or ``None`` for all of them.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> eye = jnp.eye(3)
        >>> x = lrjax.SVDForm(eye, jnp.diag(jnp.array([3.0, 2.0, 1.0])), eye, rank=2)
        >>> int(x.rank), jnp.diag(x.materialize()).tolist()
        (2, [3.0, 2.0, 0.0])
    """

    left: Float[Array, "*batch m r"]
    core: Float[Array, "*batch r r"]
    right: Float[Array, "*batch n r"]
    active: Int[Array, "*batch"] | None

    def __init__(self, left, core, right, rank: ArrayLike | None = None):
        _check_pair("SVDForm", left, right)
        square = (*left.shape[:-2], left.shape[-1], left.shape[-1])
        if core.shape != square or core.dtype != left.dtype:
            raise ValueError(
                f"SVDForm needs a core of shape {square} and dtype {left.dtype} between "
                f"factors of shapes {left.shape} and {right.shape}; got {core.shape}, "
                f"{core.dtype}."
            )
        self.left, self.core, self.right = left, core, right
        if rank is None:
            self.active = None
        else:
            if not jnp.issubdtype(jnp.result_type(rank), jnp.integer):
                raise TypeError(
                    f"SVDForm's rank must be an integer, got {jnp.result_type(rank)}."
                )
            rank = jnp.asarray(rank, jnp.int32)
            self.active = jnp.broadcast_to(rank, left.shape[:-2])

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*batch, m, n)``, the shape of the dense value."""
        return (*self.left.shape[:-1], self.right.shape[-2])

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the factors and the core."""
        return self.left.dtype

    @property
    def rank(self) -> int | Int[Array, "*batch"]:
        """The columns in use: an array if the rank was given, else the width."""
        return self.left.shape[-1] if self.active is None else self.active

    @property
    def T(self) -> "SVDForm":
        """The transpose."""
        return SVDForm(self.right, self.core.mT, self.left, self.active)

    def masked_core(self) -> Float[Array, "*batch r r"]:
        """The core with the rows and columns that are not in use set to zero."""
        return self.mask_columns(self.mask_columns(self.core).mT).mT

    def mask_columns(self, x: Float[Array, "*batch k r"]) -> Float[Array, "*batch k r"]:
        """The same columns, those that are not in use set to zero."""
        if self.active is None:
            return x
        active = self.active[..., None]
        column = lax.broadcasted_iota(
            jnp.int32, (*active.shape[:-1], x.shape[-1]), active.ndim - 1
        )
        return jnp.where((column < active)[..., None, :], x, 0)

    def materialize(self) -> Float[Array, "*batch m n"]:
        """The dense matrix."""
        return self.to_low_rank().materialize()

    def matvec(self, x: Float[Array, "*c n"]) -> Float[Array, "*d m"]:
        """The product with a vector ``(*batch, n)``."""
        return self.to_low_rank().matvec(x)

    def rmatvec(self, y: Float[Array, "*c m"]) -> Float[Array, "*d n"]:
        """The product of the transpose with a vector ``(*batch, m)``."""
        return self.to_low_rank().rmatvec(y)

    def __matmul__(self, other: Any) -> Any:
        return self.to_low_rank() @ other

    def __rmatmul__(self, other: Any) -> Any:
        return other @ self.to_low_rank()

    def to_low_rank(self) -> LowRank:
        """The same value as ``LowRank(left @ core, right)``."""
        return LowRank(times(self.left, self.masked_core()), self.right)


# What the algebra takes for a matrix.
Matrix = LowRank | SVDForm | Float[Array, "*batch m n"]


def factors_of(function: str, x: Any) -> LowRank:
    """Any matrix as a product of two factors: a dense one is itself times the identity.

    Raises:
        TypeError: for what is no matrix of floating-point numbers.
    """
    if isinstance(x, LowRank):
        return x
    if isinstance(x, SVDForm):
        return x.to_low_rank()
    if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) and x.ndim >= 2:
        x = jnp.asarray(x)
        # The identity on the shorter side, so that the width is the largest possible rank.
        if x.shape[-2] < x.shape[-1]:
            return factors_of(function, x.mT).T
        return LowRank(x, identity_like(jnp.zeros_like(x, shape=_square(x))))
    raise TypeError(
        f"{function} needs a lrjax.LowRank, a lrjax.SVDForm or an array of floating-point "
        f"numbers (*batch, m, n), got {_described(x)}."
    )


def _square(x: Array) -> tuple[int, ...]:
    return (*x.shape[:-2], x.shape[-1], x.shape[-1])


def _described(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype} of shape {tuple(x.shape)}"
    return repr(type(x))


def is_low_rank(x: Any) -> bool:
    """Whether ``x`` is a :class:`LowRank` node; the ``is_leaf`` of every node-level map.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> tree = {"w": lrjax.LowRank(jnp.ones((3, 1)), jnp.ones((2, 1)))}
        >>> len(jax.tree.leaves(tree))
        2
        >>> len(jax.tree.leaves(tree, is_leaf=lrjax.is_low_rank))
        1
    """
    return isinstance(x, LowRank)


def is_svd_form(x: Any) -> bool:
    """Whether ``x`` is an :class:`SVDForm` node, as :func:`is_low_rank`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> eye = jnp.eye(2)
        >>> tree = {"w": lrjax.SVDForm(eye, eye, eye)}
        >>> len(jax.tree.leaves(tree, is_leaf=lrjax.lowrank.is_svd_form))
        1
    """
    return isinstance(x, SVDForm)

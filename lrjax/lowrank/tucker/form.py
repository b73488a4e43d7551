from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

from ...linalg import cross, eigh, gram, times, working_dtype


class TuckerForm(eqx.Module):
    """A tensor as a small core times a matrix on each axis: a Tucker form.

    ``x[i, j, …] = Σ core[a, b, …] factors[0][i, a] factors[1][j, b] …``. With two axes it
    is a matrix ``factors[0] @ core @ factors[1].T``.

    The number of columns in use of each factor may be an array, ``ranks``: those from
    there on are masked out of the value, as in a :class:`lrjax.SVDForm`.

    Attributes:
        core: ``(*batch, r_1, …, r_d)``.
        factors: d matrices ``(*batch, n_k, r_k)``.
        active: ``(*batch, d)`` integers, the columns in use, or ``None`` for all of them.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrjax.lowrank import TuckerForm
        >>> ones = [jnp.ones((n, 1)) for n in (2, 3, 4)]
        >>> x = TuckerForm(jnp.full((1, 1, 1), 5.0), ones)
        >>> x.shape, x.ranks, float(x.materialize().sum())
        ((2, 3, 4), (1, 1, 1), 120.0)

    Reference:
        L. De Lathauwer, B. De Moor, J. Vandewalle, "A multilinear singular value
        decomposition" (2000), SIAM Journal on Matrix Analysis and Applications.
    """

    core: Float[Array, "*batch_and_ranks"]
    factors: tuple[Float[Array, "*batch _n _r"], ...]
    active: Int[Array, "*batch d"] | None

    def __init__(
        self, core: Any, factors: Any, ranks: ArrayLike | Sequence[ArrayLike] | None = None
    ):
        self.core, self.factors = core, tuple(factors)
        batch = core.shape[: core.ndim - len(self.factors)]
        wanted = tuple(f.shape[-1] for f in self.factors)
        fits = core.shape == (*batch, *wanted)
        if not fits or any(f.shape[:-2] != batch for f in self.factors):
            raise ValueError(
                "TuckerForm needs a core (*batch, r_1, …, r_d) and d factors (*batch, n_k, "
                f"r_k); got a core {core.shape} and factors "
                f"{[f.shape for f in self.factors]}."
            )
        self.active = None
        if ranks is not None:
            ranks = jnp.asarray(ranks)
            if not jnp.issubdtype(ranks.dtype, jnp.integer):
                raise TypeError(f"TuckerForm's ranks must be integers, got {ranks.dtype}.")
            ranks = ranks.astype(jnp.int32)
            self.active = jnp.broadcast_to(ranks, (*batch, len(wanted)))

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*batch, n_1, …, n_d)``, the shape of the dense value."""
        batch = self.core.shape[: self.core.ndim - len(self.factors)]
        return (*batch, *(f.shape[-2] for f in self.factors))

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the core and the factors."""
        return self.core.dtype

    @property
    def widths(self) -> tuple[int, ...]:
        """The columns of the factors: the rank of each unfolding is at most its own."""
        return tuple(f.shape[-1] for f in self.factors)

    @property
    def ranks(self) -> tuple[int, ...] | Int[Array, "*batch d"]:
        """The columns in use: an array if the ranks were given, else the widths."""
        return self.widths if self.active is None else self.active

    def masked_core(self) -> Float[Array, "*batch_and_ranks"]:
        """The core with zeros wherever a column is not in use."""
        core = self.core
        if self.active is None:
            return core
        for axis in range(len(self.factors)):
            place = core.ndim - len(self.factors) + axis
            index = lax.broadcasted_iota(jnp.int32, core.shape, place)
            rank = self.active[(..., axis, *[None] * len(self.factors))]
            core = jnp.where(index < rank, core, 0)
        return core

    def materialize(self) -> Float[Array, "*shape"]:
        """The dense tensor."""
        return multiply_axes(self.masked_core(), self.factors)


def multiply_axes(
    x: Float[Array, "*s"], matrices: tuple[Float[Array, "*b _p _q"], ...]
) -> Float[Array, "*t"]:
    """The last d axes of a tensor multiplied by d matrices, each from the left.

    Args:
        x: ``(*batch, q_1, …, q_d)``.
        matrices: d of shape ``(*batch, p_k, q_k)``.

    Returns:
        ``(*batch, p_1, …, p_d)``.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrjax.lowrank import multiply_axes
        >>> x = jnp.arange(6.0).reshape(2, 3)
        >>> print(multiply_axes(x, (jnp.ones((1, 2)), jnp.eye(3))))
        [[3. 5. 7.]]
    """
    lead = x.ndim - len(matrices)
    for matrix in matrices:
        # The first of the axes goes to the end: after d turns all are in order again.
        x = jnp.moveaxis(x, lead, -1)
        rows = x.reshape(*x.shape[:lead], -1, x.shape[-1])
        x = times(rows, matrix.mT).reshape(*x.shape[:-1], matrix.shape[-2])
    return x


def unfold(x: Float[Array, "*s"], axis: int) -> Float[Array, "n rest"]:
    """A tensor as a matrix: one axis as rows, all others as columns.

    Args:
        x: a tensor.
        axis: the axis that makes the rows.

    Returns:
        ``(n, size / n)``.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrjax.lowrank import unfold
        >>> unfold(jnp.zeros((2, 3, 4)), 1).shape
        (3, 8)
    """
    return jnp.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)


def unfolded_svd(
    x: Float[Array, "*s"],
) -> tuple[tuple[Float[Array, " _n"], ...], tuple[Float[Array, "_n _n"], ...]]:
    """Singular values and left singular vectors of every unfolding of a tensor.

    By the eigenvalues of the Gram matrices ``(n_k, n_k)``: values below about
    ``sqrt(eps)`` of the largest are not resolved.

    Args:
        x: a tensor ``(n_1, …, n_d)``.

    Returns:
        For each axis the values, descending, and the vectors as columns.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrjax.lowrank import unfolded_svd
        >>> values, vectors = unfolded_svd(jnp.ones((2, 3, 4)))
        >>> [float(v[0].round(3)) for v in values], vectors[2].shape
        ([4.899, 4.899, 4.899], (4, 4))
    """
    values, vectors = [], []
    for axis in range(x.ndim):
        squares, turn = eigh(gram(unfold(x, axis).T))
        values.append(jnp.sqrt(jnp.maximum(squares[::-1], 0)))
        vectors.append(turn[:, ::-1])
    return tuple(values), tuple(vectors)


def higher_order_svd(x: Float[Array, "*s"], ranks: tuple[int, ...]) -> TuckerForm:
    """The truncated higher-order SVD: each axis projected on its leading vectors.

    The factors are the leading left singular vectors of the unfoldings, the core is what
    they leave of the tensor. Its error is at most ``sqrt(d)`` times the least one of a
    Tucker form with these ranks.

    Args:
        x: a tensor ``(n_1, …, n_d)``.
        ranks: d widths, ``1 <= r_k <= n_k``.

    Returns:
        A :class:`TuckerForm` with orthonormal factors.

    Raises:
        ValueError: for a wrong number of ranks, or one out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrjax.lowrank import higher_order_svd
        >>> x = jnp.arange(24.0).reshape(2, 3, 4)
        >>> bool(jnp.allclose(higher_order_svd(x, (2, 2, 2)).materialize(), x, atol=1e-4))
        True

    Reference:
        L. De Lathauwer, B. De Moor, J. Vandewalle, "A multilinear singular value
        decomposition" (2000), SIAM Journal on Matrix Analysis and Applications.
    """
    fits = len(ranks) == x.ndim
    if not fits or any(not 1 <= r <= n for r, n in zip(ranks, x.shape, strict=True)):
        raise ValueError(
            f"higher_order_svd needs a rank between 1 and n for each axis n of {x.shape}, "
            f"got {ranks}."
        )
    dense = lax.stop_gradient(x).astype(working_dtype(x.dtype))
    _, vectors = unfolded_svd(dense)
    bases = tuple(v[:, :r] for v, r in zip(vectors, ranks, strict=True))
    core = multiply_axes(dense, tuple(b.T for b in bases))
    return TuckerForm(core.astype(x.dtype), tuple(b.astype(x.dtype) for b in bases))


def tucker_inner(x: TuckerForm, y: TuckerForm) -> Float[Array, "*batch"]:
    """The inner product of two tensors in Tucker form, on their cores alone.

    Args:
        x: ``(*batch, n_1, …, n_d)``.
        y: the same shape, of any ranks.

    Returns:
        ``(*batch,)``; the squared norm, if both are the same.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrjax.lowrank import TuckerForm, tucker_inner
        >>> x = TuckerForm(jnp.ones((1, 1)), (jnp.ones((2, 1)), jnp.ones((3, 1))))
        >>> float(tucker_inner(x, x))
        6.0
    """
    if x.shape != y.shape:
        raise ValueError(
            f"tucker_inner needs two tensors of one shape, got {x.shape} and {y.shape}."
        )
    between = tuple(cross(a, b) for a, b in zip(x.factors, y.factors, strict=True))
    moved = multiply_axes(y.masked_core(), between)
    axes = tuple(range(-len(x.factors), 0))
    return jnp.sum(x.masked_core() * moved, axis=axes)


def over_batch(f: Callable, batch_ndim: int) -> Callable:
    """A function of single forms, over their batch axes."""
    for _ in range(batch_ndim):
        f = jax.vmap(f)
    return f

"""A matrix in wider bases, in which it can move: augment, lift, add, and carry moments."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from ..linalg import cross, extend_basis, nonzero, outer, times
from .nodes import SVDForm
from .tucker import multiply_axes


def augment(
    x: SVDForm,
    left_directions: Float[Array, "*batch m k"],
    right_directions: Float[Array, "*batch n l"],
    *,
    used: ArrayLike | None = None,
    width: int | None = None,
    method: Literal["qr", "cholesky"] = "qr",
) -> SVDForm:
    """The same matrix in wider bases, which also span given directions.

    The columns of ``left`` stay as they are, and behind them comes an orthonormal basis of
    what the directions have in their complement, signs fixed
    (:func:`lrjax.linalg.extend_basis`); the core is ``(L̂ᵀ left) core (R̂ᵀ right)ᵀ``. Columns
    in use are packed to the front. A gradient step of the wider core, and a
    :func:`truncate`, is what every integrator of the dynamical low-rank family does.

    Args:
        x: ``(*batch, m, n)`` of width ``r``; columns that are not in use count for nothing.
        left_directions: columns of any scale, also dependent or zero.
        right_directions: as many.
        used: how many of the directions are in use, ``(*batch,)``; None for all.
        width: of the result, ``r + k`` by default. Directions that have no room are left
            out, the last ones first.
        method: how the bases are found, see :func:`lrjax.linalg.orthonormalize`.

    Returns:
        An :class:`SVDForm` of the same value; where ``x`` or the directions have columns
        that are not in use, so has the result. A basis wider than its side is padded with
        zero columns.

    Raises:
        ValueError: if the two sides have other numbers of directions, or the width is not
            between 1 and ``r + k``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> eye = jnp.eye(4)
        >>> x = lrjax.SVDForm(eye[:, :1], jnp.full((1, 1), 3.0), eye[:, 1:2])
        >>> y = lrjax.lowrank.augment(x, eye[:, 2:3], eye[:, 2:3])
        >>> print(y.core)
        [[3. 0.]
         [0. 0.]]
        >>> print(y.left.T + 0.0)
        [[1. 0. 0. 0.]
         [0. 0. 1. 0.]]

    Reference:
        G. Ceruti, J. Kusch, C. Lubich, "A rank-adaptive robust integrator for dynamical
        low-rank approximation" (2022), arXiv 2104.05247.
    """
    r, k = x.left.shape[-1], left_directions.shape[-1]
    if k != right_directions.shape[-1]:
        raise ValueError(
            f"augment needs as many directions on both sides, got {left_directions.shape} "
            f"and {right_directions.shape}."
        )
    width = r + k if width is None else width
    if not 1 <= width <= r + k:
        raise ValueError(
            f"augment needs a width between 1 and {r + k}, the {r} columns of x and {k} "
            f"directions, got {width}."
        )
    masked = x.active is not None or used is not None
    batch = x.left.shape[:-2]
    active = jnp.broadcast_to(jnp.asarray(x.rank, jnp.int32), batch)
    used = jnp.broadcast_to(jnp.asarray(k if used is None else used, jnp.int32), batch)
    counts = {"active": active, "used": used} if masked else {}
    pad = lambda basis: jnp.pad(
        basis, [(0, 0)] * (basis.ndim - 1) + [(0, width - basis.shape[-1])]
    )
    left, right = (
        pad(extend_basis(columns, directions, width=width, method=method, **counts))
        for columns, directions in ((x.left, left_directions), (x.right, right_directions))
    )
    rank = jnp.minimum(active + used, width) if masked else None
    return lift(x, left, right, rank=rank)


def lift(
    x: SVDForm,
    left: Float[Array, "*batch m s"],
    right: Float[Array, "*batch n s"],
    *,
    rank: ArrayLike | None = None,
) -> SVDForm:
    """A matrix in other bases: its projection on them, the matrix itself if they span it.

    ``core ← (left_newᵀ left) core (right_newᵀ right)ᵀ``.

    Args:
        x: ``(*batch, m, n)``.
        left: orthonormal columns.
        right: as many orthonormal columns.
        rank: how many of them are in use, ``(*batch,)``; None for all.

    Returns:
        An :class:`SVDForm` with these bases.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> eye = jnp.eye(3)
        >>> x = lrjax.SVDForm(eye[:, :1], jnp.full((1, 1), 5.0), eye[:, :1])
        >>> print(lrjax.lowrank.lift(x, eye[:, ::-1], eye).core)
        [[0. 0. 0.]
         [0. 0. 0.]
         [5. 0. 0.]]
    """
    inside = lambda new, old: cross(new, old.astype(new.dtype))
    core = times(inside(left, x.left), x.masked_core().astype(left.dtype))
    core = outer(core, inside(right, x.right))
    return SVDForm(left, core, right, rank)


def brand_update(
    x: SVDForm,
    left: Float[Array, "*batch m k"],
    right: Float[Array, "*batch n k"],
) -> SVDForm:
    """Add a product of two factors to a matrix in factors, exactly.

    ``x + left rightᵀ`` in the bases ``[x.left | left]`` and ``[x.right | right]``, in
    ``O((m + n) (r + k)²)``. With a :func:`truncate` this is the incremental singular value
    decomposition: new rows, columns and corrections are all products of few factors.

    Args:
        x: ``(*batch, m, n)`` of width ``r``.
        left: any columns.
        right: as many.

    Returns:
        An :class:`SVDForm` of width ``r + k``.

    Raises:
        ValueError: if the numbers of columns differ.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> eye = jnp.eye(3)
        >>> x = lrjax.SVDForm(eye[:, :1], jnp.full((1, 1), 3.0), eye[:, :1])
        >>> y = lrjax.lowrank.brand_update(x, 4 * eye[:, 1:2], eye[:, :1])
        >>> print(lrjax.norm(y))
        5.0

    Reference:
        M. Brand, "Fast low-rank modifications of the thin singular value decomposition"
        (2006), Linear Algebra and its Applications; kept up over many updates: H. Deng et
        al., "Fast updating truncated SVD for representation learning with sparse
        matrices" (2024), arXiv 2401.09703.
    """
    wide = augment(x, left, right)
    inside = lambda basis, columns: cross(basis, columns.astype(basis.dtype))
    added = outer(inside(wide.left, left), inside(wide.right, right))
    return SVDForm(wide.left, wide.core + added, wide.right, wide.active)


def transport_core(
    moment: Float[Array, "*batch_and_ranks"],
    *overlaps: Float[Array, "*batch _p _r"],
    squared: bool = False,
) -> Float[Array, "*batch_and_new_ranks"]:
    """A moment of the gradient of a core, when the bases change.

    With the overlaps ``C = left_newᵀ left_old`` and ``D = right_newᵀ right_old`` a first
    moment ``m`` becomes ``C m Dᵀ``: the matrix ``left m rightᵀ``, projected on the new
    bases. A second moment becomes ``C² v (D²)ᵀ`` with the elementwise squares, the
    variance of the new coordinates if the old ones were uncorrelated. The share of a new
    coordinate that lies outside the old bases has no variance yet: it gets the mean ``v̄``
    of those that are not zero, ``+ (1 − c dᵀ) v̄`` with the row sums ``c``, ``d`` of the
    squares. With zeros there, Adam's first steps along new directions would be three times
    too long. The core of a :class:`~lrjax.lowrank.TuckerForm` has as many overlaps as axes.

    Args:
        moment: of the old core.
        *overlaps: ``C`` and ``D``; one for each axis of the core.
        squared: whether it is a moment of squares.

    Returns:
        The moment of the new core.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrjax.lowrank import transport_core
        >>> swap = jnp.array([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
        >>> print(transport_core(jnp.diag(jnp.array([1.0, 2.0])), swap, swap))
        [[2. 0. 0.]
         [0. 1. 0.]
         [0. 0. 0.]]

    Reference:
        S. Schotthöfer, H. L. Yang, S. Schnake, "Dynamical low-rank compression of neural
        networks with robustness under adversarial attacks" (2025), arXiv 2505.08022, for
        the first moment.
    """
    overlaps = tuple(x.astype(moment.dtype) for x in overlaps)
    if not squared:
        return multiply_axes(moment, overlaps)
    overlaps = tuple(x**2 for x in overlaps)
    axes = tuple(range(-len(overlaps), 0))
    sums = lambda x: jnp.sum(x, axis=axes, keepdims=True)
    mean = sums(moment) / nonzero(sums((moment != 0).astype(moment.dtype)))
    inside = tuple(jnp.sum(x, axis=-1, keepdims=True) for x in overlaps)
    known = multiply_axes(jnp.ones_like(mean), inside)
    return multiply_axes(moment, overlaps) + jnp.maximum(1 - known, 0) * mean

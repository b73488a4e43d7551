from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ..._sharding import einsum
from .._numerics import cross, nonzero, rounding, times, working_dtype
from ..decompositions import eigh, svd
from ..orthonormalize import orthonormalize


LEAST = (
    1e-6  # of the largest distance that there is: nearer than this, a weight grows no more
)


class SubspaceAverage(NamedTuple):
    """What :func:`subspace_mean` and :func:`subspace_median` find.

    Attributes:
        basis: orthonormal columns of the average; within a block, those that the
            subspaces agree on most come first.
        agreement: ``yᵀ P_i y / Σ_j a_j`` of each column ``y`` of block ``i``, in [0, 1]:
            one where all subspaces hold it.
        distances: of the average to each subspace.
        cost: what was minimized.
        residual: of the condition of first order, relative; zero at a minimum.
        steps: how many were taken.
        converged: whether the residual came below the tolerance, in these steps, on finite
            numbers.
    """

    basis: Float[Array, "n k"]
    agreement: Float[Array, " k"]
    distances: Float[Array, " p"]
    cost: Float[Array, ""]
    residual: Float[Array, ""]
    steps: Int[Array, ""]
    converged: Bool[Array, ""]


def subspace_mean(
    bases: Float[Array, "p n k"],
    weights: Float[Array, " q"] | None = None,
    *,
    blocks: Sequence[int] | None = None,
    tol: ArrayLike | None = None,
    max_steps: int | Int[Array, ""] = 1000,
) -> SubspaceAverage:
    """The mean of subspaces, or of flags, in the chordal distance.

        argmin_Y Σ_j a_j d²(X_j, Y),   d²(X, Y) = Σ_i (w_i − ‖X_iᵀ Y_i‖²_F)

    over orthonormal ``Y (n, k)``. With one block it is the mean of the Grassmann manifold:
    the leading eigenvectors of ``Σ_j a_j X_j X_jᵀ``. With several, ``X_j = [X_j1, X_j2,
    …]`` of widths ``w_i``, it is that of the flag manifold: nested subspaces, the first
    block within the first two and so on. The iteration

        Y ← U Vᵀ  of  [P_1 Y_1, P_2 Y_2, …] = U Σ Vᵀ,   P_i = Σ_j a_j X_ji X_jiᵀ

    never raises the cost, as that is concave in Y. It needs neither a Hessian nor ``P_i (n,
    n)``, and no more rows than all subspaces have columns. It starts at the leading
    eigenvectors of all blocks together, turned to suit the blocks. Of flags the cost may
    have several minima: what is found is one.

    Args:
        bases: a basis of each subspace; columns need not be orthonormal. Of flags, the
            columns of the first block first.
        weights: ``a_j``, not negative; ones by default.
        blocks: the widths ``w_i``, which add up to ``k``; one of all columns by default.
        tol: of the residual, relative; by default what rounding leaves of it.
        max_steps: of the iteration. Look at ``converged`` to see whether they sufficed.

    Returns:
        A :class:`SubspaceAverage`.

    Raises:
        ValueError: for blocks that do not add up to ``k``, another number of weights, or no
            subspaces at all.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> angles = jnp.array([0.1, 0.2, 0.3])
        >>> lines = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)[..., None]
        >>> mean = lrjax.linalg.subspace_mean(lines)
        >>> print(abs(jnp.arctan(mean.basis[1] / mean.basis[0])).round(4), mean.converged)
        [0.2] True

    Reference:
        N. Mankovich, T. Birdal, "Chordal averaging on flag manifolds and its applications"
        (2023), arXiv 2303.13501.
    """
    x, widths, weights = _checked("subspace_mean", bases, weights, blocks)

    def rule(squares: Array) -> tuple[Array, Array]:
        return weights, jnp.sum(weights * squares)

    return _average(x, widths, rule, tol, max_steps)


def subspace_median(
    bases: Float[Array, "p n k"],
    weights: Float[Array, " q"] | None = None,
    *,
    blocks: Sequence[int] | None = None,
    tol: ArrayLike | None = None,
    max_steps: int | Int[Array, ""] = 1000,
) -> SubspaceAverage:
    """The median of subspaces, or of flags: less than half of them may be anything.

        argmin_Y Σ_j a_j d(X_j, Y)

    with the distance of :func:`subspace_mean`, by its iteration with the weights
    ``a_j / d(X_j, Y)``, new ones in every step. The cost never rises. Distances below
    ``10⁻⁶ √k`` count as if squared, so that the median may be one of the subspaces.

    Args:
        bases: as :func:`subspace_mean`.
        weights: ``a_j``; ones by default.
        blocks: as :func:`subspace_mean`.
        tol: as :func:`subspace_mean`.
        max_steps: as :func:`subspace_mean`.

    Returns:
        A :class:`SubspaceAverage`.

    Raises:
        ValueError: as :func:`subspace_mean`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> angles = jnp.array([0.1, 0.2, 0.3, 1.5])
        >>> lines = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)[..., None]
        >>> angle = lambda found: abs(jnp.arctan(found.basis[1, 0] / found.basis[0, 0]))
        >>> for average in (lrjax.linalg.subspace_mean, lrjax.linalg.subspace_median):
        ...     print(f"{angle(average(lines)):.2f}")
        0.32
        0.20

    Reference:
        N. Mankovich, T. Birdal, "Chordal averaging on flag manifolds and its applications"
        (2023), arXiv 2303.13501.
    """
    x, widths, weights = _checked("subspace_median", bases, weights, blocks)
    floor = LEAST * sum(widths) ** 0.5

    def rule(squares: Array) -> tuple[Array, Array]:
        # A square root below which the parabola that touches it there goes on.
        near = squares < floor**2
        root = jnp.sqrt(jnp.where(near, floor**2, squares))
        cost = jnp.where(near, (squares / floor + floor) / 2, root)
        return weights / root, jnp.sum(weights * cost)

    return _average(x, widths, rule, tol, max_steps)


def _checked(
    owner: str,
    bases: Array,
    weights: Array | None,
    blocks: Sequence[int] | None,
) -> tuple[Float[Array, "p n k"], tuple[int, ...], Float[Array, " p"]]:
    p, n, k = bases.shape
    if not p:
        raise ValueError(
            f"{owner} needs at least one subspace, got bases of shape {(p, n, k)}."
        )
    if not 1 <= k <= n:
        raise ValueError(
            f"{owner} needs bases (p, n, k) with 1 <= k <= n, a column for each dimension "
            f"of a subspace; got shape {(p, n, k)}."
        )
    widths = (k,) if blocks is None else tuple(blocks)
    if sum(widths) != k or min(widths) < 1:
        raise ValueError(
            f"{owner} needs blocks of at least one column each that add up to the {k} "
            f"columns of a basis, got {widths}."
        )
    dtype = working_dtype(bases.dtype)
    weights = jnp.ones(p, dtype) if weights is None else jnp.asarray(weights, dtype)
    if weights.shape != (p,):
        raise ValueError(
            f"{owner} needs one weight for each of {p} subspaces, got weights of shape "
            f"{weights.shape}."
        )
    return orthonormalize(bases.astype(dtype)), widths, weights


class _Blocks(NamedTuple):
    """The columns of flags by block: products with the projectors on each of them."""

    x: Float[Array, "p n k"]
    widths: tuple[int, ...]

    def cut(self, y: Array) -> list[Array]:
        """The blocks of columns."""
        ends = [sum(self.widths[: i + 1]) for i in range(len(self.widths) - 1)]
        return jnp.split(y, ends, axis=-1)

    def inside(self, y: Array) -> list[Array]:
        """``X_jiᵀ Y_i``, of all subspaces, by block."""
        pairs = zip(self.cut(self.x), self.cut(y), strict=True)
        return [einsum("pnk,nl->pkl", x, y) for x, y in pairs]

    def image(self, inside: list[Array], weights: Array) -> Array:
        """``[P_1 Y_1, P_2 Y_2, …]``."""
        pairs = zip(self.cut(self.x), inside, strict=True)
        return jnp.concatenate(
            [einsum("p,pnk,pkl->nl", weights, x, c) for x, c in pairs], axis=-1
        )

    def squares(self, y: Array, inside: list[Array]) -> Float[Array, " p"]:
        """The squared distances, by what is left outside: right also where it is small."""
        left = [
            jnp.sum((y_i[None] - einsum("pnk,pkl->pnl", x_i, c)) ** 2, axis=(1, 2))
            for x_i, y_i, c in zip(self.cut(self.x), self.cut(y), inside, strict=True)
        ]
        return sum(left[1:], left[0])

    def aligned(self, y: Array, image: Array) -> tuple[Array, Array]:
        """Each block turned to eigenvectors of ``Y_iᵀ P_i Y_i``, and the eigenvalues."""
        values, turned = [], []
        for y_i, image_i in zip(self.cut(y), self.cut(image), strict=True):
            form = cross(y_i, image_i)
            value, vectors = eigh((form + form.mT) / 2)
            values.append(value[::-1])
            turned.append(times(y_i, vectors[:, ::-1]))
        return jnp.concatenate(turned, axis=-1), jnp.concatenate(values)


def _start(flags: _Blocks, weights: Array) -> Float[Array, "n k"]:
    """The leading directions of all columns together, and of those the best for each block.

    Block after block takes the leading eigenvectors of its own form in what is left.
    """
    _, n, k = flags.x.shape
    root = jnp.sqrt(weights)[:, None, None]
    left = svd(jnp.moveaxis(root * flags.x, 0, 1).reshape(n, -1))[0][:, :k]
    found = []
    for x, width in zip(flags.cut(flags.x), flags.widths, strict=True):
        inside = einsum("pnk,nl->pkl", x, left)
        form = einsum("p,pkl,pkm->lm", weights, inside, inside)
        vectors = times(left, eigh(form)[1][:, ::-1])
        found.append(vectors[:, :width])
        left = vectors[:, width:]
    return jnp.concatenate(found, axis=-1)


class _State(NamedTuple):
    y: Float[Array, "n k"]
    residual: Float[Array, ""]
    steps: Int[Array, ""]


Rule = Callable[[Array], tuple[Array, Array]]  # of squared distances: weights, cost


def _average(
    x: Array,
    widths: tuple[int, ...],
    rule: Rule,
    tol: ArrayLike | None,
    max_steps: int | Int[Array, ""],
) -> SubspaceAverage:
    p, n, k = x.shape
    # No average leaves the sum of all subspaces: work in coordinates of it.
    frame = None
    if p * k < n:
        frame = orthonormalize(jnp.moveaxis(x, 0, 1).reshape(n, p * k))
        x = einsum("nq,pnk->pqk", frame, x)
    flags = _Blocks(x, widths)
    tol = rounding(x.dtype, n) if tol is None else tol

    def image_of(y: Array) -> tuple[Array, Array, Array]:
        inside = flags.inside(y)
        squares = flags.squares(y, inside)
        weights, cost = rule(squares)
        return flags.image(inside, weights), squares, cost

    def residual_of(y: Array, image: Array) -> Array:
        """``‖F − Y sym(Yᵀ F)‖ / ‖F‖``, the Riemannian gradient on the Stiefel manifold."""
        form = cross(y, image)
        gap = image - times(y, (form + form.mT) / 2)
        return jnp.sqrt(jnp.sum(gap**2) / nonzero(jnp.sum(image**2)))

    def step(state: _State) -> _State:
        image, _, _ = image_of(state.y)
        u, _, vt = svd(image)
        y = times(u, vt)
        return _State(y, residual_of(y, image_of(y)[0]), state.steps + 1)

    def goes_on(state: _State) -> Array:
        return (state.residual > tol) & (state.steps < max_steps)

    y = _start(flags, rule(jnp.ones(p, x.dtype))[0])
    state = _State(y, residual_of(y, image_of(y)[0]), jnp.zeros([], jnp.int32))
    y, residual, steps = lax.while_loop(goes_on, step, state)
    image, squares, cost = image_of(y)
    y, values = flags.aligned(y, image)
    weights = rule(squares)[0]
    finite = jnp.isfinite(cost) & jnp.all(jnp.isfinite(y))
    return SubspaceAverage(
        basis=y if frame is None else times(frame, y),
        agreement=values / nonzero(jnp.sum(weights)),
        distances=jnp.sqrt(squares),
        cost=cost,
        residual=residual,
        steps=steps,
        converged=(residual <= tol) & finite,
    )

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from ..._sharding import einsum
from ...linalg import orthonormalize
from ...lowrank import LowRank
from ..thresholds import hard_threshold
from .alternation import (
    Observer,
    Rule,
    Separation,
    alternate,
    check_rank,
    leading_factors,
    observed,
)


class ProjectionState(NamedTuple):
    """What :func:`alternating_projections` keeps between steps.

    Attributes:
        left: ``(m, r)``, the left singular vectors of the low-rank part.
        level: the level of the hard threshold.
        count: the steps taken.
    """

    left: Float[Array, "m r"]
    level: Float[Array, ""]
    count: Int[Array, ""]


def alternating_projections(
    matrix: Real[Array, "..."],
    rank: int,
    *,
    mask: Bool[Array, "..."] | None = None,
    level: ArrayLike | None = None,
    first_level: ArrayLike | None = None,
    decay: ArrayLike = 0.7,
    incoherence: ArrayLike | None = None,
    steps: int = 100,
    tol: ArrayLike | None = 1e-6,
    observe: Observer | None = None,
) -> Separation:
    """Robust PCA by projections on the tangent space of the low-rank matrices.

    With ``L = U Σ Vᵀ`` of rank r, its tangent space T and the hard threshold H at ζ::

        S ← H(matrix − L; ζ),          Z = matrix − S
        L ← best rank-r approximation of P_T(Z)
        ζ ← β (σ_{r+1}(P_T(Z)) + decayᵗ · σ_1(P_T(Z)))

    ``P_T(Z)`` has rank 2r: its singular values are those of a ``2r × 2r`` core, so that
    no step decomposes a matrix of the size of the data. Missing entries of Z are filled
    from L.

    Pure: jit it with ``rank`` and ``steps`` static; ``vmap`` it over matrices and over
    the other numbers.

    Args:
        matrix: real ``(m, n)``; entries that are not finite count as missing.
        rank: of the low-rank part.
        mask: true where an entry is observed.
        level: ``β``, by default ``1 / (2 (mn)^¼)``.
        first_level: β of the first threshold, of the matrix itself; by default ``4β``.
        decay: how fast the threshold falls toward the noise; nearer one is safer.
        incoherence: if given, μ: singular vectors are trimmed to rows no longer than
            ``√(μ r / m)``, or ``√(μ r / n)`` on the right, before every projection.
        steps: at most as many.
        tol: stop at this relative residual; ``None`` takes all steps.
        observe: called with the low-rank part in every step.

    Returns:
        A :class:`Separation`; ``right`` of its low-rank part has orthonormal columns,
        its ``state`` is a :class:`ProjectionState`.

    Raises:
        ValueError: for a matrix without entries or axes, a mask of another shape, a
            rank out of range or above half of the shorter side, or ``steps < 1``.

    Example:
        >>> import jax
        >>> from lrjax import recovery
        >>> problem = recovery.robust_pca(jax.random.key(0), (80, 60), 2, 0.1)
        >>> fit = recovery.alternating_projections(problem.targets, 2)
        >>> bool(problem.relative_error(fit.low_rank) < 1e-4)
        True

    Reference:
        H. Cai, J.-F. Cai, K. Wei, "Accelerated alternating projections for robust
        principal component analysis" (2019), arXiv 1711.05519.
    """
    data = observed("alternating_projections", matrix, mask)
    m, n = data.matrix.shape
    check_rank("alternating_projections", rank, (m, n))
    if 2 * rank > min(m, n):
        raise ValueError(
            f"alternating_projections needs 2 · rank <= min(m, n) = {min(m, n)}, the "
            f"rank of a tangent vector; got rank {rank}."
        )
    dtype = data.matrix.dtype
    beta = jnp.asarray(0.5 / (m * n) ** 0.25 if level is None else level, dtype)
    first = 4 * beta if first_level is None else jnp.asarray(first_level, dtype)
    decay = jnp.asarray(decay, dtype)

    def low_rank(x: LowRank, error: Array, state: ProjectionState):
        form = _Singular(state.left, _column_norms(x.left), x.right)
        if incoherence is not None:
            error, form = _trimmed(error, x, form, jnp.asarray(incoherence, dtype))
        form, values = _tangent_step(form, error)
        count = state.count + 1
        zeta = beta * (values[rank] + decay**count * values[0])
        return form.low_rank(), ProjectionState(form.left, zeta, count)

    rule = Rule(
        sparse=lambda rest, state: hard_threshold(rest, state.level), low_rank=low_rank
    )
    start = _start(data.matrix, rank, first)
    state = ProjectionState(start.left, beta * start.values[0], jnp.zeros((), jnp.int32))
    return alternate(
        data, start.low_rank(), state, rule, steps=steps, tol=tol, observe=observe
    )


class _Singular(NamedTuple):
    left: Array
    values: Array
    right: Array

    def low_rank(self) -> LowRank:
        return LowRank(self.left * self.values[None, :], self.right)


def _start(matrix: Array, rank: int, first_level: ArrayLike) -> _Singular:
    largest = _decompose(leading_factors(matrix, 1)).values[0]
    trimmed = matrix - hard_threshold(matrix, first_level * largest)
    return _decompose(leading_factors(trimmed, rank))


def _decompose(x: LowRank) -> _Singular:
    """Singular triplets in matrix products with the tall factors."""
    left, right = _basis(x.left), _basis(x.right)
    core = einsum("mr,ms,nt,ns->rt", left, x.left, right, x.right)
    return _rotated(left, core, right, x.rank)[0]


def _tangent_step(form: _Singular, error: Array) -> tuple[_Singular, Array]:
    """The best rank-r approximation of ``L + P_T(error)``, and all 2r singular values.

    In the bases ``[U Q₂]`` and ``[V Q₁]`` of the ranges of error·V and errorᵀ·U joined
    to U and V, ``L + P_T(error)`` is ``[[Σ + Uᵀ error V, R₁ᵀ], [R₂, 0]]``.
    """
    rank = form.values.shape[0]
    image = einsum("mn,nr->mr", error, form.right)
    image_rows = einsum("mn,mr->nr", error, form.left)
    inner = einsum("mr,ms->rs", form.left, image)
    # Scaled to the size of the bases, where they cannot be lost against them.
    left = _basis(jnp.concatenate([form.left, _unit(image)], axis=1))
    right = _basis(jnp.concatenate([form.right, _unit(image_rows)], axis=1))
    below = einsum("mr,ms->rs", left[:, rank:], image)
    beside = einsum("nr,ns->rs", right[:, rank:], image_rows)
    top = jnp.concatenate([jnp.diag(form.values) + inner, beside.T], axis=1)
    bottom = jnp.concatenate([below, jnp.zeros_like(below)], axis=1)
    core = jnp.concatenate([top, bottom], axis=0)
    return _rotated(left, core, right, rank)


def _rotated(left, core, right, rank: int) -> tuple[_Singular, Array]:
    """The leading singular triplets of ``left @ core @ right.T``."""
    u, values, vt = jnp.linalg.svd(core)
    leading = _Singular(
        einsum("mk,kr->mr", left, u[:, :rank]),
        values[:rank],
        einsum("nk,rk->nr", right, vt[:rank]),
    )
    return leading, values


def _trimmed(
    error: Array, x: LowRank, form: _Singular, incoherence: ArrayLike
) -> tuple[Array, _Singular]:
    """Cap the rows of the singular vectors; the error is that of the trimmed matrix."""
    left = _cap_rows(form.left, incoherence) * form.values[None, :]
    capped = LowRank(left, _cap_rows(form.right, incoherence))
    error = error + x.materialize() - capped.materialize()
    return error, _decompose(capped)


def _cap_rows(x: Array, incoherence: ArrayLike) -> Array:
    limit = jnp.sqrt(incoherence * x.shape[1] / x.shape[0])
    length = jnp.sqrt(jnp.sum(x * x, axis=1, keepdims=True))
    return x * jnp.minimum(1, limit / jnp.where(length > 0, length, 1))


def _basis(x: Array) -> Array:
    return orthonormalize(x, method="cholesky")


def _unit(x: Array) -> Array:
    """Columns of length one; zero stays zero."""
    length = _column_norms(x)[None, :]
    return x / jnp.where(length > 0, length, 1)


def _column_norms(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(x * x, axis=0))

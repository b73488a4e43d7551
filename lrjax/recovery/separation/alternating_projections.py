from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from ...linalg import (
    TruncatedSVD,
    cross,
    hard_threshold,
    nonzero,
    product_svd,
    times,
)
from ...lowrank import LowRank
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
    max_steps: int = 100,
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

    Pure: jit it with ``rank`` and ``max_steps`` static; ``vmap`` it over matrices and over
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
        max_steps: at most as many.
        tol: stop at this relative residual; ``None`` takes all steps.
        observe: called with a :class:`SolveState` in every step; its loss is the
            relative residual.

    Returns:
        A :class:`Separation`; ``right`` of its low-rank part has orthonormal columns,
        its ``state`` is a :class:`ProjectionState`.

    Raises:
        ValueError: for a matrix without entries or axes, a mask of another shape, a
            rank out of range or above half of the shorter side, or ``max_steps < 1``.

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
        values = jnp.sqrt(jnp.sum(x.left * x.left, axis=0))
        form = TruncatedSVD(state.left, values, x.right)
        if incoherence is not None:
            error, form = _trimmed(error, x, form, jnp.asarray(incoherence, dtype))
        left, values, right = _tangent_step(form, error)
        form = TruncatedSVD(left[:, :rank], values[:rank], right[:, :rank])
        count = state.count + 1
        zeta = beta * (values[rank] + decay**count * values[0])
        return _low_rank(form), ProjectionState(form.left, zeta, count)

    rule = Rule(
        sparse=lambda rest, state: hard_threshold(rest, state.level), low_rank=low_rank
    )
    start = _start(data.matrix, rank, first)
    state = ProjectionState(start.left, beta * start.values[0], jnp.zeros((), jnp.int32))
    first_part = _low_rank(start)
    return alternate(
        data, first_part, state, rule, max_steps=max_steps, tol=tol, observe=observe
    )


def _tangent_step(form: TruncatedSVD, error: Array) -> TruncatedSVD:
    """The leading triplets, one more than r, of ``L + P_T(error)``.

    With ``P_T(E) = UUᵀE + EVVᵀ − UUᵀEVVᵀ`` it is ``[U EV] core [V EᵀU]ᵀ`` for the core
    ``[[Σ − UᵀEV, I], [I, 0]]``.
    """
    u, values, v = form
    image, image_rows = times(error, v), cross(error, u)
    identity = jnp.eye(len(values), dtype=values.dtype)
    inside = jnp.diag(values) - cross(u, image)
    core = jnp.block([[inside, identity], [identity, jnp.zeros_like(identity)]])
    left, right = jnp.hstack([u, image]), jnp.hstack([v, image_rows])
    return product_svd(left, core, right, len(values) + 1)


def _start(matrix: Array, rank: int, first_level: ArrayLike) -> TruncatedSVD:
    largest = _svd(leading_factors(matrix, 1)).values[0]
    trimmed = matrix - hard_threshold(matrix, first_level * largest)
    return _svd(leading_factors(trimmed, rank))


def _svd(x: LowRank) -> TruncatedSVD:
    return product_svd(x.left, None, x.right, x.rank)


def _low_rank(form: TruncatedSVD) -> LowRank:
    return LowRank(form.left * form.values[None, :], form.right)


def _trimmed(
    error: Array, x: LowRank, form: TruncatedSVD, incoherence: ArrayLike
) -> tuple[Array, TruncatedSVD]:
    """Cap the rows of the singular vectors; the error is that of the trimmed matrix."""
    left = _cap_rows(form.left, incoherence) * form.values[None, :]
    capped = LowRank(left, _cap_rows(form.right, incoherence))
    error = error + x.materialize() - capped.materialize()
    return error, _svd(capped)


def _cap_rows(x: Array, incoherence: ArrayLike) -> Array:
    limit = jnp.sqrt(incoherence * x.shape[1] / x.shape[0])
    length = jnp.sqrt(jnp.sum(x * x, axis=1, keepdims=True))
    return x * jnp.minimum(1, limit / nonzero(length))

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from ..._sharding import einsum
from ...linalg import nonzero, singular_values, soft_threshold, svd
from ...lowrank import LowRank
from .alternation import Observer, Rule, Separation, alternate, observed


LARGEST_PENALTY = 1e7  # in units of the first one; the problem is solved long before


class PursuitState(NamedTuple):
    """What :func:`principal_component_pursuit` keeps between steps.

    Attributes:
        dual: ``(m, n)``, the multiplier Λ: a certificate of optimality, see there.
        penalty: ``μ``.
        rank: of the low-rank part.
    """

    dual: Float[Array, "m n"]
    penalty: Float[Array, ""]
    rank: Int[Array, ""]


def principal_component_pursuit(
    matrix: Real[Array, "..."],
    *,
    mask: Bool[Array, "..."] | None = None,
    sparse_weight: ArrayLike | None = None,
    penalty_growth: ArrayLike = 1.5,
    max_steps: int = 100,
    tol: ArrayLike | None = 1e-6,
    observe: Observer | None = None,
) -> Separation:
    """Robust PCA as a convex program, by the inexact augmented Lagrangian with full SVDs.

    ``min ‖L‖_* + λ ‖S‖_1`` subject to ``L + S = matrix`` where observed::

        S ← soft threshold of (matrix − L + Λ/μ) at λ/μ
        L ← soft threshold of the singular values of (matrix − S + Λ/μ) at 1/μ
        Λ ← Λ + μ (matrix − L − S),   μ ← penalty_growth · μ

    The baseline that needs neither a rank nor a start; one SVD of a matrix of the size
    of the data a step. :func:`fit_robust_pca` solves the same program on factors, in a
    fraction of the time. At the optimum Λ proves it: ``‖Λ‖₂ <= 1``, ``|Λ| <= λ``, and
    ``⟨Λ, matrix⟩`` equals the objective. The slower μ grows, the more exactly.

    Pure: jit it with ``max_steps`` static; ``vmap`` it over matrices and over the other
    numbers.

    Args:
        matrix: real ``(m, n)``; entries that are not finite count as missing.
        mask: true where an entry is observed.
        sparse_weight: ``λ``, by default ``1 / √(observed share · max(m, n))``. The larger,
            the fewer errors and the higher the rank.
        penalty_growth: what a step multiplies μ by, above one.
        max_steps: at most as many.
        tol: stop at this relative residual; ``None`` takes all steps.
        observe: called with a :class:`SolveState` in every step; its loss is the
            relative residual.

    Returns:
        A :class:`Separation`; the factors are as wide as the shorter side, ``left``
        sorted by size and zero from the rank on. Its ``state`` is a :class:`PursuitState`.

    Raises:
        ValueError: for a matrix without entries or axes, a mask of another shape, or
            ``max_steps < 1``.

    Example:
        >>> import jax
        >>> from lrjax import recovery
        >>> problem = recovery.robust_pca(jax.random.key(0), (60, 50), 2, 0.1)
        >>> fit = recovery.principal_component_pursuit(problem.targets)
        >>> int(fit.state.rank), bool(problem.relative_error(fit.low_rank) < 1e-4)
        (2, True)

    Reference:
        E. J. Candès, X. Li, Y. Ma, J. Wright, "Robust principal component analysis?"
        (2011), arXiv 0912.3599; Z. Lin, M. Chen, Y. Ma, "The augmented Lagrange
        multiplier method for exact recovery of corrupted low-rank matrices" (2010),
        arXiv 1009.5055.
    """
    data = observed("principal_component_pursuit", matrix, mask)
    m, n = data.matrix.shape
    dtype = data.matrix.dtype
    share = data.share()
    if sparse_weight is None:
        sparse_weight = 1 / jnp.sqrt(share * max(m, n))
    weight, growth = (jnp.asarray(x, dtype) for x in (sparse_weight, penalty_growth))
    largest = singular_values(data.matrix)[0]
    spread = jnp.maximum(largest, jnp.max(jnp.abs(data.matrix)) / weight)
    first = 1.25 / nonzero(largest)

    def sparse(rest: Array, state: PursuitState) -> Array:
        return soft_threshold(rest + state.dual / state.penalty, weight / state.penalty)

    def low_rank(x: LowRank, error: Array, state: PursuitState):
        mu = state.penalty
        cleaned = x.materialize() + error + state.dual / mu
        u, values, vt = svd(cleaned)
        # What the threshold takes off, μ (cleaned − L), is the next multiplier.
        shrunk = soft_threshold(values, 1 / mu)
        dual = einsum("mk,k,kn->mn", u, jnp.minimum(mu * values, 1), vt)
        state = PursuitState(
            dual=jnp.where(data.mask, dual, 0),
            penalty=jnp.minimum(growth * mu, LARGEST_PENALTY * first),
            rank=jnp.sum(shrunk > 0, dtype=jnp.int32),
        )
        return LowRank(u * shrunk[None, :], vt.T), state

    width = min(m, n)
    zeros = LowRank(jnp.zeros((m, width), dtype), jnp.zeros((n, width), dtype))
    dual = data.matrix / nonzero(spread)
    state = PursuitState(dual, first, jnp.zeros((), jnp.int32))
    rule = Rule(sparse, low_rank)
    return alternate(
        data, zeros, state, rule, max_steps=max_steps, tol=tol, observe=observe
    )

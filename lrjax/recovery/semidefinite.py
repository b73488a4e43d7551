"""Semidefinite programs in factors, with a proof of optimality."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from .._arguments import check_key
from ..linalg import nonzero, times
from ..lowrank import LowRank
from ._inputs import check_not_negative
from .problems import Operator


Cost = Float[Array, "n n"] | Callable[[Array], Array]
FALLING = 0.25  # an outer step should leave this share of the violation, or
GROWTH = 4.0  # the penalty grows by this


class SemidefiniteSolution(eqx.Module):
    """What :func:`solve_semidefinite` found, and what proves it.

    For every X that satisfies the constraints, ``⟨C, X⟩ ≥ dual_value + tr(X) · min(0,
    least_eigenvalue)``.

    Attributes:
        factor: ``(n, r)``, the solution is ``X = factor @ factor.T``.
        dual: of the constraints, in their shape.
        value: ``⟨C, X⟩``.
        dual_value: ``⟨b, dual⟩``.
        least_eigenvalue: of ``C − A*(dual)``, relative to the largest in size.
        violation: ``‖A(X) − b‖ / max(1, ‖b‖)``.
        steps: outer steps taken.
        converged: whether the constraints hold within the tolerance, and the gradient
            vanishes likewise.
        certified: whether besides ``C − A*(dual)`` has no negative eigenvalue beyond the
            tolerance: then X is a global minimum of the program, whatever the rank.
    """

    factor: Float[Array, "n r"]
    dual: Float[Array, "..."]
    value: Float[Array, ""]
    dual_value: Float[Array, ""]
    least_eigenvalue: Float[Array, ""]
    violation: Float[Array, ""]
    steps: Int[Array, ""]
    converged: Bool[Array, ""]
    certified: Bool[Array, ""]

    @property
    def x(self) -> LowRank:
        """The solution in factors."""
        return LowRank(self.factor, self.factor)


class _State(NamedTuple):
    factor: Array
    dual: Array
    penalty: Array
    violation: Array
    slope: Array
    steps: Array


def solve_semidefinite(
    cost: Cost,
    operator: Operator,
    targets: Float[Array, "..."],
    *,
    rank: int | None = None,
    key: PRNGKeyArray,
    tol: ArrayLike | None = None,
    max_steps: int = 40,
    inner_steps: int = 300,
) -> SemidefiniteSolution:
    """``min ⟨C, X⟩`` subject to ``A(X) = b`` and X positive semidefinite, as ``X = Y Yᵀ``.

    Burer and Monteiro's program in Y, by the augmented Lagrangian method:

        Y ← argmin ⟨C, Y Yᵀ⟩ − ⟨y, A(Y Yᵀ) − b⟩ + ½ σ ‖A(Y Yᵀ) − b‖²     (L-BFGS)
        y ← y − σ (A(Y Yᵀ) − b),    σ grows where the violation did not fall to a quarter.

    The program in Y is not convex, the one in X is, and it tells: where ``S = C − A*(y)``
    is positive semidefinite besides ``S Y = 0``, X is a minimum of it. This is looked at
    in the end, with one ``n × n`` decomposition. With ``r (r + 1)/2 ≥ count``, the default,
    a local minimum is a global one for almost every C.

    Args:
        cost: C ``(n, n)``, symmetric; or the product with it, ``(n, k) -> (n, k)``.
        operator: A on symmetric matrices ``(n, n)``: :class:`lrjax.recovery.Entries` for a
            diagonal, :class:`DenseSensing` for any, or one of your own. Of ``A*`` the
            symmetric part counts.
        targets: b.
        rank: r, the columns of Y. The smallest with ``r (r + 1)/2 > count`` by default, at
            most n.
        key: for the start.
        tol: relative, of constraints, gradient and eigenvalues; by default the root of the
            unit of rounding, 3e-4 in float32 and 1.5e-8 in float64, to which a line search
            by values can see.
        max_steps: outer steps at most.
        inner_steps: of L-BFGS in each, at most.

    Returns:
        :class:`SemidefiniteSolution`. Pure: under ``jit`` with ``rank``, ``max_steps`` and
        ``inner_steps`` static, and ``vmap``.

    Raises:
        ValueError: for an operator that is not square, a cost or targets of another
            shape, a rank out of range.

    Example:
        The relaxation of the maximum cut of a cycle of five; ``(25 + 5√5)/8`` of its edges:

        >>> import jax, jax.numpy as jnp, lrjax
        >>> i = jnp.arange(5)
        >>> edges = jnp.zeros((5, 5)).at[i, (i + 1) % 5].set(1)
        >>> cost = (edges + edges.T) / 4
        >>> diagonal = lrjax.recovery.Entries(i, i, (5, 5))
        >>> found = lrjax.recovery.solve_semidefinite(
        ...     cost, diagonal, jnp.ones(5), key=jax.random.key(0))
        >>> print((2.5 - found.value).round(3), found.certified)
        4.523 True

    Reference:
        S. Burer, R. Monteiro, "A nonlinear programming algorithm for solving semidefinite
        programs via low-rank factorization" (2003), Mathematical Programming; N. Boumal,
        V. Voroninski, A. Bandeira, "Deterministic guarantees for Burer-Monteiro
        factorizations of smooth semidefinite programs" (2018), arXiv 1804.02008.
    """
    check_key("solve_semidefinite", key)
    check_not_negative("solve_semidefinite", tol=tol)
    n = _size(cost, operator, targets)
    rank = _checked_rank(rank, n, targets.size)
    dtype = jnp.result_type(targets, jnp.float32)
    tol = jnp.asarray(jnp.finfo(dtype).eps ** 0.5 if tol is None else tol, dtype)
    matmul = cost if callable(cost) else lambda y: times(cost, y)
    probe = jr.normal(key, (n, rank), dtype)
    # In units of the cost and of the constraints, so that no penalty has to be known.
    scale = nonzero(jnp.linalg.norm(matmul(probe)) / jnp.linalg.norm(probe))
    size = jnp.maximum(1, jnp.linalg.norm(targets))
    measured = operator(LowRank(probe, probe))
    start = jnp.sqrt(size / nonzero(jnp.linalg.norm(measured))) * probe
    gap = lambda y: operator(LowRank(y, y)) - targets

    def minimized(y: Array, dual: Array, penalty: Array) -> tuple[Array, Array]:
        def objective(y: Array) -> Array:
            miss = gap(y)
            value = jnp.sum(y * matmul(y)) / scale
            return value - jnp.sum(dual * miss) + penalty / 2 * jnp.sum(miss**2)

        return _lbfgs(objective, y, tol, inner_steps)

    def step(state: _State) -> _State:
        y, slope = minimized(state.factor, state.dual, state.penalty)
        miss = gap(y)
        violation = jnp.linalg.norm(miss) / size
        slow = violation > jnp.maximum(tol, FALLING * state.violation)
        penalty = jnp.where(slow, GROWTH, 1.0) * state.penalty
        dual = state.dual - state.penalty * miss
        return _State(y, dual, penalty, violation, slope, state.steps + 1)

    def going(state: _State) -> Array:
        apart = (state.violation > tol) | (state.slope > tol)
        return (state.steps < max_steps) & apart

    far = jnp.asarray(jnp.inf, dtype)
    first = _State(start, jnp.zeros_like(measured), 1 / size, far, far, jnp.zeros((), int))
    state = lax.while_loop(going, step, first)
    return _certified(state, matmul, operator, targets, scale, tol)


def _lbfgs(
    objective: Callable[[Array], Array], y: Array, tol: Array, steps: int
) -> tuple[Array, Array]:
    """The minimum, and the gradient there over the size of Y."""
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)
    rounding = 100 * jnp.finfo(y.dtype).eps
    relative = lambda y, g: jnp.linalg.norm(g) / nonzero(jnp.linalg.norm(y))

    def going(carry):
        y, _, grad, k = carry
        return (k < steps) & (relative(y, grad) > tol / 4)

    def step(carry):
        y, state, grad, k = carry
        value, slope = value_and_grad(y, state=state)
        updates, state = solver.update(
            slope, state, y, value=value, grad=slope, value_fn=objective
        )
        new = jnp.asarray(optax.apply_updates(y, updates))
        slope = jnp.asarray(optax.tree.get(state, "grad"))
        # A line search that went astray ends here; the next outer step begins anew.
        sound = objective(new) <= value + rounding * jnp.abs(value)
        y, grad = jnp.where(sound, new, y), jnp.where(sound, slope, grad)
        return y, state, grad, jnp.where(sound, k + 1, steps)

    start = y, solver.init(y), jax.grad(objective)(y), jnp.zeros((), int)
    y, _, grad, _ = lax.while_loop(going, step, start)
    return y, relative(y, grad)


def _certified(
    state: _State,
    matmul: Callable[[Array], Array],
    operator: Operator,
    targets: Array,
    scale: Array,
    tol: Array,
) -> SemidefiniteSolution:
    """The solution in the units of the program, and the eigenvalues of its proof."""
    y, dual = state.factor, scale * state.dual
    adjoint = operator.adjoint(dual)
    slack = matmul(jnp.eye(len(y), dtype=y.dtype)) - (adjoint + adjoint.T) / 2
    values = jnp.linalg.eigvalsh((slack + slack.T) / 2)
    least = values[0] / nonzero(jnp.max(jnp.abs(values)))
    value, dual_value = jnp.sum(y * matmul(y)), jnp.sum(targets * dual)
    converged = (state.violation <= tol) & (state.slope <= tol)
    return SemidefiniteSolution(
        factor=y,
        dual=dual,
        value=value,
        dual_value=dual_value,
        least_eigenvalue=least,
        violation=state.violation,
        steps=state.steps,
        converged=converged,
        certified=converged & (least >= -10 * tol),
    )


def _size(cost: Cost, operator: Operator, targets: Array) -> int:
    m, n = operator.shape
    if m != n:
        raise ValueError(
            f"solve_semidefinite needs an operator on square matrices, got {(m, n)}."
        )
    if not callable(cost) and cost.shape != (n, n):
        raise ValueError(
            f"The cost must be ({n}, {n}) as the matrices of the operator, got "
            f"{cost.shape}; or a function that multiplies with it."
        )
    column = jax.ShapeDtypeStruct((n, 1), jnp.float32)
    count = jax.eval_shape(lambda y: operator(LowRank(y, y)), column).shape
    if targets.shape != count:
        raise ValueError(
            f"The operator has measurements of shape {count}, targets has {targets.shape}."
        )
    return n


def _checked_rank(rank: int | None, n: int, count: int) -> int:
    if rank is None:
        return min(n, int((2 * count + 0.25) ** 0.5 + 0.5) + 1)
    if not 1 <= rank <= n:
        raise ValueError(f"The rank must be from 1 to {n}, got {rank!r}.")
    return rank

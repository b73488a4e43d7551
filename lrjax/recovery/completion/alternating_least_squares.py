import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ..._arguments import check_key
from ...linalg import nonzero
from ...lowrank import LowRank, relative_step
from ..descent import History, Solution
from ..problems import Entries, Identity, Masked, Problem, Squared
from .grouped import Block, Grouped, group_by_row, scan_rows
from .normal_equations import Weigh, contract, inverse_root, normal_equations


CG_STEPS = 50  # at most, of a sketched regression
SMALLEST = 1e-3  # residual that is told from zero, in units of the values' size


def alternating_least_squares(
    problem: Problem,
    init: LowRank,
    *,
    steps: int,
    ridge: ArrayLike = 0.0,
    sketch: int | None = None,
    sketch_tol: ArrayLike = 1e-6,
    key: PRNGKeyArray | None = None,
) -> Solution:
    """Alternating least squares: exact regressions of all rows of one factor in turn.

    A step is ``L ← argmin_L ½ Σ (y_ij − l_iᵀ r_j)² + ½ ρ ‖L‖²`` and the same for R, over
    the observed entries: Gauss-Newton in Gauss-Seidel order with a step size of one. On
    a fully observed matrix of rank r one step from any start of full rank r finds it.

    For another objective h the squares are weighted by ``h'(e)/e`` at the residuals e
    before (iteratively reweighted least squares), which makes :class:`Huber` and
    :class:`L1` robust; residuals below a thousandth of the values' size weigh alike.

    With ``sketch = s`` the normal equations of width k are not formed. Each row solves
    its regression by conjugate gradients, preconditioned by the Gram matrix of a random
    signed sum of its entries in s groups: ``O(count · k)`` operations for each of the few
    iterations, and ``O((m + n) s k²)``, instead of ``O(count · k²)``.

    Args:
        problem: its operator must be ``Entries``, ``Masked`` or ``Identity``.
        init: the start; only its ``right`` factor matters for squares.
        steps: to take.
        ridge: ``ρ``, in units of ``y²``.
        sketch: ``s``; about ``4 k`` is enough.
        sketch_tol: by how much conjugate gradients reduce the gradient of each row.
        key: of the signs of the sketch, ``jax.random.key(0)`` by default.

    Returns:
        A :class:`Solution`, with ``state=None`` and ``converged`` false: all steps are
        taken.

    Raises:
        ValueError: for another operator, a start of another shape, ``steps < 1``, or a
            sketch smaller than the width.

    Example:
        >>> import jax, lrjax
        >>> p = lrjax.matrix_completion(jax.random.key(0), (60, 50), 2, observed=0.4)
        >>> start = lrjax.spectral_init(p, 2, key=jax.random.key(1))
        >>> found = lrjax.alternating_least_squares(p, start, steps=30)
        >>> bool(p.relative_error(found.x) < 1e-4)
        True

    Reference:
        Y. Koren, R. Bell, C. Volinsky, "Matrix factorization techniques for recommender
        systems" (2009), IEEE Computer; Y. Gu, Z. Song, J. Yin, L. Zhang, "Low rank matrix
        completion via robust alternating minimization in nearly linear time" (2024),
        arXiv 2302.11068.
    """
    check_key("alternating_least_squares", key)
    _check(problem, init, steps, sketch)
    m, n = problem.shape
    rows, cols, values = _entries(problem)
    by_row = group_by_row(rows, cols, values, m)
    by_col = group_by_row(cols, rows, values, n)
    ridge = jnp.asarray(ridge, values.dtype)
    weigh = _weights(problem)
    key = jr.key(0) if key is None else key

    def half(entries: Grouped, old: Array, vectors: Array, key: PRNGKeyArray) -> Array:
        padded = jnp.pad(old, ((0, 1), (0, 0)))

        def work(_, block):
            start = padded[block.rows]
            if sketch is None:
                a, b, _, _ = normal_equations(block, start, weigh)
                a += ridge * jnp.eye(a.shape[-1], dtype=a.dtype)[None]
                return None, start + _solve(inverse_root(a), b - ridge * start)
            change = _sketched(block, start, weigh, ridge, sketch, sketch_tol, key)
            return None, start + change

        return scan_rows(work, None, entries, vectors, width=sketch)[1]

    def step(x: LowRank, index: Array) -> tuple[LowRank, History]:
        k_left, k_right = jr.split(jr.fold_in(key, index))
        left = half(by_row, x.left, x.right, k_left)
        right = half(by_col, x.right, left, k_right)
        new = LowRank(left, right)
        value = problem.loss(x)
        move = relative_step(new, LowRank(left - x.left, right - x.right))
        record = History(
            loss=value,
            relative_error=None if problem.truth is None else problem.relative_error(x),
            relative_step=move,
            finite=jnp.isfinite(value) & jnp.isfinite(move),
            observed=None,
        )
        return new, record

    x, history = lax.scan(step, init, jnp.arange(steps))
    steps_taken = jnp.asarray(steps, jnp.int32)
    # Its steps have the length that lowers the loss most: they are never too short.
    false = jnp.array(False)
    return Solution(x, None, history, steps_taken, converged=false, stalled=false)


def _check(problem: Problem, init: LowRank, steps: int, sketch: int | None) -> None:
    if not isinstance(problem.operator, Entries | Masked | Identity):
        raise ValueError(
            "alternating_least_squares needs a problem of observed entries (Entries, "
            f"Masked or Identity), got {type(problem.operator).__name__}."
        )
    if init.shape != problem.shape:
        raise ValueError(
            f"the start has shape {init.shape}, the problem recovers a matrix of shape "
            f"{problem.shape}."
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    if sketch is not None and sketch < init.rank:
        raise ValueError(
            f"a sketch needs at least as many groups as the width {init.rank} of the "
            f"factors, better four times as many; got {sketch}."
        )


def _entries(problem: Problem) -> tuple[Array, Array, Array]:
    """Indices and values of the observed entries; those of missing ones are ``(m, n)``."""
    operator, targets = problem.operator, problem.targets
    if isinstance(operator, Entries):
        return operator.rows, operator.cols, targets
    m, n = problem.shape
    rows = lax.broadcasted_iota(jnp.int32, (m, n), 0)
    cols = lax.broadcasted_iota(jnp.int32, (m, n), 1)
    if isinstance(operator, Masked):
        rows = jnp.where(operator.mask, rows, m)
        cols = jnp.where(operator.mask, cols, n)
    return rows.reshape(-1), cols.reshape(-1), targets.reshape(-1)


def _weights(problem: Problem) -> Weigh | None:
    """``h'(e)/e``, for residuals that vanish that of very small ones."""
    if isinstance(problem.objective, Squared):
        return None
    y = problem.targets
    least = SMALLEST * jnp.sqrt(jnp.mean(y * y)) + jnp.finfo(y.dtype).tiny

    def weigh(e):
        # The residual of the loss is the model minus the value.
        e = -jnp.where(jnp.abs(e) > least, e, least)
        return problem.objective.subgradient(e) / e

    return weigh


def _solve(root: Array, b: Array) -> Array:
    return contract("bkr,bk->br", root, contract("bkr,br->bk", root, b))


def _sketched(
    block: Block,
    start: Float[Array, "rows k"],
    weigh: Weigh | None,
    ridge: Array,
    groups: int,
    tol: ArrayLike,
    key: PRNGKeyArray,
) -> Float[Array, "rows k"]:
    """The change of each row of a block, by conjugate gradients on its regression."""
    size, k = start.shape

    def weights(slab):
        if weigh is None:
            return slab.seen.astype(start.dtype)
        e = slab.values - contract("bwr,br->bw", slab.vectors, start)
        return jnp.where(slab.seen, weigh(e), 0)

    def add_group(total, slab):
        # Entry i of every slab falls into group i: one pass, and no scatter.
        signs = jr.rademacher(jr.fold_in(key, slab.index), (groups,), start.dtype)
        signed = signs[None, :] * jnp.sqrt(weights(slab))
        return total + signed[..., None] * slab.vectors

    summed = block.fold(add_group, jnp.zeros((size, groups, k), start.dtype))
    gram = contract("bwr,bws->brs", summed, summed)
    root = inverse_root(gram + ridge * jnp.eye(k, dtype=gram.dtype)[None])

    def gradient(total, slab):
        e = slab.values - contract("bwr,br->bw", slab.vectors, start)
        return total + contract("bwr,bw->br", slab.vectors, weights(slab) * e)

    def product(p):
        def add(total, slab):
            image = weights(slab) * contract("bwr,br->bw", slab.vectors, p)
            return total + contract("bwr,bw->br", slab.vectors, image)

        return block.fold(add, ridge * p)

    rest = block.fold(gradient, -ridge * start)
    return _conjugate_gradients(product, lambda r: _solve(root, r), rest, tol)


def _conjugate_gradients(product, precondition, rest: Array, tol: ArrayLike) -> Array:
    """Solve many symmetric systems at once, each until its gradient has fallen enough."""
    dot = lambda a, b: jnp.sum(a * b, axis=-1, keepdims=True)
    ratio = lambda a, b: jnp.where(b > 0, a / nonzero(b), 0)
    direction = precondition(rest)
    first = dot(rest, direction)

    def running(carry):
        _, _, _, size, taken = carry
        return jnp.any(size > tol**2 * first) & (taken < CG_STEPS)

    def step(carry):
        x, rest, direction, size, taken = carry
        image = product(direction)
        length = ratio(size, dot(direction, image))
        length = jnp.where(size > tol**2 * first, length, 0)
        x, rest = x + length * direction, rest - length * image
        better = precondition(rest)
        new = dot(rest, better)
        direction = better + ratio(new, size) * direction
        return x, rest, direction, new, taken + 1

    start = (jnp.zeros_like(rest), rest, direction, first, 0)
    return lax.while_loop(running, step, start)[0]

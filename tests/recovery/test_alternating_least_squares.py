import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import lrjax
from lrjax import recovery

from ..helpers import all_finite, assert_close, random_low_rank


M, N, RANK = 40, 30, 3
STATIC = ("steps", "sketch")
sweep = jax.jit(lrjax.alternating_least_squares, static_argnames=STATIC)


@functools.partial(jax.jit, static_argnames="dtype")
def _completion(noise, outliers, dtype):
    problem = lrjax.matrix_completion(
        jr.key(0),
        (M, N),
        RANK,
        observed=0.5,
        condition=3.0,
        noise=noise,
        outlier_fraction=outliers,
        outlier_scale=5.0,
        dtype=dtype,
    )
    start = lrjax.spectral_init(problem, RANK, key=jr.key(1))
    return problem, start, random_low_rank(jr.key(2), M, N, RANK, dtype=dtype)


def completion(objective=None, noise=0.0, outliers=0.0, dtype=jnp.float32):
    """A problem, its spectral start and a random start."""
    problem, start, random = _completion(noise, outliers, dtype)
    objective = problem.objective if objective is None else objective
    data = problem.operator, problem.targets
    return lrjax.Problem(*data, objective, problem.truth), start, random


def dense_row_regressions(problem, right, ridge):
    """Each row of the left factor by its own dense normal equations."""
    rows, cols, y = problem.operator.rows, problem.operator.cols, problem.targets
    mask = jnp.zeros((M, N)).at[rows, cols].add(1)
    sums = jnp.zeros((M, N)).at[rows, cols].add(y)
    a = jnp.einsum("mn,nr,ns->mrs", mask, right, right)
    a += ridge * jnp.eye(right.shape[1])[None]
    return jnp.linalg.solve(a, (sums @ right)[..., None])[..., 0]


@pytest.mark.slow_but("masked")
@pytest.mark.parametrize("kind", ["identity", "masked"])
def test_one_sweep_finds_a_fully_observed_matrix(kind, x64):
    truth = random_low_rank(jr.key(0), M, N, RANK, dtype=jnp.float64)
    matrix = truth.materialize()
    everything = recovery.Masked(jnp.ones((M, N), bool))
    operator = recovery.Identity((M, N)) if kind == "identity" else everything
    problem = recovery.Problem(operator, matrix, recovery.Squared())
    start = random_low_rank(jr.key(1), M, N, RANK, dtype=jnp.float64)
    found = sweep(problem, start, steps=1)
    assert_close(found.x.materialize(), matrix, rtol=1e-11)


@pytest.mark.slow
def test_a_sweep_is_the_regression_of_every_row():
    problem, _, start = completion(noise=0.1)
    found = sweep(problem, start, steps=1, ridge=0.5)
    left = dense_row_regressions(problem, start.right, 0.5)
    assert_close(found.x.left, left, rtol=1e-4)
    assert float(found.history.loss[0]) == float(problem.loss(start))


@pytest.mark.slow
def test_a_sketch_gives_the_exact_method():
    problem, start, _ = completion(recovery.Huber(0.1), noise=0.1)
    exact = sweep(problem, start, steps=60, ridge=1e-2).x.materialize()
    # Groups hardly wider than the factors: the preconditioner is far from exact.
    found = sweep(problem, start, steps=60, ridge=1e-2, sketch=4, sketch_tol=1e-6)
    assert_close(found.x.materialize(), exact, rtol=1e-4)
    rough = sweep(problem, start, steps=60, ridge=1e-2, sketch=4, sketch_tol=0.1)
    assert_close(rough.x.materialize(), exact, rtol=1e-2)


@pytest.mark.slow
def test_robust_objectives_stand_gross_errors():
    for objective in (recovery.Huber(0.01), recovery.L1()):
        problem, start, _ = completion(objective, outliers=0.05)
        x = sweep(problem, start, steps=60, ridge=0.0).x
        assert float(problem.relative_error(x)) < 0.01


@pytest.mark.slow
def test_rows_without_entries_and_vmap():
    problem, _, start = completion()
    hidden = problem.operator.rows == 3
    operator = recovery.Entries(
        jnp.where(hidden, 4, problem.operator.rows), problem.operator.cols, (M, N)
    )
    lonely = recovery.Problem(operator, problem.targets, problem.objective, problem.truth)
    problems = jax.tree.map(lambda *leaves: jnp.stack(leaves), problem, lonely)
    run = lambda p: lrjax.alternating_least_squares(p, start, steps=5)
    both = jax.jit(jax.vmap(run))(problems)
    assert all_finite(both)
    one = sweep(problem, start, steps=5)
    assert_close(both.x.left[0], one.x.left, rtol=1e-3)


@pytest.mark.slow
def test_scaled_gd_completes_at_the_same_rate_for_every_condition(x64):
    def steps(key, condition):
        *k_factors, k_places, k_start = jr.split(key, 4)
        root = jnp.sqrt(jnp.linspace(1, 1 / condition, 5))[None, :]
        signs = [jnp.sign(jr.uniform(k, (300, 5), minval=-1)) for k in k_factors]
        truth = lrjax.LowRank(*(jnp.linalg.qr(x)[0] * root for x in signs))
        places = jr.choice(k_places, 300 * 300, (18000,), replace=False)
        operator = recovery.Entries(places // 300, places % 300, (300, 300))
        squared = recovery.Squared()
        problem = lrjax.Problem(operator, operator(truth), squared, truth)
        start = lrjax.spectral_init(problem, 5, key=k_start, trim=0.0)
        solution = lrjax.solve(problem, lrjax.scaled_gd(0.5 / 0.2), start, steps=180)
        return jnp.sum(solution.history.relative_error > 1e-12)

    run = jax.jit(jax.vmap(jax.vmap(steps, (None, 0)), (0, None)))
    counts = run(jr.split(jr.key(0), 5), jnp.array([1.0, 20.0]))
    assert bool(jnp.all(jnp.abs(counts - 148) <= 0.15 * 148)), counts


@pytest.mark.slow
def test_bad_arguments_are_refused():
    problem, _, start = completion()
    run = lrjax.alternating_least_squares
    sensing = lrjax.matrix_sensing(jr.key(0), (M, N), 1, 10)
    with pytest.raises(ValueError, match="DenseSensing"):
        run(sensing, start, steps=1)
    with pytest.raises(ValueError, match=r"shape \(30, 40\)"):
        run(problem, start.T, steps=1)
    with pytest.raises(ValueError, match="steps"):
        run(problem, start, steps=0)
    with pytest.raises(ValueError, match="width 3"):
        run(problem, start, steps=1, sketch=2)

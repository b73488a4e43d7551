"""The methods for factors keep the iteration counts that are known of them."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax import recovery


def steps_to(errors, level):
    """The first step at whose start the error is at most the level."""
    below = np.flatnonzero(np.asarray(errors) <= level)
    return int(below[0]) if len(below) else 10**9


def around(steps, expected):
    """Within ±15 %."""
    return abs(steps - expected) <= 0.15 * expected


@functools.partial(jax.jit, static_argnames=("method", "steps"))
@functools.partial(jax.vmap, in_axes=(0, None, None))
def wide_sensing(condition, method, steps):
    """Errors at three times the rank: n = 30, r = 2, m = 10 n r, symmetric, no outliers."""
    problem = lrjax.matrix_sensing(
        jr.key(0),
        (30, 30),
        2,
        600,
        symmetric=True,
        condition=condition,
        objective=recovery.Squared(),
        dtype=jnp.float64,
    )
    if method == "prec_gd":
        start = lrjax.spectral_init(problem, 6, key=jr.key(0), symmetric=True, trim=0.0)
        tx = lrjax.prec_gd()
    else:
        start = lrjax.lowrank.small_init(
            problem.shape, 6, 1e-7, key=jr.key(0), symmetric=True
        )
        damping = 1e-8 if method == "tiny" else 0.05 / condition
        tx = lrjax.scaled_gd(0.3, damping=damping, relative=False)
    return lrjax.solve(problem, tx, start, steps=steps).history.relative_error


LEVELS = (1e-4, 1e-6, 1e-8, 1e-12)


def test_prec_gd_is_linear_and_free_of_the_condition_number(x64):
    """The residual as damping: no floor at twice the rank and more."""
    known = {1.0: (53, 88, 123, 196), 20.0: (45, 78, 114, 187), 100.0: (48, 80, 114, 183)}
    errors = wide_sensing(jnp.array(list(known)), "prec_gd", 230)
    for curve, expected in zip(errors, known.values(), strict=True):
        for level, steps in zip(LEVELS, expected, strict=True):
            assert around(steps_to(curve, level), steps)


@pytest.mark.slow
def test_a_constant_damping_stalls_and_a_tiny_one_from_a_small_start_does_not(x64):
    """ScaledGD(λ): at most 198-203 steps to 1e-8 at every condition number."""
    conditions = jnp.array([1.0, 20.0, 100.0])
    steps = [steps_to(curve, 1e-8) for curve in wide_sensing(conditions, "tiny", 260)]
    assert max(steps) <= min(203, 1.15 * min(steps))
    stalled = np.asarray(wide_sensing(conditions, "large", 800)[:, -1])
    known = np.array([9e-5, 4e-5, 8e-6])  # for λ = 0.05 σ_r, to one digit
    assert np.all(abs(np.log(stalled / known)) < 0.3)


@jax.jit
def opsa_at_twice_the_rank(damping, scale):
    """Errors at n = 30, r = 3, d = 6, m = 24 n r with 10 % outliers, Polyak's steps."""
    problem = lrjax.matrix_sensing(
        jr.key(3), (30, 30), 3, 24 * 90, outlier_fraction=0.1, dtype=jnp.float64
    )
    even = lrjax.spectral_init(problem, 6, key=jr.key(0), trim=0.1)
    f_min = problem.loss(problem.truth)

    def run(damping, scale):
        start = lrjax.refactor(even, scale=scale)
        tx = lrjax.opsa(f_min=f_min, damping=damping, relative=False, loss_power=None)
        return lrjax.solve(problem, tx, start, steps=160).history.relative_error

    return jax.vmap(run)(damping, scale)


@pytest.mark.slow
def test_opsa_is_linear_under_a_constant_damping_if_its_start_is_unbalanced(x64):
    errors = opsa_at_twice_the_rank(jnp.array([2.0, 0.1, 2.0]), jnp.array([2.0, 2.0, 1.0]))
    assert steps_to(errors[0], 1e-8) <= 132 * 1.15
    assert around(steps_to(errors[1], 1e-8), 50)
    assert errors[2, -1] > 1e-3


@functools.partial(jax.jit, static_argnames=("recipe", "steps"))
@functools.partial(jax.vmap, in_axes=(0, None, None))
def robust_errors(seed, recipe, steps):
    """Relative errors at n = 20, r = 2, d = 4, m = 24 n r, κ = 20, 20 % outliers."""
    problem = lrjax.matrix_sensing(
        jr.key(seed), (20, 20), 2, 960, outlier_fraction=0.2, condition=20.0
    )
    start = lrjax.spectral_init(problem, 4, key=jr.key(seed))
    tx = recipe(problem.loss(problem.truth), lrjax.norm(start))
    return lrjax.solve(problem, tx, start, steps=steps).history.relative_error


def _told(f_min, size):
    return lrjax.scaled_subgradient(f_min=f_min)


def _searched(f_min, size):
    return lrjax.scaled_subgradient(f_min="search")


def _geometric(f_min, size):
    rate, damping = lambda t: 0.3 * size * 0.93**t, lambda t: 0.1 * 0.93**t
    return lrjax.opsa(rate, f_min=None, damping=damping)


def _marquardt(f_min, size):
    return lrjax.levenberg_marquardt(f_min="search", damping=lambda t: 1e-2 * 0.9**t)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "price"), [(_searched, 3.0), (_geometric, 4.5), (_marquardt, 3.0)]
)
def test_nothing_has_to_be_known_to_recover(recipe, price):
    """No smallest loss, rank or share of outliers; at a price in steps."""
    seeds = jnp.arange(5)
    told = max(steps_to(e, 1e-4) for e in robust_errors(seeds, _told, 150))
    untold = max(steps_to(e, 1e-4) for e in robust_errors(seeds, recipe, 150))
    assert untold <= price * told


@pytest.mark.slow
def test_geometric_steps_set_the_rate():
    """The error falls by the factor of the schedule, ln 100/−ln q steps for two digits."""
    errors = np.asarray(robust_errors(jnp.arange(1), _geometric, 150))[0]
    steps = steps_to(errors, 1e-4) - steps_to(errors, 1e-2)
    assert around(steps, np.log(100) / -np.log(0.93))


@pytest.mark.slow
def test_subgm_at_full_width(x64):
    """Factors as wide as the matrix, a fifth of the measurements wrong, five seeds."""

    @jax.jit
    @jax.vmap
    def run(seed):
        problem = lrjax.matrix_sensing(
            jr.key(seed), (12, 12), 1, 480, outlier_fraction=0.2, dtype=jnp.float64
        )
        start = lrjax.lowrank.small_init(problem.shape, 12, 1e-6, key=jr.key(seed))
        rate = optax.exponential_decay(0.1, 1, 0.97, transition_begin=200)
        x = lrjax.solve(problem, lrjax.subgm(rate), start, steps=500).x
        return problem.relative_error(x)

    assert float(jnp.max(run(jnp.arange(5)))) < 1e-3


def factorization(rank, values, n=30, objective=None):
    """The whole matrix, exactly observed."""
    keys = jr.split(jr.key(1), 2)
    left, right = (jnp.linalg.qr(jr.normal(k, (n, rank)))[0] for k in keys)
    truth = lrjax.balance(lrjax.LowRank(left * jnp.asarray(values)[None], right))
    objective = recovery.Squared() if objective is None else objective
    return recovery.Problem(
        recovery.Identity((n, n)), truth.materialize(), objective, truth
    )


@pytest.mark.slow
def test_one_rescaling_makes_descent_independent_of_the_size_of_the_start(x64):
    """147, 153, 125 and 126 steps to 1e-8 from starts of size 1, 0.3, 0.1 and 0.03."""
    problem = factorization(2, [1.0, 0.5])
    keys = jr.split(jr.key(0), 2)
    left, right = (jr.normal(k, (30, 5)) / 30**0.5 for k in keys)
    below = 0.5 * (1e-2 * lrjax.norm(problem.truth)) ** 2
    remedy = lrjax.rebalance("left", scale=0.7, once_below=below)

    @functools.partial(jax.jit, static_argnames="once")
    @functools.partial(jax.vmap, in_axes=(0, None))
    def errors(alpha, once):
        tx = optax.chain(optax.sgd(0.3), remedy) if once else optax.sgd(0.3)
        start = lrjax.LowRank(alpha * left, alpha / 3 * right)
        return lrjax.solve(problem, tx, start, steps=200).history.relative_error

    alphas = jnp.array([1.0, 0.3, 0.1, 0.03])
    for curve, steps in zip(errors(alphas, True), (147, 153, 125, 126), strict=True):
        assert around(steps_to(curve, 1e-8), steps)
    assert np.all(errors(alphas, False)[1:, -1] > 1e-6)


@pytest.mark.slow
def test_levenberg_marquardt_converges_where_nothing_else_does(x64):
    """n = 50, r = 2, d = 5, κ = 100: to rounding in 20 steps, the root of the loss as λ."""
    problem = factorization(2, [1.0, 0.01], n=50)
    noise = jr.normal(jr.key(5), (2, 50, 5)) * 1e-2
    pad = ((0, 0), (0, 3))
    start = lrjax.LowRank(
        jnp.pad(problem.truth.left, pad) + noise[0],
        jnp.pad(problem.truth.right, pad) + noise[1],
    )
    marquardt = optax.chain(
        lrjax.scale_by_gauss_newton(1e-1, relative=False, loss_power=0.5),
        optax.scale_by_learning_rate(1.0),
    )
    assert float(problem.relative_error(start)) > 1e-2
    last = lambda tx: lrjax.solve(problem, tx, start, steps=20).x
    assert float(problem.relative_error(last(marquardt))) < 1e-14
    assert float(problem.relative_error(last(optax.sgd(0.3)))) > 1e-3


@pytest.mark.slow
def test_alternating_scaled_descent_is_approximate_gauss_newton(x64):
    """Two steps of order="alternating" are one sweep with pseudo-inverses, at any width."""
    problem = lrjax.matrix_sensing(
        jr.key(0),
        (30, 30),
        2,
        180,
        condition=100.0,
        objective=recovery.Squared(),
        dtype=jnp.float64,
    )
    key_l, key_r = jr.split(jr.key(1))
    start = lrjax.LowRank(jr.normal(key_l, (30, 4)) / 10, jr.normal(key_r, (30, 4)) / 10)
    tx = lrjax.scaled_gd(0.5, order="alternating")
    solution = jax.jit(lambda: lrjax.solve(problem, tx, start, steps=6))()
    rows, y = np.asarray(problem.operator.matrices), np.asarray(problem.targets)
    left, right = np.asarray(start.left), np.asarray(start.right)

    def slope():
        return (rows.T @ (rows @ (left @ right.T).ravel() - y)).reshape(30, 30)

    for _ in range(3):
        left = left - 0.5 * slope() @ np.linalg.pinv(right.T)
        right = right - 0.5 * slope().T @ np.linalg.pinv(left.T)
    want = left @ right.T
    got = np.asarray(solution.x.materialize())
    assert np.linalg.norm(got - want) <= 1e-8 * np.linalg.norm(want)


@pytest.mark.slow
def test_opsa_told_nothing_solves_the_first_problem_of_the_readme():
    problem = lrjax.matrix_sensing(
        jr.key(0), (40, 40), 4, 1280, outlier_fraction=0.1, condition=20.0
    )
    start = lrjax.spectral_init(problem, 4, key=jr.key(1), trim=0.1)
    run = jax.jit(lambda p, x: lrjax.solve(p, lrjax.opsa(), x, steps=150))
    assert problem.relative_error(run(problem, start).x) < 1e-6


@functools.partial(jax.jit, static_argnames="constant")
@functools.partial(jax.vmap, in_axes=(0, None))
def searching(seed, constant):
    """OPSA by a searched level at n = 20, r = 2, d = 4, m = 24 n r, 10 % outliers."""
    problem = lrjax.matrix_sensing(
        jr.key(seed), (20, 20), 2, 960, outlier_fraction=0.1, dtype=jnp.float64
    )
    start = lrjax.spectral_init(problem, 4, key=jr.key(1), trim=0.1)
    options = {"loss_power": None} if constant else {}
    tx = lrjax.opsa(f_min="search", **options)
    return lrjax.solve(problem, tx, start, steps=160).history.relative_error[-1]


@pytest.mark.slow
def test_the_damping_of_a_searched_level_vanishes_with_its_gap(x64):
    """A constant one stalls."""
    seeds = jnp.arange(5)
    assert (searching(seeds, False) < 1e-9).all()
    assert (searching(seeds, True) > 1e-6).all()

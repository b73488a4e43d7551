"""The methods of robust PCA: what all of them must do, and what each promises."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lrjax import recovery
from lrjax.recovery.separation.augmented_lagrangian import eliminated, factorized

from ..helpers import all_finite, assert_close, relative_error
from ..reference import robust_pca as reference


SIZE, RANK = 48, 2
METHODS = {
    "scaled_descent": partial(recovery.scaled_descent, rank=RANK, outlier_fraction=0.1),
    "alternating_projections": partial(recovery.alternating_projections, rank=RANK),
    "principal_component_pursuit": partial(
        recovery.principal_component_pursuit, max_steps=40
    ),
}


@cache
def problem(seed):
    return recovery.robust_pca(jr.key(seed), (SIZE, SIZE), RANK, 0.05, observed=0.95)


@cache
def results(name):
    """One compilation: several matrices at once, some of them bad."""
    y, mask = problem(0).targets, problem(0).operator.mask
    members = {
        "plain": (y, mask),
        "transposed": (1000 * y.T, mask.T),
        "nothing observed": (jnp.full_like(y, jnp.nan), mask),
        "a row of NaN": (y.at[3].set(jnp.nan), mask),
    }
    batch = jax.tree.map(lambda *x: jnp.stack(x), *members.values())
    fit = jax.jit(jax.vmap(lambda y, mask: METHODS[name](y, mask=mask)))
    fits = jax.device_get(fit(*batch))
    return {
        member: jax.tree.map(lambda x, k=k: x[k], fits) for k, member in enumerate(members)
    }


def value(fit):
    return fit.low_rank.left @ fit.low_rank.right.T


@pytest.mark.slow_but("scaled_descent")
@pytest.mark.parametrize("name", METHODS)
def test_recovers_and_stops(name):
    p, fit = problem(0), results(name)["plain"]
    truth, mask = np.asarray(p.truth.materialize()), np.asarray(p.operator.mask)
    assert relative_error(value(fit), truth) < 1e-4
    assert_close(fit.sparse, np.where(mask, p.targets - truth, 0), rtol=1e-4)
    assert (fit.sparse[~mask] == 0).all()
    assert fit.residual[-1] <= 1e-6
    assert fit.steps < len(fit.residual)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_transposes_and_the_scale_of_the_data_do_not_matter(name):
    fits = results(name)
    assert_close(value(fits["transposed"]).T / 1000, value(fits["plain"]), rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_bad_members_give_finite_numbers_and_harm_no_other(name):
    fits = results(name)
    assert np.abs(value(fits["nothing observed"])).max() == 0
    assert np.abs(fits["nothing observed"].sparse).max() == 0
    rows = np.delete(value(fits["a row of NaN"]), 3, axis=0)
    assert all_finite(rows)
    truth = np.delete(np.asarray(problem(0).truth.materialize()), 3, axis=0)
    assert relative_error(rows, truth) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scaled_descent", "alternating_projections"])
def test_row_blocks_on_a_mesh_and_no_batch_give_the_same(name):
    p = problem(0)
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    blocks = NamedSharding(mesh, PartitionSpec("rows", None))
    args = jax.device_put((p.targets, p.operator.mask), blocks)
    compiled = jax.jit(lambda y, m: METHODS[name](y, mask=m)).lower(*args).compile()
    assert f"f32[{SIZE},{SIZE}]" not in compiled.as_text()  # no device holds all of it
    got = jax.device_get(compiled(*args))
    assert_close(value(got), value(results(name)["plain"]), rtol=1e-5)


def data(seed=0, m=24, n=20):
    """Numpy matrices for the slow references, and no missing entries."""
    p = recovery.robust_pca(jr.key(seed), (m, n), RANK, 0.1, dtype=jnp.float64)
    return p.targets


def trajectory(method, y, **settings):
    observe = lambda state: state.params.materialize()
    run = jax.jit(lambda y: method(y, **settings, tol=None, observe=observe))
    return np.asarray(run(y).observed)


@pytest.mark.slow
def test_scaled_descent_is_the_slow_reference(x64):
    y = data()
    settings = {"outlier_fraction": 0.1, "learning_rate": 0.4, "max_steps": 10}
    got = trajectory(recovery.scaled_descent, y, rank=RANK, **settings)
    want = reference.scaled_descent(np.asarray(y), got[0], RANK, 0.1, 0.4, 10)
    assert_close(got, want, condition=1e3)


@pytest.mark.slow
@pytest.mark.parametrize("incoherence", [None, 1.5])
def test_alternating_projections_are_the_slow_reference(x64, incoherence):
    y = data()
    settings = {"level": 0.15, "decay": 0.6, "max_steps": 10, "incoherence": incoherence}
    got = trajectory(recovery.alternating_projections, y, rank=RANK, **settings)
    want = reference.alternating_projections(
        np.asarray(y), got[0], RANK, 0.15, 0.6, 10, incoherence
    )
    assert_close(got, want, condition=1e3)


def test_a_step_of_scaled_descent_is_longer_by_the_observed_share(x64):
    """η divided by the share: the error sees no more than that of the gradient."""
    y, mask = data(), np.asarray(jr.bernoulli(jr.key(7), 0.6, (24, 20)))
    settings = {"outlier_fraction": 0.1, "learning_rate": 0.4, "max_steps": 2, "tol": None}
    watch = lambda state: state.params
    run = jax.jit(partial(recovery.scaled_descent, rank=RANK, **settings, observe=watch))
    left, right = (np.asarray(a) for a in jax.tree.leaves(run(y, mask=mask).observed))
    rest = np.where(mask, y - left[0] @ right[0].T, 0)
    error = rest - reference.keep_largest(rest, 0.2)
    rate = 0.4 / np.mean(mask)
    step_left = error @ right[0] @ np.linalg.inv(right[0].T @ right[0])
    step_right = error.T @ left[0] @ np.linalg.inv(left[0].T @ left[0])
    assert_close(left[1], left[0] + rate * step_left, condition=1e4)
    assert_close(right[1], right[0] + rate * step_right, condition=1e4)


def test_pursuit_is_the_slow_reference(x64):
    y = data()
    settings = {"sparse_weight": 0.2, "penalty_growth": 1.3, "max_steps": 25}
    got = trajectory(recovery.principal_component_pursuit, y, **settings)
    want = reference.principal_component_pursuit(np.asarray(y), 0.2, 1.3, 25)
    assert_close(got, want, condition=1e3)


def test_the_multiplier_of_pursuit_proves_that_it_is_optimal(x64):
    """A feasible multiplier and no duality gap; also where L is not the truth."""
    options = {"penalty_growth": 1.02, "max_steps": 600}
    fit = jax.jit(partial(recovery.principal_component_pursuit, **options))
    for seed, accuracy in ((0, 1e-2), (1, 1e-4)):
        y = data(seed)
        result = jax.device_get(fit(y))
        dual, weight = result.state.dual, 1 / np.sqrt(max(y.shape))
        assert np.linalg.norm(dual, 2) <= 1 + 1e-12
        assert np.abs(dual).max() <= weight * (1 + accuracy)
        nonzero = result.sparse != 0
        signs = weight * np.sign(result.sparse)
        assert_close(dual[nonzero], signs[nonzero], rtol=accuracy)
        nuclear = np.linalg.norm(value(result), "nuc")
        objective = nuclear + weight * np.abs(result.sparse).sum()
        assert abs(np.sum(dual * y) - objective) <= 0.1 * accuracy * objective


def sparse_support(rng, n, fraction):
    """Exactly ``fraction · n`` outliers in every row and every column."""
    band = (np.arange(n)[:, None] - np.arange(n)[None]) % n < round(fraction * n)
    return band[rng.permutation(n)][:, rng.permutation(n)]


def ill_conditioned(seed, n, rank, fraction, condition):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(np.sign(rng.random((n, rank)) - 0.5))[0] for _ in range(2))
    truth = (u * np.linspace(1, 1 / condition, rank)) @ v.T
    hit = sparse_support(rng, n, fraction)
    y = truth + np.where(hit, rng.standard_normal((n, n)), 0)
    return y.astype(np.float32), truth.astype(np.float32)


@pytest.mark.slow
def test_the_rate_of_scaled_descent_is_free_of_the_condition_number():
    """n = 200, r = 5, α = 0.05: the same steps to 1e-5 at κ = 1 and 10."""
    cases = [ill_conditioned(seed, 200, 5, 0.05, c) for seed, c in enumerate((1, 10))]
    y, truth = (jnp.stack(x) for x in zip(*cases, strict=True))

    def errors(y, truth):
        observe = lambda state: jnp.linalg.norm(state.params.materialize() - truth)
        settings = {"outlier_fraction": 0.05, "max_steps": 30, "tol": None}
        fit = recovery.scaled_descent(y, 5, **settings, observe=observe)
        return fit.observed / jnp.linalg.norm(truth)

    steps = np.argmax(np.asarray(jax.jit(jax.vmap(errors))(y, truth)) < 1e-5, axis=1)
    assert (abs(steps - 24) <= 0.15 * 24).all()


@pytest.mark.slow
def test_steps_of_alternating_projections():
    """n = 500, r = 5, α = 0.1, U(−1, 1)·mean|L|: 24 steps to 2e-6."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((500, 5)) @ rng.standard_normal((5, 500))
    outliers = rng.uniform(-1, 1, truth.shape) * np.abs(truth).mean()
    y = truth + np.where(rng.random(truth.shape) < 0.1, outliers, 0)
    truth = jnp.asarray(truth, jnp.float32)
    distance = lambda x: jnp.linalg.norm(x.materialize() - truth) / jnp.linalg.norm(truth)
    observe = lambda state: distance(state.params)
    fit = jax.jit(partial(recovery.alternating_projections, rank=5, observe=observe))
    result = fit(jnp.asarray(y, jnp.float32))
    steps = int(np.argmax(np.asarray(result.observed) < 1.8e-6))
    assert abs(steps - 24) <= 0.15 * 24


def test_bad_arguments_are_refused():
    y = jnp.ones((6, 5))
    trace = lambda method, y, **settings: jax.eval_shape(partial(method, **settings), y)
    for method in METHODS.values():
        with pytest.raises(ValueError, match="mask"):
            trace(method, y, mask=jnp.ones((5, 6), bool))
        with pytest.raises(ValueError, match="entries"):
            trace(method, jnp.ones((0, 5)))
        with pytest.raises(ValueError, match="steps"):
            trace(method, y, max_steps=0)
    with pytest.raises(ValueError, match="rank must be between 1 and 5"):
        trace(METHODS["scaled_descent"], y, rank=6)
    with pytest.raises(ValueError, match="2 · rank"):
        trace(METHODS["alternating_projections"], y, rank=3)


@pytest.mark.slow
def test_results_say_whether_they_converged():
    y = recovery.robust_pca(jr.key(0), (24, 20), RANK, 0.1).targets
    run = lambda **options: recovery.alternating_projections(y, RANK, **options)
    done, cut, all_steps = run(tol=1e-3), run(max_steps=2), run(tol=None, max_steps=3)
    assert done.converged
    assert done.residual[-1] <= 1e-3
    assert not cut.converged
    assert not all_steps.converged
    assert int(all_steps.steps) == 3


@pytest.mark.slow_but("True")
@pytest.mark.parametrize("dependent", [False, True])
def test_library_calls_factorize_as_elimination_does(getkey, dependent):
    """The route of accelerators and that of CPU: the same factor, and the same rank."""
    x = jr.normal(getkey(), (60, 9))
    if dependent:
        x = x.at[:, 4].set(x[:, 1] - x[:, 2])
    x = x / jnp.linalg.norm(x, axis=0, keepdims=True)
    for factor, inverse in (eliminated(x.T @ x), factorized(x.T @ x)):
        assert_close(factor.T @ factor, x.T @ x, rtol=1e-3)
        assert jnp.sum(jnp.any(factor != 0, axis=1)) == 9 - dependent
        columns = jnp.delete(x @ inverse, 4, axis=1) if dependent else x @ inverse
        assert_close(columns.T @ columns, jnp.eye(columns.shape[1]), rtol=1e-2)

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import recovery

from ..helpers import assert_close, random_low_rank


MAKERS = {
    "sensing": lambda key, **kw: lrjax.matrix_sensing(key, (12, 9), 2, 300, **kw),
    "symmetric": lambda key, **kw: lrjax.matrix_sensing(
        key, (9, 9), 2, 300, symmetric=True, **kw
    ),
    "phase": lambda key, **kw: lrjax.phase_retrieval(key, 9, 300, 2, **kw),
    "completion": lambda key, **kw: lrjax.matrix_completion(
        key, (30, 20), 2, observed=0.5, **kw
    ),
    "pca": lambda key, **kw: lrjax.robust_pca(key, (30, 20), 2, **kw),
    "masked pca": lambda key, **kw: lrjax.robust_pca(
        key, (30, 20), 2, kw.pop("outlier_fraction", 0.0), observed=0.7, **kw
    ),
}

MAKERS = {name: jax.jit(make) for name, make in MAKERS.items()}


def draw(name, key, outlier_fraction=0.0):
    """One program for all shares of outliers."""
    return MAKERS[name](key, condition=7.0, outlier_fraction=outlier_fraction)


@jax.jit
def of_truth(problem):
    """The loss of the truth, its relative error and its singular values."""
    truth = problem.truth
    values = jnp.linalg.svd(truth.materialize(), compute_uv=False)
    return problem.loss(truth), problem.relative_error(truth), values


@jax.jit
def loss_and_error(problem, x):
    return problem.loss(x), problem.relative_error(x)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_the_truth_solves_the_clean_problem(name, getkey):
    problem = draw(name, getkey())
    loss, error, values = jax.device_get(of_truth(problem))
    assert loss <= 1e-4 * np.linalg.norm(problem.targets)
    assert error < 1e-5
    np.testing.assert_allclose(values[0] / values[1], 7.0, rtol=1e-4)


@pytest.mark.parametrize("name", MAKERS)
def test_outliers_hit_the_share_that_was_asked_for(name, getkey):
    key = getkey()
    problem, clean = draw(name, key, 0.25), draw(name, key)
    share = np.mean(np.asarray(problem.targets) != np.asarray(clean.targets))
    observed = 0.7 if name == "masked pca" else 1.0
    deviation = (0.25 * 0.75 / problem.targets.size) ** 0.5
    assert abs(float(share) - 0.25 * observed) < 5 * deviation


@pytest.mark.slow
def test_problems_batch(getkey):
    keys = jr.split(getkey(), 3)
    make = jax.jit(lambda key: lrjax.robust_pca(key, (8, 6), 1, 0.1, observed=0.9))
    x = random_low_rank(getkey(), 8, 6, 2)
    batch = jax.jit(jax.vmap(make))(keys)
    got = jax.jit(jax.vmap(loss_and_error, in_axes=(0, None)))(batch, x)
    want = [loss_and_error(make(key), x) for key in keys]
    for k in range(2):
        assert_close(got[k], np.stack([pair[k] for pair in want]), rtol=1e-4)


@pytest.mark.slow
def test_relative_error_of_a_dense_and_of_a_factorized_truth(getkey):
    problem = lrjax.robust_pca(getkey(), (8, 6), 1)
    x = random_low_rank(getkey(), 8, 6, 2)
    dense = recovery.Problem(
        problem.operator, problem.targets, problem.objective, problem.truth.materialize()
    )
    assert_close(loss_and_error(problem, x), loss_and_error(dense, x), condition=10)


@pytest.mark.slow
def test_from_data(getkey):
    matrices = jr.normal(getkey(), (20, 4, 3))
    x = random_low_rank(getkey(), 4, 3, 1)
    y = jnp.einsum("kmn,mn->k", matrices, x.materialize())
    assert float(lrjax.matrix_sensing.from_data(matrices, y).loss(x)) < 1e-4
    vectors = jr.normal(getkey(), (20, 4))
    square = lrjax.LowRank(x.left, x.left)
    y = jnp.sum((vectors @ x.left) ** 2, axis=1)
    assert float(lrjax.phase_retrieval.from_data(vectors, y).loss(square)) < 1e-4
    dense = x.materialize()
    rows, cols = jnp.array([0, 3]), jnp.array([2, 1])
    problem = lrjax.matrix_completion.from_data(rows, cols, dense[rows, cols], (4, 3))
    assert float(problem.loss(x)) < 1e-10


@pytest.mark.slow
def test_entries_that_are_not_finite_are_missing(getkey):
    x = random_low_rank(getkey(), 4, 3, 1)
    matrix = x.materialize().at[1, 1].set(jnp.nan).at[2, 0].set(jnp.inf)
    mask = jnp.ones((4, 3), bool).at[0, 0].set(False)
    problem = lrjax.robust_pca.from_data(matrix, mask)
    assert np.array_equal(
        problem.operator.mask, mask.at[1, 1].set(False).at[2, 0].set(False)
    )
    assert float(problem.loss(x)) < 1e-5


def test_bad_arguments_are_refused(getkey):
    key = getkey()
    with pytest.raises(ValueError, match="rank must be between 1 and 3"):
        lrjax.robust_pca(key, (4, 3), 4)
    with pytest.raises(ValueError, match="square"):
        lrjax.matrix_sensing(key, (4, 3), 1, 10, symmetric=True)
    with pytest.raises(ValueError, match="mask"):
        lrjax.robust_pca.from_data(jnp.ones((4, 3)), jnp.ones((3, 4), bool))
    with pytest.raises(ValueError, match="matrices"):
        lrjax.matrix_sensing.from_data(jnp.ones((5, 4, 3)), jnp.ones(4))
    problem = lrjax.matrix_completion.from_data(
        jnp.array([0]), jnp.array([0]), jnp.ones(1), (4, 3)
    )
    with pytest.raises(ValueError, match="truth"):
        problem.relative_error(random_low_rank(key, 4, 3, 1))

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
    "pca": lambda key, **kw: lrjax.robust_pca(
        key, (30, 20), 2, kw.pop("outlier_fraction", 0.0), **kw
    ),
    "masked pca": lambda key, **kw: lrjax.robust_pca(
        key, (30, 20), 2, kw.pop("outlier_fraction", 0.0), observed=0.7, **kw
    ),
}

MAKERS = {name: jax.jit(make) for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_the_truth_solves_the_clean_problem(name, getkey):
    problem = MAKERS[name](getkey(), condition=7.0)
    size = float(jnp.sum(problem.targets**2))
    assert float(problem.loss(problem.truth)) <= 1e-4 * size**0.5
    assert float(problem.relative_error(problem.truth)) < 1e-5
    values = jnp.linalg.svd(problem.truth.materialize(), compute_uv=False)
    assert_close(values[0] / values[1], jnp.array(7.0), rtol=1e-4)


@pytest.mark.parametrize("name", MAKERS)
def test_outliers_hit_the_share_that_was_asked_for(name, getkey):
    key = getkey()
    problem = MAKERS[name](key, outlier_fraction=0.25)
    clean = MAKERS[name](key)
    share = jnp.mean(jnp.abs(problem.targets - clean.targets) > 0)
    observed = 0.7 if name == "masked pca" else 1.0
    deviation = (0.25 * 0.75 / problem.targets.size) ** 0.5
    assert abs(float(share) - 0.25 * observed) < 5 * deviation


def test_problems_batch(getkey):
    keys = jr.split(getkey(), 3)
    make = lambda key: lrjax.robust_pca(key, (8, 6), 1, 0.1, observed=0.9)
    x = random_low_rank(getkey(), 8, 6, 2)
    batch = jax.vmap(make)(keys)
    got = jax.vmap(lambda p: (p.loss(x), p.relative_error(x)))(batch)
    want = [(make(key).loss(x), make(key).relative_error(x)) for key in keys]
    for k in range(2):
        assert_close(got[k], jnp.stack([pair[k] for pair in want]), rtol=1e-4)


def test_relative_error_of_a_dense_and_of_a_factorized_truth(getkey):
    problem = lrjax.robust_pca(getkey(), (8, 6), 1)
    x = random_low_rank(getkey(), 8, 6, 2)
    dense = recovery.Problem(
        problem.operator, problem.targets, problem.objective, problem.truth.materialize()
    )
    assert_close(problem.relative_error(x), dense.relative_error(x), condition=10)


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

import jax
import jax.random as jr
import pytest

import lrjax
from lrjax import recovery

from ..helpers import assert_close


init = jax.jit(lrjax.spectral_init, static_argnames=("rank", "symmetric"))


def test_of_a_clean_matrix_is_its_truncated_svd():
    """Without outliers or missing entries the start is the best approximation."""
    problem = lrjax.robust_pca(jr.key(0), (40, 30), 3, 0.0, condition=4.0)
    start = init(problem, rank=3, key=jr.key(1), trim=0.0)
    assert float(problem.relative_error(start)) < 1e-5
    assert_close(start.left.T @ start.left, start.right.T @ start.right, rtol=1e-4)


MAKERS = {
    "sensing": lambda key, p: lrjax.matrix_sensing(
        key, (15, 12), 2, 2000, outlier_fraction=p
    ),
    "completion": lambda key, p: lrjax.matrix_completion(
        key, (60, 50), 2, observed=0.6, outlier_fraction=p
    ),
    "pca": lambda key, p: lrjax.robust_pca(
        key, (60, 50), 2, p, observed=0.8, outlier_scale=10.0
    ),
}

MAKERS = {name: jax.jit(make) for name, make in MAKERS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_outliers_are_trimmed_without_being_told(name):
    """Over five seeds: close with 10 % gross outliers, and no rank or fraction given."""
    for seed in range(5):
        problem = MAKERS[name](jr.key(seed), 0.1)
        start = init(problem, rank=4, key=jr.key(seed))
        assert float(problem.relative_error(start)) < 0.75
        everything = init(problem, rank=4, key=jr.key(seed), trim=0.0)
        assert problem.relative_error(everything) > 2 * problem.relative_error(start)


@pytest.mark.slow
def test_symmetric_starts_have_equal_factors():
    for problem in (
        lrjax.phase_retrieval(jr.key(0), 10, 800, 2, outlier_fraction=0.05),
        lrjax.matrix_sensing(jr.key(0), (10, 10), 2, 800, symmetric=True),
    ):
        start = init(problem, rank=3, key=jr.key(1), symmetric=True)
        assert_close(start.left, start.right)
        assert float(problem.relative_error(start)) < 0.7


@pytest.mark.slow
def test_symmetric_factors_stay_equal():
    problem = lrjax.matrix_sensing(jr.key(0), (10, 10), 2, 800, symmetric=True)
    start = init(problem, rank=2, key=jr.key(1), symmetric=True)
    tx = lrjax.scaled_subgradient(f_min=0.0)
    x = jax.jit(lambda p, x: lrjax.solve(p, tx, x, steps=30))(problem, start).x
    assert_close(x.left, x.right, rtol=1e-4)
    assert float(problem.relative_error(x)) < 1e-2


@pytest.mark.slow
def test_does_not_depend_on_the_scale_of_the_operator():
    problem = lrjax.matrix_sensing(jr.key(0), (10, 8), 2, 600)
    operator = recovery.DenseSensing(1e3 * problem.operator.matrices, (10, 8))
    scaled = recovery.Problem(operator, 1e3 * problem.targets, recovery.L1())
    want = init(problem, rank=2, key=jr.key(1)).materialize()
    assert_close(init(scaled, rank=2, key=jr.key(1)).materialize(), want, rtol=1e-4)


def test_rank_out_of_range_is_refused():
    problem = lrjax.matrix_sensing(jr.key(0), (10, 8), 2, 60)
    with pytest.raises(ValueError, match="between 1 and min"):
        lrjax.spectral_init(problem, 9, key=jr.key(0))

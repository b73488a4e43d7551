"""What every recovery problem must do: be data, batch, and be solvable from its start."""

import inspect

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import recovery
from tests.helpers import all_finite, assert_close, random_low_rank


PROBLEMS = {
    "matrix_sensing": lambda key, **o: lrjax.matrix_sensing(key, (8, 6), 1, 120, **o),
    "matrix_completion": lambda key, **o: lrjax.matrix_completion(
        key, (16, 12), 1, observed=0.6, **o
    ),
    "robust_pca": lambda key, **o: lrjax.robust_pca(
        key, (16, 12), 1, **{"outlier_fraction": 0.1, **o}
    ),
    "phase_retrieval": lambda key, **o: lrjax.phase_retrieval(key, 6, 120, **o),
}
every = pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS.keys())


def test_every_problem_is_here():
    public = {
        name
        for name, value in vars(recovery).items()
        if inspect.isclass(value) and hasattr(value, "from_data")
    }
    assert public == set(PROBLEMS)


@pytest.mark.slow_but("robust_pca")
@every
def test_data_are_leaves_and_the_truth_is_the_minimum(make):
    problem = make(jr.key(0), outlier_fraction=0.0)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(problem))
    again = jax.tree.unflatten(jax.tree.structure(problem), jax.tree.leaves(problem))
    assert problem.relative_error(problem.truth) < 1e-6
    scale = jnp.sum(jnp.abs(problem.targets))
    assert again.loss(problem.truth) < 1e-5 * scale
    x = random_low_rank(jr.key(1), *problem.shape, 2)
    assert problem.loss(x) > again.loss(problem.truth)


@pytest.mark.slow_but("phase_retrieval")
@every
def test_vmap_over_problems_is_a_loop_and_jit_is_eager(make):
    keys = jr.split(jr.key(0), 3)
    x = random_low_rank(jr.key(1), *make(keys[0]).shape, 2)
    grad = lambda problem: jax.value_and_grad(problem.loss)(x)
    together = jax.jit(jax.vmap(lambda key: grad(make(key))))(keys)
    apart = jax.tree.map(lambda *g: jnp.stack(g), *[grad(make(key)) for key in keys])
    assert_close(together, apart, condition=100)


@pytest.mark.slow_but("robust_pca")
@every
def test_gradient_is_the_adjoint_of_the_measurement(make, x64):
    problem = make(jr.key(0), objective=recovery.Squared(), dtype=jnp.float64)
    x = random_low_rank(jr.key(1), *problem.shape, 2, dtype=jnp.float64)
    move = random_low_rank(jr.key(2), *problem.shape, 2, dtype=jnp.float64)
    grad = jax.grad(problem.loss)(x)
    slope = jnp.sum(grad.left * move.left) + jnp.sum(grad.right * move.right)
    along = lambda t: problem.loss(jax.tree.map(lambda a, b: a + t * b, x, move))
    numeric = (along(1e-5) - along(-1e-5)) / 2e-5
    np.testing.assert_allclose(slope, numeric, rtol=1e-7)


@pytest.mark.slow_but("matrix_completion")
@every
def test_start_and_solution(make):
    problem = make(jr.key(3))
    start = lrjax.spectral_init(problem, 1, key=jr.key(4))
    assert all_finite(start)
    f_min = problem.loss(problem.truth)
    tx = lrjax.scaled_subgradient(f_min=f_min)
    solution = jax.jit(lambda p, x: lrjax.solve(p, tx, x, steps=120))(problem, start)
    assert all_finite(solution.x)
    assert problem.relative_error(solution.x) < 0.3 * problem.relative_error(start)

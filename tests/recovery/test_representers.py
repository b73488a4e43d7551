"""Where a completed value comes from: exact sums, and which entries count."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import recovery
from tests.helpers import assert_close, random_low_rank


def minimum(mask, y, weight, steps=4000):
    """Dense proximal gradient of ``½‖mask(X − Y)‖² + weight ‖X‖_*``, in float64."""
    x = np.zeros_like(y)
    for _ in range(steps):
        u, s, vt = np.linalg.svd(x - mask * (x - y), full_matrices=False)
        x = (u * np.maximum(s - weight, 0)) @ vt
    return x


@pytest.fixture
def completed():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(8, 2)) @ rng.normal(size=(2, 6)) + 0.1 * rng.normal(size=(8, 6))
    mask = rng.random((8, 6)) < 0.7
    x = minimum(mask, y, 0.5)
    rows, cols = np.nonzero(mask)
    u, s, vt = np.linalg.svd(x)
    r = int(np.sum(s > 1e-9))
    left, right = u[:, :r] * s[:r], vt[:r].T
    return left, right, rows, cols, (x - y)[rows, cols]


def test_contributions_sum_to_the_value_at_a_minimum(completed):
    """At every position, and for every factorization."""
    with jax.enable_x64():
        left, right, rows, cols, slopes = map(jnp.asarray, completed)
        turn = jr.normal(jr.key(0), (left.shape[1],) * 2)
        x = lrjax.LowRank(left @ turn, right @ jnp.linalg.inv(turn).T)
        points = lambda i, j: recovery.representer_points(x, rows, cols, slopes, 0.5, i, j)
        i, j = jnp.divmod(jnp.arange(48), 6)
        found = jax.jit(jax.vmap(points))(i, j)
        assert_close(found.value, x.materialize().reshape(-1), condition=1e6)
        assert_close(jnp.sum(found.contributions, 1), found.value, condition=1e8)
        assert jnp.max(jnp.abs(found.rest)) < 1e-8


def test_away_from_a_minimum_the_rest_tells(completed):
    left, right, rows, cols, slopes = map(jnp.asarray, completed)
    x = lrjax.LowRank(2 * left, right)
    farther = slopes + jnp.sum(left[rows] * right[cols], axis=1)
    found = recovery.representer_points(x, rows, cols, farther, 0.5, 0, 0)
    assert abs(found.rest) > 0.3 * abs(found.value)


@pytest.fixture(scope="module")
def fit():
    x = random_low_rank(jr.key(1), 40, 12, 2).materialize()
    i, j = jnp.nonzero(jr.uniform(jr.key(2), x.shape) < 0.6)
    complete = lambda i, j, y: lrjax.fit_completion(i, j, y, x.shape, rank=4)
    return jax.jit(complete)(i, j, x[i, j]), x


@pytest.mark.slow
def test_a_row_is_linear_in_its_entries(fit):
    """Contributions against differences of completions, and their sum."""
    fit, x = fit
    cols = np.array([0, 3, 5, 7, 9])
    values = x[0, cols]
    found = jax.jit(lambda y: recovery.row_contributions(fit, cols, y, 11))(values)
    whole = jax.jit(
        lambda values: (
            fit.transform(np.zeros(5, int), cols, values, 1) @ fit.low_rank.right[11]
        )[0]
    )
    assert_close(found.value, whole(values), condition=1e4)
    total = jnp.sum(found.contributions) + found.rest
    assert_close(total, found.value, condition=1e4)
    without = found.value - whole(values.at[2].set(0))
    assert_close(found.contributions[2], without, condition=1e4)


@pytest.mark.slow
def test_a_robust_fit_is_refused(fit):
    robust = dataclasses.replace(fit[0], robust=True)
    with pytest.raises(ValueError, match="fit with robust=False"):
        recovery.row_contributions(robust, jnp.array([0]), jnp.array([1.0]), 2)

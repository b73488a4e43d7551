"""The threshold of groups of entries, and the programs that it is part of."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax.linalg import singular_values, soft_threshold
from lrjax.recovery.separation.augmented_lagrangian import separate
from lrjax.recovery.separation.groups import ENTRIES, Groups

from ..helpers import assert_close


M, N = 7, 10
KINDS = [ENTRIES, Groups(1, None), Groups(None, 1), Groups(3, 4), Groups(None, None)]


def blocks(groups):
    rows, cols = groups.rows or M, groups.cols or N
    for i in range(0, M, rows):
        for j in range(0, N, cols):
            yield slice(i, i + rows), slice(j, j + cols)


@pytest.mark.slow_but("groups0", "groups1")
@pytest.mark.parametrize("groups", KINDS)
def test_the_projection_is_that_of_each_block(groups, getkey):
    x = jr.normal(getkey(), (M, N))
    radius = 0.5 * groups.size(x.shape) ** 0.5
    got, reached = groups.project(x, radius), groups.reach(x, radius)
    for block in blocks(groups):
        length = float(jnp.linalg.norm(x[block]))
        assert_close(got[block], x[block] * min(1, radius / length), rtol=1e-5)
        assert (np.asarray(reached[block]) == (length > radius)).all()


@pytest.mark.parametrize("groups", KINDS)
def test_the_transpose_and_rows_that_are_free(groups, getkey):
    x = jr.normal(getkey(), (M, N))
    assert_close(groups.T.project(x.T, 0.5).T, groups.project(x, 0.5), rtol=1e-6)
    if groups.rows != 1:
        return
    radius = jnp.where(jnp.arange(M) < 2, jnp.inf, 0.5)[:, None]
    got = groups.project(x, radius)
    assert jnp.array_equal(got[:2], x[:2])
    assert not groups.reach(x, radius)[:2].any()
    assert_close(got[2:], groups.project(x[2:], 0.5), rtol=1e-6)


@pytest.mark.slow
def test_with_noise_alone_it_is_the_threshold_of_singular_values(getkey, x64):
    """``min ‖L‖_* + ‖matrix − L‖²/2τ``, where errors cost too much to be any."""
    x = jr.normal(getkey(), (M, N), jnp.float64).T
    level = 0.5 * singular_values(x)[0]
    basis = jnp.eye(M)
    parts = separate(
        x,
        jnp.ones_like(x, bool),
        x,
        jnp.linalg.svd(x, full_matrices=False)[2].T @ basis,
        sparse_weight=1e3,
        penalty=1.25 / singular_values(x)[0],
        tol=1e-10,
        max_steps=400,
        noise=level,
    )
    assert_close(parts.values, soft_threshold(singular_values(x), level), rtol=1e-6)
    assert not parts.sparse.any()

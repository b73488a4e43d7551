"""Semidefinite programs in factors, and the proof that comes with the solution."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import recovery
from tests.helpers import assert_close


N = 12
DIAGONAL = recovery.Entries(jnp.arange(N), jnp.arange(N), (N, N))


@functools.partial(jax.jit, static_argnames="rank")
def solved(cost, key, rank=None):
    targets = jnp.ones(N, cost.dtype)
    return recovery.solve_semidefinite(cost, DIAGONAL, targets, rank=rank, key=key)


def symmetric(key):
    x = jr.normal(key, (N, N))
    return x + x.T


def test_the_conditions_of_a_minimum_hold():
    """Feasible, complementary, and a dual slack without negative eigenvalue, in NumPy."""
    with jax.enable_x64():
        cost = symmetric(jr.key(3)).astype(jnp.float64)
        found = solved(cost, jr.key(4))
        assert found.certified
        y, c = np.asarray(found.factor), np.asarray(cost)
        slack = c - np.diag(np.asarray(found.dual))
        scale = np.linalg.norm(c, 2)
        assert np.abs(np.sum(y**2, axis=1) - 1).max() < 1e-6
        assert np.linalg.norm(slack @ y) < 1e-5 * scale
        assert np.linalg.eigvalsh(slack)[0] > -1e-6 * scale
        # So the gap closes: no other X is better.
        assert abs(found.value - found.dual_value) < 1e-5 * scale
        assert_close(found.x.materialize(), found.factor @ found.factor.T)


@pytest.mark.slow
def test_the_unit_of_the_cost_does_not_matter(getkey):
    cost, key = symmetric(getkey()), getkey()
    one, other = solved(cost, key), solved(1e6 * cost, key)
    assert other.certified
    assert_close(other.value, 1e6 * one.value, condition=1e5)


@pytest.mark.slow
def test_too_low_a_rank_is_not_certified():
    """The maximum cut of an odd cycle: rank one cuts edges, and says so."""
    i = jnp.arange(N - 1)
    cost = jnp.zeros((N, N)).at[i, (i + 1) % (N - 1)].set(0.25)
    found = solved(cost + cost.T, jr.key(0), rank=1)
    assert found.converged
    assert not found.certified
    assert found.least_eigenvalue < -0.01
    # Half the edges less the value: an odd cycle cannot be cut but for one edge.
    relaxed = solved(cost + cost.T, jr.key(0))
    assert relaxed.certified
    want = (N - 1) / 2 * (1 + np.cos(np.pi / (N - 1)))
    assert_close((N - 1) / 2 - relaxed.value, jnp.float32(want), condition=1e5)


@pytest.mark.slow
def test_the_theta_of_a_pentagon():
    """Lovász's number of the cycle of five is √5; an operator of one's own."""

    class Theta(recovery.Operator):
        shape = (5, 5)

        def __call__(self, x):
            i = jnp.arange(5)
            edges = jnp.sum(x.left[i] * x.right[(i + 1) % 5], axis=1)
            return jnp.concatenate([jnp.sum(x.left * x.right)[None], edges])

    targets = jnp.zeros(6).at[0].set(1)
    ones = jnp.ones((5, 1))
    found = recovery.solve_semidefinite(
        lambda y: -(ones @ (ones.T @ y)), Theta(), targets, key=jr.key(1)
    )
    assert found.certified
    assert_close(found.value, -jnp.sqrt(5.0), condition=1e5)


@pytest.mark.slow
def test_members_are_those_of_the_loop(getkey):
    costs = jnp.stack([symmetric(getkey()) for _ in range(2)])
    keys = jr.split(getkey(), 2)
    together = jax.vmap(solved)(costs, keys)
    for k in range(2):
        alone = solved(costs[k], keys[k])
        assert_close(together.value[k], alone.value, condition=1e5)


def test_bad_input_is_refused():
    solve, key = recovery.solve_semidefinite, jr.key(0)
    with pytest.raises(ValueError, match=r"The cost must be \(12, 12\)"):
        solve(jnp.ones((3, 3)), DIAGONAL, jnp.ones(N), key=key)
    with pytest.raises(ValueError, match=r"measurements of shape \(12,\), targets has"):
        solve(jnp.ones((N, N)), DIAGONAL, jnp.ones(3), key=key)
    with pytest.raises(ValueError, match="The rank must be from 1 to 12, got 13"):
        solve(jnp.ones((N, N)), DIAGONAL, jnp.ones(N), key=key, rank=13)
    wide = recovery.Entries(jnp.arange(2), jnp.arange(2), (2, 3))
    with pytest.raises(ValueError, match=r"square matrices, got \(2, 3\)"):
        solve(jnp.ones((2, 2)), wide, jnp.ones(2), key=key)
    assert isinstance(solved(jnp.eye(N), key).x, lrjax.LowRank)

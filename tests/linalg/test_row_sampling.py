"""Leverage, Lewis weights, sensitivities, and what samples of rows keep."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.optimize import linprog

from lrjax import linalg
from tests.helpers import assert_close


M, N = 30, 3


@pytest.fixture
def uneven(getkey):
    """Rows of very different size, columns in units of their own."""
    sizes = jnp.exp(2 * jr.normal(getkey(), (M, 1)))
    return sizes * jr.normal(getkey(), (M, N)) * jnp.array([[1.0, 1e3, 1e-3]])


@pytest.mark.slow
def test_leverage_is_the_diagonal_of_the_projection(uneven):
    with jax.enable_x64():
        x = jnp.asarray(np.asarray(uneven, np.float64))
        q = np.linalg.qr(np.asarray(x))[0]
        assert_close(linalg.leverage_scores(x), np.sum(q**2, axis=1), condition=1e4)
        ridge = 0.3
        inverse = np.linalg.inv(np.asarray(x.T @ x) + ridge * np.eye(N))
        want = np.einsum("ij,jk,ik->i", x, inverse, x)
        got = linalg.leverage_scores(x, ridge=ridge)
        assert_close(got, want, condition=1e10)


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.5, 1.0, 1.7, 3.0])
def test_lewis_weights_solve_their_equation_and_sum_to_the_rank(p, uneven):
    w = linalg.lewis_weights(uneven, p, steps=80)
    assert_close(jnp.sum(w), jnp.asarray(N, w.dtype), condition=1e3)
    rescaled = uneven * (w ** (0.5 - 1 / p))[:, None]
    # Then the weights are the leverage of the rescaled rows.
    assert_close(linalg.leverage_scores(rescaled), w, condition=1e4)


def test_sensitivities_enclose_the_linear_program(uneven):
    """For p = 1 the minimum of ``‖X v‖₁`` with ``x_i·v = 1`` is a linear program."""
    with jax.enable_x64():
        x = np.asarray(uneven, np.float64)
        bounds = jax.jit(lambda x: linalg.lp_sensitivities(x, 1.0, steps=60))(x)
        exact = []
        for row in x[:6]:
            cost = np.r_[np.zeros(N), np.ones(M)]
            above = np.block([[x, -np.eye(M)], [-x, -np.eye(M)]])
            equal = np.r_[row, np.zeros(M)][None]
            limits = [(None, None)] * N + [(0, None)] * M
            found = linprog(cost, above, np.zeros(2 * M), equal, [1.0], limits)
            exact.append(1 / found.fun)
        lower, upper = np.asarray(bounds.lower[:6]), np.asarray(bounds.upper[:6])
        assert (lower <= np.multiply(exact, 1 + 1e-9)).all()
        assert (upper >= np.multiply(exact, 1 - 1e-9)).all()
        assert (lower >= 0.97 * np.asarray(exact)).all()


def test_with_p_two_they_are_leverage_scores(uneven):
    bounds = linalg.lp_sensitivities(uneven, 2.0, steps=3)
    want = linalg.leverage_scores(uneven)
    assert_close(bounds.lower, want, condition=1e3)
    assert_close(bounds.upper, want, condition=1e3)


def test_a_weighted_sample_is_unbiased(uneven):
    """The mean over samples of a weighted sum is the sum, within five standard errors."""
    values = np.asarray(uneven[:, 0] ** 2)
    scores = linalg.leverage_scores(uneven)
    draw = lambda key: linalg.sample_rows(scores, 40, key=key)
    rows, weights = jax.jit(jax.vmap(draw))(jr.split(jr.key(3), 400))
    sums = np.sum(np.asarray(weights) * values[np.asarray(rows)], axis=1)
    error = np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - np.sum(values)) < 5 * error
    assert error < 0.2 * np.sum(values)

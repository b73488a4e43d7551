"""Mean squared gradients of single examples."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from lrjax.metrics import diagonal_fisher

from ..helpers import assert_close


COUNT, SIZE = 11, 4


@pytest.fixture
def data(x64, getkey):
    x = jr.normal(getkey(), (COUNT, SIZE), jnp.float64)
    return x, jr.normal(getkey(), (COUNT,), jnp.float64)


def loss(params, x, y):
    return (x @ params["w"] + params["b"] - y) ** 2 / 2


@pytest.mark.parametrize("batch_size", [1, 4, 11, 20])
def test_of_least_squares_it_is_squared_residuals_times_inputs(data, getkey, batch_size):
    x, y = data
    params = {"w": jr.normal(getkey(), (SIZE,), jnp.float64), "b": jnp.zeros((), x.dtype)}
    squares = (x @ params["w"] - y) ** 2
    want = {"w": squares @ x**2 / COUNT, "b": jnp.mean(squares)}
    got = jax.jit(lambda p, *data: diagonal_fisher(loss, p, *data, batch_size=batch_size))(
        params, x, y
    )
    assert_close(got, want)


def test_with_drawn_labels_it_estimates_the_fisher_information(data, getkey):
    """Of a Gaussian of variance one: mean squares of the inputs, whatever the labels."""
    x, _ = data
    draws = 4000
    params = {"w": jr.normal(getkey(), (SIZE,), jnp.float64), "b": jnp.zeros((), x.dtype)}
    noise = jr.normal(getkey(), (draws, COUNT), jnp.float64)
    x = jnp.tile(x, (draws, 1))
    y = x @ params["w"] + noise.ravel()
    got = diagonal_fisher(loss, params, x, y, batch_size=draws * COUNT)["w"]
    # Squares of the noise have variance 2: five standard errors of their mean.
    error = jnp.sqrt(2 * jnp.mean(x**4, axis=0) / (draws * COUNT))
    assert jnp.all(jnp.abs(got - jnp.mean(x**2, axis=0)) < 5 * error)


def test_narrow_gradients_are_summed_in_float32():
    params = {"w": jnp.ones(SIZE, jnp.bfloat16), "b": jnp.zeros((), jnp.bfloat16)}
    x, y = jnp.ones((COUNT, SIZE), jnp.bfloat16), jnp.zeros(COUNT, jnp.bfloat16)
    got = diagonal_fisher(loss, params, x, y)
    assert got["w"].dtype == jnp.float32
    assert jnp.all(got["w"] == SIZE**2)


def test_what_are_no_examples_is_refused(data):
    x, y = data
    params = {"w": jnp.zeros(SIZE), "b": jnp.zeros(())}
    for examples, size in ((x, y[:3]), 1), ((), 1), ((x, y), 0):
        with pytest.raises(ValueError, match="examples along the first axis"):
            diagonal_fisher(loss, params, *examples, batch_size=size)

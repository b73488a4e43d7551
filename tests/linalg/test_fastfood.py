"""Random projections without a matrix, beside the matrices of their definition."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.linalg

from lrjax.linalg import fastfood, walsh_hadamard

from ..helpers import relative_error


@pytest.mark.slow_but("0", "1")
@pytest.mark.parametrize("bits", [0, 1, 5, 9])
def test_the_transform_is_that_of_hadamard_matrices(getkey, bits):
    x = jr.normal(getkey(), (2, 1 << bits))
    got = walsh_hadamard(x)
    want = np.asarray(x, np.float64) @ scipy.linalg.hadamard(1 << bits)
    assert relative_error(got, want) < 1e-6
    assert relative_error(walsh_hadamard(got), x * (1 << bits)) < 1e-6


@pytest.mark.slow
def test_the_map_is_that_of_its_definition(getkey, x64):
    key, d, size, n = getkey(), 20, 50, 64
    k_sign, k_order, k_scale = jr.split(key, 3)
    h = scipy.linalg.hadamard(n).astype(np.float64)
    signs = np.diag(jr.rademacher(k_sign, (n,), jnp.float64))
    shuffle = np.eye(n)[np.asarray(jr.permutation(k_order, n))]
    scales = np.asarray(jr.normal(k_scale, (n,), jnp.float64))
    p = (h @ np.diag(scales) @ shuffle @ h @ signs)[:size, :d]
    p = p / np.sqrt(size * (scales**2).sum())
    x = jr.normal(getkey(), (3, d), jnp.float64)
    f = lambda x: fastfood(x, size, key=key)
    assert relative_error(f(x), np.asarray(x) @ p.T) < 1e-12
    assert relative_error(jax.vmap(f)(x), f(x)) < 1e-12
    y = jr.normal(getkey(), (3, size), jnp.float64)
    assert relative_error(jax.vjp(f, x)[1](y)[0], np.asarray(y) @ p) < 1e-12


@pytest.mark.slow
def test_columns_have_length_one_and_are_nearly_orthogonal(getkey):
    d, size = 40, 2000
    p = fastfood(jnp.eye(d), size, key=getkey())
    lengths = np.linalg.norm(p, axis=1)
    # Sums over 2000 numbers vary by 2000^-1/2; some of that over 40 columns, 780 pairs.
    assert abs(lengths - 1).max() < 5 / size**0.5
    assert abs(np.asarray(p @ p.T) - np.diag(lengths**2)).max() < 10 / size**0.5


@pytest.mark.slow_but("1-1")
@pytest.mark.parametrize(("d", "size"), [(1, 1), (5, 3), (3, 5), (8, 8)])
def test_any_sizes(d, size):
    y = fastfood(jnp.ones(d, jnp.bfloat16), size, key=jr.key(0))
    assert y.shape == (size,)
    assert y.dtype == jnp.bfloat16
    assert bool(jnp.all(jnp.isfinite(y)))


def test_refusals():
    with pytest.raises(ValueError, match="power of two of numbers, got 6"):
        walsh_hadamard(jnp.ones(6))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        fastfood(jnp.ones(4), 0, key=jr.key(0))

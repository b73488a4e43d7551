"""What is true of the ranks of every spectrum, beside NumPy in float64."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import metrics

from ..helpers import random_low_rank, with_spectrum


RANKS = (
    metrics.stable_rank,
    metrics.nuclear_rank,
    metrics.participation_ratio,
    metrics.effective_rank,
)


@pytest.mark.slow
def test_ranks_of_a_spectrum(getkey, x64):
    values = np.array([5.0, 3.0, 1.0, 0.5])
    x = with_spectrum(getkey(), 9, 6, values, jnp.float64)
    p = values / values.sum()
    want = (
        (values**2).sum() / 25,
        values.sum() / 5,
        (values**2).sum() ** 2 / (values**4).sum(),
        np.exp(-(p * np.log(p)).sum()),
    )
    np.testing.assert_allclose([rank(x) for rank in RANKS], want, rtol=1e-6)
    assert metrics.numerical_rank(x) == 4
    assert metrics.numerical_rank(x, 0.15) == 3
    shares = np.cumsum(values**2) / (values**2).sum()
    for k in range(4):
        assert metrics.energy_rank(x, shares[k] - 1e-6) == k + 1
        assert metrics.energy_rank(x, min(1.0, shares[k] + 1e-6)) == min(4, k + 2)


@pytest.mark.slow
def test_the_ranks_are_ordered_and_invariant(getkey):
    """1 ≤ stable ≤ nuclear, participation ≤ rank; effective ≤ rank."""
    x = random_low_rank(getkey(), 12, 9, 4)
    stable, nuclear, participation, effective = (float(rank(x)) for rank in RANKS)
    assert 1 <= stable <= nuclear <= 4 * (1 + 1e-5)
    assert stable <= participation <= 4 * (1 + 1e-5)
    assert effective <= 4 * (1 + 1e-5)
    dense = x.materialize()
    turn = jnp.linalg.qr(jr.normal(getkey(), (12, 12)))[0]
    for rank in RANKS:
        for other in (dense, 7 * dense, turn @ dense, dense.T, lrjax.svd(x)):
            np.testing.assert_allclose(rank(other), rank(x), rtol=1e-4)


@pytest.mark.slow
def test_flat_spectra_and_zero():
    flat = jnp.stack([jnp.eye(5), jnp.zeros((5, 5))])
    for rank in RANKS:
        np.testing.assert_allclose(rank(flat), [5, 0], rtol=1e-6)
    assert metrics.numerical_rank(flat).tolist() == [5, 0]
    assert jax.jit(metrics.energy_rank)(flat, 1.0).tolist() == [5, 0]
    assert jax.vmap(lambda e: metrics.energy_rank(flat[0], e))(
        jnp.array([0.1, 0.5, 0.9])
    ).tolist() == [1, 3, 5]


@pytest.mark.slow
def test_local_rank_of_linear_layers_is_that_of_their_product():
    keys = jr.split(jr.key(0), 3)
    first, second = random_low_rank(keys[0], 7, 6, 3), random_low_rank(keys[1], 5, 7, 4)
    layer = lambda x: second.matvec(first.matvec(x))
    x = jr.normal(keys[2], (8, 6))
    assert metrics.local_rank(layer, x, tol=1e-5) == 3
    gate = lambda x: jax.nn.relu(layer(x))
    passing = jax.vmap(layer)(x) > 0
    assert metrics.local_rank(gate, x, tol=1e-5) == np.minimum(passing.sum(1), 3).mean()


def test_ranks_of_layers_with_images(getkey):
    x = jr.normal(getkey(), (4, 2, 3))
    assert metrics.local_rank(lambda image: image @ jnp.ones((3, 2)), x) == 2
    with pytest.raises(TypeError):
        metrics.local_rank(lambda image: image, jnp.float32(1.0))

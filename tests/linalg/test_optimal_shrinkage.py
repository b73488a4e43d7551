import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax.linalg import optimal_shrinkage


@pytest.mark.parametrize("shape", [(40, 160), (160, 40), (50, 50)])
def test_gives_back_the_strength_times_both_cosines(shape):
    """The closed form of the spiked model: what is left of a spike, and of none."""
    beta, long = min(shape) / max(shape), max(shape)
    t = np.linspace(1.05, 6, 30) * beta**0.25
    seen = np.sqrt((1 + t**2) * (beta + t**2)) / t
    cosines = (1 - beta * (1 + t**2) / (t**2 * (t**2 + beta))) * (
        1 - (beta + t**2) / (t**2 * (t**2 + 1))
    )
    sigma = 0.3
    unit = sigma * long**0.5
    got = optimal_shrinkage(jnp.asarray(seen * unit, jnp.float32), shape, sigma)
    # Near the threshold the difference of squares cancels.
    np.testing.assert_allclose(
        got, t * np.sqrt(cosines) * unit, rtol=1e-3, atol=1e-2 * unit
    )
    edge = jnp.asarray([0.99, 0.5, 0.0]) * (1 + beta**0.5) * unit
    np.testing.assert_array_equal(optimal_shrinkage(edge, shape, sigma), 0)


def test_the_noise_is_that_of_the_median(getkey):
    x = 0.7 * jr.normal(getkey(), (100, 150))
    values = jnp.linalg.svd(x, compute_uv=False).at[0].set(100.0)
    got, want = optimal_shrinkage(values, x.shape), optimal_shrinkage(values, x.shape, 0.7)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-2)
    assert int(jnp.sum(got > 0)) <= 3  # the edge has fluctuations


def test_without_noise_nothing_is_shrunk():
    values = jnp.array([3.0, 0.0, 0.0])
    np.testing.assert_array_equal(optimal_shrinkage(values, (3, 5)), values)
    with pytest.raises(ValueError, match="all 3 singular values"):
        optimal_shrinkage(values[:1], (3, 5))

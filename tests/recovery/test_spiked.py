import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import recovery
from lrjax.linalg import optimal_shrinkage


SHAPE = (200, 400)
STRENGTHS = [6.0, 3.0, 1.8, 0.3]  # the threshold is (1/2)^¼ = 0.841
FEW = 6 / SHAPE[0] ** 0.5  # fluctuations are of the order one over the root of the size


@pytest.fixture(scope="module")
def model():
    return recovery.spiked_model(jr.key(0), SHAPE, STRENGTHS)


def test_singular_values_and_overlaps_are_those_of_the_limit(model):
    left, values, right = jnp.linalg.svd(model.matrix, full_matrices=False)
    np.testing.assert_allclose(values[:3], model.values[:3], rtol=FEW)
    np.testing.assert_allclose(values[3], model.values[3], rtol=FEW)  # the edge
    u = model.truth.left / jnp.asarray(STRENGTHS)[None, :]
    cosines = jnp.sum(u * left[:, :4], axis=0) ** 2
    np.testing.assert_allclose(cosines, model.left_overlap, atol=FEW)
    cosines = jnp.sum(model.truth.right * right[:4].T, axis=0) ** 2
    np.testing.assert_allclose(cosines, model.right_overlap, atol=FEW)
    np.testing.assert_allclose(model.threshold, 0.5**0.25, rtol=1e-6)


def test_the_shrinkage_counts_the_spikes_above_the_threshold(model):
    values = jnp.linalg.svd(model.matrix, compute_uv=False)
    shrunk = optimal_shrinkage(values, SHAPE)  # told neither rank nor noise
    want = jnp.asarray(STRENGTHS) * jnp.sqrt(model.left_overlap * model.right_overlap)
    assert int(jnp.sum(shrunk > 0.5)) == 3  # the edge fluctuates: tiny values may be left
    np.testing.assert_allclose(shrunk[:3], want[:3], rtol=FEW)


@pytest.mark.slow
def test_completion_finds_the_spikes_above_the_threshold(model):
    """Every entry seen: the rank is that of the transition, the error that of shrinkage."""
    entries = recovery.matrix_entries(20 * model.matrix)
    fit = jax.jit(lrjax.fit_completion, static_argnums=3, static_argnames="rank")(
        *entries, rank=10
    )
    assert int(fit.rank) == 3
    left, values, right = jnp.linalg.svd(model.matrix, full_matrices=False)
    shrunk = (left * optimal_shrinkage(values, SHAPE)[None, :]) @ right
    distance = lambda x: float(jnp.linalg.norm(x - model.truth.materialize()))
    assert distance(fit.low_rank.materialize() / 20) < 1.1 * distance(shrunk)


def test_noise_sets_the_unit(model):
    other = recovery.spiked_model(jr.key(0), SHAPE, 5 * np.asarray(STRENGTHS), noise=5.0)
    np.testing.assert_allclose(other.matrix, 5 * model.matrix, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(other.values, 5 * model.values, rtol=1e-5)
    np.testing.assert_allclose(other.left_overlap, model.left_overlap, atol=1e-5)
    with pytest.raises(ValueError, match="at most 2 numbers"):
        recovery.spiked_model(jr.key(0), (2, 3), [1.0, 1.0, 1.0])

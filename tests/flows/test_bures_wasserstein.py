import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.linalg import sqrtm

from lrjax import flows, gradient_flow

from ..helpers import all_finite, assert_close, with_spectrum


SPECTRUM = jnp.array([4.0, 2.0, 1.0, 0.5, 0.25])


def covariance(key, values=SPECTRUM):
    q = jnp.linalg.qr(jr.normal(key, (len(values), len(values))))[0]
    return (q * values[None, :]) @ q.T


def dense_loss(x, target):
    """By the root of the covariance: ``(Σ^½ X Xᵀ Σ^½)^½`` has the trace of ``|Σ^½ X|``."""
    x, root = np.asarray(x), np.real(sqrtm(np.asarray(target)))
    overlap = np.sum(np.linalg.svd(root @ x)[1])
    return 0.5 * (np.sum(x**2) + np.trace(target)) - overlap


def draw(getkey, rank):
    """A factor of full rank, that of ``Xᵀ Σ X`` with a condition of at most 100."""
    values = jnp.linspace(1.0, 0.4, rank)
    return with_spectrum(getkey(), 5, rank, values, dtype=jnp.float64)


@pytest.mark.slow_but("5")
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_loss_and_gradient_are_those_of_the_definition(rank, getkey):
    target, x = covariance(getkey()), draw(getkey, rank)
    loss, slope = jax.jit(jax.value_and_grad(flows.bures_wasserstein_loss))(x, target)
    assert np.abs(loss - dense_loss(x, target)) <= 1e-12
    values, vectors = np.linalg.eigh(x.T @ target @ x)
    inverse_root = vectors @ np.diag(values**-0.5) @ vectors.T
    assert_close(slope, x - target @ x @ inverse_root, rtol=1e-9)


def test_the_loss_is_a_distance(getkey):
    target = covariance(getkey())
    x = jnp.linalg.cholesky(target)
    turned = x @ jnp.linalg.qr(jr.normal(getkey(), (5, 5)))[0]
    assert jnp.abs(flows.bures_wasserstein_loss(turned, target)) <= 1e-12
    y = draw(getkey, 5)
    there = flows.bures_wasserstein_loss(x, y @ y.T)
    assert_close(there, flows.bures_wasserstein_loss(y, target), rtol=1e-9)  # symmetric


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "eigenvectors"])
def test_the_flow_goes_straight(kind, getkey):
    target = covariance(getkey())
    if kind == "full":
        start = draw(getkey, 5)
    else:
        vectors = jnp.linalg.eigh(target)[1][:, 3:]  # others are saddles
        start = vectors @ jr.normal(getkey(), (2, 2))
    times = jnp.array([0.0, 0.3, 2.0, 30.0])
    flow = gradient_flow(
        flows.bures_wasserstein_loss, start, target, t1=30.0, ts=times, rtol=1e-9
    ).params
    exact = jax.jit(flows.bures_wasserstein_flow)
    for t, x in zip(times, flow, strict=True):
        assert_close(x, exact(t, start, target), rtol=1e-7)
    if kind == "full":
        assert_close(flow[-1] @ flow[-1].T, target, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_thin_factors_end_at_the_leading_eigenvectors(rank, getkey):
    target = covariance(getkey())
    start = draw(getkey, rank)
    end = gradient_flow(
        flows.bures_wasserstein_loss, start, target, t1=60.0, rtol=1e-8
    ).params
    limit = flows.bures_wasserstein_limit(target, rank)
    values, vectors = np.linalg.eigh(target)
    leading = vectors[:, -rank:] @ np.diag(values[-rank:]) @ vectors[:, -rank:].T
    assert_close(limit @ limit.T, leading)
    assert_close(end @ end.T, leading, rtol=1e-6)
    least = 0.5 * np.sum(values[:-rank])
    np.testing.assert_allclose(flows.bures_wasserstein_loss(limit, target), least)


@pytest.mark.slow
def test_singular_factors_and_targets_give_finite_numbers():
    slope = jax.jit(jax.value_and_grad(flows.bures_wasserstein_loss))
    target = jnp.diag(jnp.array([2.0, 1.0, 0.0]))
    for dtype in (jnp.float32, jnp.float64, jnp.bfloat16):
        for x in (jnp.zeros((3, 2)), jnp.ones((3, 2)), jnp.eye(3)[:, 1:]):
            assert all_finite(slope(x.astype(dtype), target.astype(dtype)))
        ends = jax.vmap(flows.bures_wasserstein_flow, (0, None, None))
        found = ends(jnp.ones(2, dtype), jnp.ones((3, 2), dtype), target.astype(dtype))
        assert all_finite(found)

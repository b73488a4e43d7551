"""The power method within a set: special cases, and a spike below the noise."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax import recovery
from tests.helpers import assert_close


def covariance(key, n):
    """Eigenvalues 1, ½, ¼, … with random vectors."""
    q = np.linalg.qr(np.asarray(jr.normal(key, (n, n))))[0]
    return jnp.asarray((q * 0.5 ** np.arange(n)) @ q.T), jnp.asarray(q[:, 0])


def test_without_a_projection_it_is_the_power_method(getkey):
    m, leading = covariance(getkey(), 8)
    start = jr.normal(getkey(), (8,))
    found = recovery.projected_power(lambda v: m @ v, lambda v: v, start, tol=1e-6)
    assert found.converged
    assert_close(found.vector * jnp.sign(found.vector @ leading), leading, condition=1e3)
    assert_close(found.value, jnp.float32(1.0), condition=100)


def test_in_the_range_of_a_linear_model_it_is_pca_there(getkey):
    m, _ = covariance(getkey(), 8)
    basis = jnp.linalg.qr(jr.normal(getkey(), (8, 3)))[0]
    nearest = recovery.NearestInRange(lambda z: basis @ z, jr.normal(getkey(), (2, 3)), 40)
    run = lambda start: recovery.projected_power(lambda v: m @ v, nearest, start, tol=1e-5)
    found = jax.jit(run)(jr.normal(getkey(), (8,)))
    values, vectors = np.linalg.eigh(np.asarray(basis.T @ m @ basis))
    want = np.asarray(basis) @ vectors[:, -1]
    assert_close(found.value, jnp.float32(values[-1]), condition=1e4)
    assert abs(abs(np.dot(found.vector, want)) - 1) < 1e-4


@pytest.mark.slow
def test_a_generative_model_finds_what_the_noise_hides():
    """Below the threshold of PCA, five draws: of several starts that of largest value."""
    n, k, strength = 60, 2, 0.9

    def draw(key):
        a, b, c, d, e = jr.split(key, 5)
        first, second = jr.normal(a, (20, k)), jr.normal(b, (n, 20))
        generator = lambda z: second @ jax.nn.relu(first @ z)
        truth = generator(jr.normal(c, (k,)))
        truth = truth / jnp.linalg.norm(truth)
        noise = jr.normal(d, (n, n)) / jnp.sqrt(2 * n)
        m = strength * jnp.outer(truth, truth) + noise + noise.T
        plain = jnp.linalg.eigh(m)[1][:, -1]
        latents = jr.normal(e, (4, k))
        nearest = recovery.NearestInRange(generator, latents, 10)
        run = lambda z: recovery.projected_power(
            lambda v: m @ v, nearest, generator(z), shift=2.0, max_steps=8
        )
        found = jax.vmap(run)(latents)
        best = found.vector[jnp.argmax(found.value)]
        return jnp.abs(plain @ truth), jnp.abs(best @ truth)

    plain, known = map(np.asarray, jax.jit(jax.vmap(draw))(jr.split(jr.key(0), 5)))
    assert np.mean(known) > np.mean(plain) + 0.3, (plain, known)
    assert np.sum(known > plain) >= 4, (plain, known)


def test_it_says_when_it_has_not_converged(getkey):
    m, _ = covariance(getkey(), 8)
    start = jr.normal(getkey(), (8,))
    power = recovery.projected_power(lambda v: m @ v, lambda v: v, start, max_steps=2)
    assert not power.converged
    assert power.steps == 2
    with pytest.raises(ValueError, match="tol must not be negative"):
        recovery.projected_power(lambda v: m @ v, lambda v: v, start, tol=-1.0)

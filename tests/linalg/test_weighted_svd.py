"""The weighted fit: equal forms, the error that is left, and what it beats."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax.linalg import weighted_svd

from ..helpers import relative_error


def product(fit):
    return (fit.left * fit.values[..., None, :]) @ fit.right.mT


def weighed_error(d, x, c_left, c_right):
    e = d - x
    return float(jnp.trace(c_left @ e @ c_right @ e.T))


def spd(key, n, samples):
    x = np.asarray(jr.normal(key, (samples, n), jnp.float64))
    return jnp.asarray(x.T @ x / samples)


def test_the_error_is_the_tail_and_no_other_matrix_has_less(getkey, x64):
    d = jr.normal(getkey(), (6, 5), jnp.float64)
    c_left, c_right = spd(getkey(), 6, 20), spd(getkey(), 5, 20)
    all_of_it = weighted_svd(d, c_left, c_right, 5)
    assert relative_error(product(all_of_it), d) < 1e-12
    fit = weighted_svd(d, c_left, c_right, 2)
    best = weighed_error(d, product(fit), c_left, c_right)
    assert best == pytest.approx(float((all_of_it.values[2:] ** 2).sum()), rel=1e-10)
    metric = fit.left.T @ c_left @ fit.left
    assert relative_error(metric, np.eye(2)) < 1e-12
    # A stationary point: no change of either factor makes the error smaller.
    e = d - product(fit)
    assert jnp.linalg.norm(c_left @ e @ c_right @ fit.right) < 1e-11
    assert jnp.linalg.norm(fit.left.T @ c_left @ e @ c_right) < 1e-11
    for size in (1e-3, 1.0):
        left = fit.left + size * jr.normal(getkey(), fit.left.shape, jnp.float64)
        other = product(fit._replace(left=left))
        assert weighed_error(d, other, c_left, c_right) > best


def test_with_the_moment_of_inputs_it_projects_on_the_outputs(getkey, x64):
    """Two published forms in one: V Vᵀ W with V the leading vectors of W C Wᵀ."""
    w, c = jr.normal(getkey(), (6, 8), jnp.float64), spd(getkey(), 8, 30)
    fit = weighted_svd(w, None, c, 3)
    _, vectors = np.linalg.eigh(np.asarray(w) @ c @ np.asarray(w).T)
    top = vectors[:, -3:]
    assert relative_error(product(fit), top @ top.T @ np.asarray(w)) < 1e-10


@pytest.mark.slow
def test_without_weights_it_is_the_svd(getkey):
    d = jr.normal(getkey(), (2, 6, 4))
    fit = jax.jit(lambda d: weighted_svd(d, None, None, 2))(d)
    u, s, vt = np.linalg.svd(np.asarray(d, np.float64), full_matrices=False)
    want = (u[..., :2] * s[:, None, :2]) @ vt[:, :2]
    assert relative_error(product(fit), want) < 1e-5
    eyes = jnp.stack([jnp.eye(4)] * 2)
    again = jax.vmap(lambda d, c: weighted_svd(d, None, c, 2))(d, eyes)
    assert relative_error(product(again), want) < 1e-5


def test_directions_without_weight_are_left_out(getkey, x64):
    x = jr.normal(getkey(), (2, 5), jnp.float64)
    d = jr.normal(getkey(), (4, 5), jnp.float64)
    fit = weighted_svd(d, None, x.T @ x, 2)
    onto = jnp.linalg.pinv(x) @ x
    assert relative_error(product(fit), d @ onto) < 1e-8


def test_of_the_identity_it_is_the_basis_in_which_both_moments_are_equal(getkey, x64):
    """Activations in it, and gradients in it, have the values as their second moment."""
    activations, gradients = spd(getkey(), 5, 20), spd(getkey(), 5, 20)
    fit = weighted_svd(jnp.eye(5), gradients, activations, 5)
    root = jnp.sqrt(fit.values)[:, None]
    into, back = root * fit.right.T, fit.left * root.T
    want = jnp.diag(fit.values)
    np.testing.assert_allclose(into @ activations @ into.T, want, atol=1e-11)
    np.testing.assert_allclose(back.T @ gradients @ back, want, atol=1e-11)
    np.testing.assert_allclose(back @ into, np.eye(5), atol=1e-11)


def test_refusals(shapes_unchecked):
    with pytest.raises(ValueError, match=r"rank must be between 1 and"):
        weighted_svd(jnp.eye(3), None, None, 4)
    with pytest.raises(ValueError, match=r"c_right of shape \(3, 3\), got \(2, 2\)"):
        weighted_svd(jnp.eye(3), None, jnp.eye(2), 1)

"""Subspace iteration and Procrustes rotations."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax.linalg import (
    cross,
    orthonormalize,
    principal_angles,
    procrustes,
    product_svd,
    subspace_iteration,
    times,
)
from tests.helpers import all_finite, assert_close, tol, with_spectrum


@pytest.mark.slow
@pytest.mark.parametrize("method", ["qr", "cholesky"])
def test_contracts_at_the_square_of_the_gap(getkey, x64, method):
    # Equal leading values and a far third one: the rate holds from the first steps on,
    # wherever the start lies.
    a = np.asarray(with_spectrum(getkey(), 30, 20, [3.0, 3.0, 1.0, 0.1], jnp.float64))
    leading = np.linalg.svd(a)[2][:2].T

    @jax.jit
    def run(a, leading, start):
        more = lambda start, steps: subspace_iteration(
            lambda v: times(a, v),
            lambda u: cross(a, u),
            start,
            steps=steps,
            orthonormalize=functools.partial(orthonormalize, method=method),
        )
        bases = [more(start, 3)]
        bases += [more(bases[0], 1), more(bases[0], 2)]
        return bases[-1], [jnp.tan(principal_angles(b, leading)[-1]) for b in bases]

    basis, tangents = jax.device_get(run(a, leading, jr.normal(getkey(), (20, 2))))
    np.testing.assert_allclose(tangents[1] / tangents[0], 1 / 9, rtol=0.05)
    np.testing.assert_allclose(tangents[2] / tangents[1], 1 / 9, rtol=0.02)
    assert_close(basis.T @ basis, np.eye(2))


def test_a_symmetric_matrix_takes_one_product_a_step(getkey):
    a = jr.normal(getkey(), (3, 9, 9))
    a = a + a.mT
    start = jr.normal(getkey(), (3, 9, 2))
    calls = []

    def product(v):
        jax.debug.callback(lambda: calls.append(1))
        return times(a, v)

    once = subspace_iteration(product, None, start, steps=4)
    jax.effects_barrier()
    assert len(calls) == 4
    twice = subspace_iteration(product, product, start, steps=2)
    assert_close(once, twice, condition=1e3)
    assert subspace_iteration(product, None, start, steps=0) is start


def test_can_be_differentiated_with_a_rule_that_can(getkey, x64):
    """The derivative of the leading singular vector, once it has converged."""
    a = with_spectrum(getkey(), 8, 6, [3.0, 1.0, 0.5], jnp.float64)
    unit = lambda x: x / jnp.linalg.norm(x, axis=0, keepdims=True)
    start = jr.normal(getkey(), (6, 1))

    def value(a):
        v = subspace_iteration(
            lambda v: a @ v, lambda u: a.T @ u, start, steps=20, orthonormalize=unit
        )
        return jnp.sum((a @ v) ** 2)

    u, s, vt = np.linalg.svd(a)
    assert_close(
        jax.jit(jax.grad(value))(a), 2 * s[0] * np.outer(u[:, 0], vt[0]), rtol=1e-8
    )


def test_procrustes_is_the_best_orthogonal_matrix(getkey, x64):
    rng = np.random.default_rng(getkey.seed)
    x, y = rng.standard_normal((2, 2, 12, 4))
    rotation = jax.jit(lambda x, y: procrustes(cross(x, y)))
    q = np.asarray(rotation(x, y))
    assert_close(q.mT @ q, np.broadcast_to(np.eye(4), (2, 4, 4)))
    distance = lambda q: np.linalg.norm(x @ q - y, axis=(-2, -1))
    for _ in range(20):
        other = np.linalg.qr(q + 0.1 * rng.standard_normal((2, 4, 4)))[0]
        assert (distance(q) <= distance(other)).all()
    assert_close(rotation(x, x @ q), q, condition=100)


def test_procrustes_stays_orthogonal_where_nothing_is_shared():
    for overlap in (jnp.zeros((3, 3)), jnp.diag(jnp.array([2.0, 0.0, 0.0]))):
        q = procrustes(overlap)
        assert_close(q.T @ q, jnp.eye(3))
    assert q[0, 0] == pytest.approx(1)
    with pytest.raises(ValueError, match="square"):
        procrustes(jnp.ones((3, 2)))


@pytest.mark.parametrize("method", ["qr", "cholesky"])
def test_a_product_does_not_shrink_when_it_is_decomposed_again_and_again(getkey, method):
    rng = np.random.default_rng(getkey.seed)

    @jax.jit
    def again(left, right):
        found = product_svd(left, None, right, 40, method=method)
        return found.left * found.values[None], found.right

    left, right = (rng.standard_normal((n, 40)).astype(np.float32) for n in (60, 50))
    want = left @ right.T
    for _ in range(20):
        left, right = jax.device_get(again(left, right))
    size = np.linalg.norm(left @ right.T) / np.linalg.norm(want)
    assert abs(size - 1) < 3e-6
    assert_close(left @ right.T, want, rtol=1e-5)


def test_values_of_a_product_can_be_differentiated(getkey, x64):
    """Also where two of them coincide."""
    rng = np.random.default_rng(getkey.seed)
    left, right = rng.standard_normal((9, 3)), rng.standard_normal((7, 3))
    nuclear = lambda left, right: jnp.sum(product_svd(left, None, right, 3).values)
    slopes = jax.jit(jax.grad(nuclear, (0, 1)))
    u, _, vt = np.linalg.svd(left @ right.T, full_matrices=False)
    slope = u[:, :3] @ vt[:3]
    assert_close(slopes(left, right), (slope @ right, slope.T @ left), condition=1e3)
    eye = np.eye(9, 3)
    equal = slopes(eye, np.eye(7, 3))[0]
    assert all_finite(equal)
    assert_close(equal, eye, condition=10)


@pytest.mark.slow
def test_a_core_of_the_identity_may_be_left_out(getkey):
    left, right = jr.normal(getkey(), (2, 9, 3)), jr.normal(getkey(), (2, 7, 3))
    eye = jnp.broadcast_to(jnp.eye(3), (2, 3, 3))
    assert_close(product_svd(left, None, right, 2), product_svd(left, eye, right, 2))
    with pytest.raises(ValueError, match="between 1 and 3"):
        product_svd(left, None, right, 4)
    assert tol(left) > 0

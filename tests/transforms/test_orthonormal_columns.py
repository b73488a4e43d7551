"""Steps along the orthonormal columns, and back onto them."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import scipy.linalg

import lrjax
from tests.helpers import assert_close, random_low_rank, tol


def orthonormal(x):
    return jax.tree.map(lrjax.linalg.orthonormalize, x)


def fields(pull, gradient, x):
    tx = lrjax.landing_field(pull)
    return tx.update(gradient, tx.init(x), x)[0]


def test_the_field_is_the_riemannian_gradient_where_columns_are_orthonormal(getkey):
    gradient = random_low_rank(getkey(), 9, 6, 3)
    x = orthonormal(random_low_rank(getkey(), 9, 6, 3))
    riemannian = lambda g, x: g - x @ g.T @ x
    want = jax.tree.map(riemannian, gradient, x)
    for pull in (0.0, 1.0):
        field = fields(pull, gradient, x)
        assert_close(field, want, condition=10)
    overlap = np.asarray(x.left.T @ field.left)
    np.testing.assert_allclose(overlap, -overlap.T, atol=1e-5)  # it is a tangent


def test_the_two_terms_are_orthogonal_and_the_second_lands(getkey):
    gradient, x = (random_low_rank(getkey(), 9, 6, 3) for _ in range(2))
    along, both = fields(0.0, gradient, x), fields(2.0, gradient, x)
    off = jax.tree.map(lambda a, b: np.asarray(a - b, np.float64), both, along)
    for a, b in ((along.left, off.left), (along.right, off.right)):
        size = np.linalg.norm(a) * np.linalg.norm(b)
        assert abs(np.sum(a * b)) < tol(a, condition=10) * size
    distance = lambda x: jnp.sum((x.T @ x - jnp.eye(3)) ** 2) / 4
    want = jax.tree.map(lambda x: 2.0 * jax.grad(distance)(x), x)
    assert_close(jax.tree.map(jnp.float32, off), want, condition=100)


def test_a_step_ends_at_the_nearest_orthonormal_columns(getkey):
    x = orthonormal(random_low_rank(getkey(), 9, 6, 3))
    step = random_low_rank(getkey(), 9, 6, 3)
    tx = lrjax.keep_orthonormal()
    after = optax.apply_updates(x, tx.update(step, tx.init(x), x)[0])
    for new, old, d in zip(*map(jax.tree.leaves, (after, x, step)), strict=True):
        old, d = np.asarray(old, np.float64), np.asarray(d, np.float64)
        overlap = old.T @ d
        end = old + d - old @ (overlap + overlap.T) / 2
        np.testing.assert_allclose(new, scipy.linalg.polar(end)[0], atol=1e-5)


def test_no_step_moves_nothing_and_other_leaves_pass(getkey):
    x = {"pair": orthonormal(random_low_rank(getkey(), 9, 6, 3)), "core": jnp.ones((3, 3))}
    core = jr.normal(getkey(), (3, 3))
    still = {"pair": jax.tree.map(jnp.zeros_like, x["pair"]), "core": core}
    tx = lrjax.keep_orthonormal()
    got = tx.update(still, tx.init(x), x)[0]
    np.testing.assert_array_equal(got["core"], still["core"])
    assert max(np.max(np.abs(u)) for u in jax.tree.leaves(got["pair"])) < 1e-6

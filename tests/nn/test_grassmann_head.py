"""Classes as subspaces, and how training turns them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax.linalg import geodesic, orthonormalize, principal_angles
from tests.helpers import all_finite, assert_close, relative_error, tol
from tests.reference import grassmann as reference


def everywhere(path, shape):
    return True


def cross_entropy(head, x, target):
    return optax.softmax_cross_entropy_with_integer_labels(head(x), target)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3])
def test_logits_are_the_lengths_of_the_projections(getkey, k):
    head = lrjax.nn.GrassmannHead(8, 5, k, scale=7.0, key=getkey())
    xs = jr.normal(getkey(), (4, 8))
    got = jax.vmap(head)(xs)
    for x, y in zip(xs, got, strict=True):
        want = reference.logits(np.asarray(x, float), np.asarray(head.subspaces, float), 7)
        assert_close(y, want.astype(np.float32), condition=10)
        if k == 1:
            vectors = head.subspaces[..., 0]
            cosines = vectors @ x / jnp.linalg.norm(x)
            assert_close(y, 7 * jnp.abs(cosines), condition=10)
    assert_close(jax.vmap(head)(-3 * xs), got)  # neither the sign nor the length counts


@pytest.mark.slow
def test_stacks_dtypes_and_zero(getkey):
    keys = jr.split(getkey(), 2)
    make = lambda key: lrjax.nn.GrassmannHead(6, 3, 2, key=key)
    stack = eqx.filter_vmap(make)(keys)
    x = jr.normal(getkey(), (6,))
    both = eqx.filter_vmap(lambda head: head(x))(stack)
    assert_close(both[1], make(keys[1])(x))
    rough = lrjax.nn.GrassmannHead(6, 3, 2, dtype=jnp.bfloat16, key=keys[0])
    assert rough.subspaces.dtype == jnp.bfloat16
    assert rough(x.astype(jnp.bfloat16)).dtype == jnp.float32
    head = make(keys[0])
    value, slope = eqx.filter_value_and_grad(cross_entropy)(head, jnp.zeros(6), 1)
    assert_close(value, jnp.log(3.0))
    assert all_finite(slope)
    inside = jax.grad(lambda x: head(x)[0])(jnp.zeros(6))
    assert all_finite(inside)


@pytest.mark.parametrize("size", [1e-6, 0.3, 30.0])
def test_geodesic_is_the_rule_of_the_singular_values(getkey, size, x64):
    """Also of a direction with dependent columns, whose singular vectors are not unique."""
    s = orthonormalize(jr.normal(getkey(), (7, 3)))
    d = size * jr.normal(getkey(), (7, 3))
    d = d.at[:, 2].set(d[:, 1])
    got = geodesic(s, d)
    assert_close(got, reference.geodesic(np.asarray(s), np.asarray(d)), condition=1 + size)
    assert_close(got.T @ got, np.eye(3), condition=1 + size)


def test_angles_of_a_geodesic_are_the_singular_values(getkey, x64):
    s = orthonormalize(jr.normal(getkey(), (7, 3)))
    d = jr.normal(getkey(), (7, 3))
    d = d - s @ (s.T @ d)
    d = d / jnp.linalg.norm(d)  # below a right angle
    values = jnp.linalg.svd(d, compute_uv=False)
    assert_close(jnp.sort(principal_angles(s, geodesic(s, d))), values[::-1], condition=1e3)
    quarter = geodesic(geodesic(s, d / 2), 0 * d)
    assert relative_error(quarter, geodesic(s, d / 2)) < tol(d)
    np.testing.assert_array_equal(geodesic(s, jnp.zeros_like(d)), s)


@pytest.mark.slow
def test_one_column_is_a_great_circle(getkey):
    s = orthonormalize(jr.normal(getkey(), (6, 1)))
    g = jr.normal(getkey(), (6, 1))
    g = g - s * jnp.sum(s * g)
    angle = jnp.linalg.norm(g)
    want = s * jnp.cos(angle) + g / angle * jnp.sin(angle)
    assert_close(geodesic(s, g), want, condition=10)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2])
def test_training_is_riemannian_sgd_with_momentum(getkey, k, x64):
    key = getkey()
    head = lrjax.nn.GrassmannHead(6, 3, k, scale=5.0, dtype=jnp.float64, key=key)
    subspaces = orthonormalize(head.subspaces)
    head = eqx.tree_at(lambda head: head.subspaces, head, subspaces)
    xs, targets = jr.normal(getkey(), (20, 6)), jr.randint(getkey(), (20,), 0, 3)
    tx = lrjax.grassmann_sgd(0.1, momentum=0.8)

    @eqx.filter_jit
    def run(head):
        dynamic, static = eqx.partition(head, eqx.is_inexact_array)

        def step(carry, sample):
            head, state = carry
            slope = eqx.filter_grad(cross_entropy)(eqx.combine(head, static), *sample)
            updates, state = tx.update(slope, state, head)
            return (eqx.apply_updates(head, updates), state), None

        start = (dynamic, tx.init(dynamic))
        return jax.lax.scan(step, start, (xs, targets))[0][0].subspaces

    got = run(head)
    want = reference.train(
        np.asarray(xs), np.asarray(targets), np.asarray(subspaces), 5.0, 0.1, 0.8
    )
    assert_close(got, want, condition=1e4)
    assert_close(got.mT @ got, np.broadcast_to(np.eye(k), (3, k, k)))


@pytest.mark.slow
def test_steps_do_not_depend_on_the_basis_of_a_subspace(getkey, x64):
    """Nor the momentum of many steps, which a flipped column would corrupt."""
    target = jr.normal(getkey(), (8, 8))
    loss = lambda s: -jnp.sum((target @ s) ** 2) / 50
    turn = orthonormalize(jr.normal(getkey(), (3, 3)))
    start = orthonormalize(jr.normal(getkey(), (8, 3)))
    tx = lrjax.grassmann_sgd(0.1, where=everywhere)

    def run(s):
        def step(carry, _):
            s, state = carry
            updates, state = tx.update(jax.grad(loss)(s), state, s)
            return (s + updates, state), None

        return jax.lax.scan(step, (s, tx.init(s)), length=30)[0][0]

    one, other = jax.jit(jax.vmap(run))(jnp.stack([start, start @ turn]))
    assert_close(other, one @ turn, condition=1e4)


@pytest.mark.slow
def test_wide_matrices_turn_as_their_transposes_and_others_pass(getkey):
    tx = lrjax.follow_geodesics(where=lambda path, shape: len(shape) == 2)
    x = orthonormalize(jr.normal(getkey(), (6, 2)))
    step = jr.normal(getkey(), (6, 2))
    bias = jnp.ones(3)
    tree = {"tall": x, "wide": x.T, "bias": bias}
    steps = {"tall": step, "wide": step.T, "bias": 2 * bias}
    got = tx.update(steps, tx.init(tree), tree)[0]
    assert_close(got["wide"], got["tall"].T)
    np.testing.assert_array_equal(got["bias"], 2 * bias)
    loose = x + 0.01 * jr.normal(getkey(), (6, 2))
    back = loose + tx.update(step, tx.init(loose), loose)[0]
    assert_close(back.T @ back, np.eye(2), condition=10)


def test_refuses(getkey):
    with pytest.raises(ValueError, match="dimension between 1 and in_features"):
        lrjax.nn.GrassmannHead(3, 2, 4, key=getkey())
    head = lrjax.nn.GrassmannHead(3, 2, 1, key=getkey())
    with pytest.raises(ValueError, match=r"jax.vmap\(head\)"):
        head(jnp.ones((5, 3)))
    x = jnp.eye(3)
    tx = lrjax.follow_geodesics(where=everywhere)
    with pytest.raises(ValueError, match="needs the factors themselves"):
        tx.update(x, tx.init(x))
    with pytest.raises(ValueError, match="chose none of"):
        lrjax.follow_geodesics(where=lambda path, shape: False).init({"a": x})

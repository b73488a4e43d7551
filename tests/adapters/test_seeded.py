"""Factors out of random bases of which a seed is kept."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax.adapters import NOLA
from tests.adapters.models import moved
from tests.helpers import relative_error, tol


def adapters_of(model, kind, key):
    params, frozen = lrjax.partition(lrjax.adapt(model, kind, where="w", key=key))
    return moved(params, key), frozen


def test_the_factors_are_linear_in_their_weights_and_the_bases_uniform(getkey):
    model, k = {"w": jnp.zeros((24, 40))}, 20
    params, frozen = adapters_of(model, NOLA(8, k, 24.0), getkey())

    @jax.jit
    def bases(params):
        """What each weight stands for: the derivative of the factors."""
        of = lambda p: eqx.combine(p, frozen)["w"].factors()[0]
        still = jax.tree.map(jnp.zeros_like, params)
        return of(params), of(still), jax.jacfwd(of)(params)

    pair, start, jacobian = bases(params)
    left, right = jacobian.left["w"].left, jacobian.right["w"].right
    assert not np.any(jacobian.left["w"].right)
    assert not np.any(jacobian.right["w"].left)
    own = params["w"]
    assert not np.any(start.left)
    want = left @ np.asarray(own.left)
    assert relative_error(pair.left, want) < tol(pair.left, condition=10)
    want = start.right + right @ np.asarray(own.right)
    assert relative_error(pair.right, want) < tol(pair.right, condition=10)
    for basis in (left, right):
        assert np.max(np.abs(basis)) <= k**-0.5
        # 3,840 uniform numbers or more: their deviation is known to a percent.
        np.testing.assert_allclose(np.std(basis), (3 * k) ** -0.5, rtol=0.08)
        flat = np.asarray(basis).reshape(-1, k)
        overlap = flat.T @ flat / np.linalg.norm(flat, axis=0) ** 2
        assert np.max(np.abs(overlap - np.eye(k))) < 0.5  # no basis comes twice
    assert np.max(np.abs(start.right)) <= 40**-0.5
    merged = lrjax.merge(model, eqx.combine(params, frozen))["w"]
    assert relative_error(merged, 3.0 * pair.materialize()) < tol(merged)


@pytest.mark.slow
def test_a_seed_is_stored_and_no_basis_is_there_for_the_way_back(getkey):
    """The memory of a gradient does not grow with the number of bases."""
    model, x = {"w": jnp.zeros((128, 128))}, jnp.ones((4, 128))
    size, temporaries = 4 * 128 * 8, {}
    for k in (16, 512):
        params, frozen = adapters_of(model, NOLA(8, k), getkey())
        numbers = sum(leaf.size for leaf in jax.tree.leaves((params, frozen)))
        assert numbers == 2 * k + 2 + 1  # a seed of two words, and the scale

        def loss(params, frozen, x):
            merged = lrjax.merge(model, eqx.combine(params, frozen))
            return jnp.sum((x @ merged["w"].T - 1) ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(params, frozen, x).compile()
        temporaries[k] = compiled.memory_analysis().temp_size_in_bytes
    # 496 more bases on each side would be 992 sizes.
    assert temporaries[512] - temporaries[16] < 16 * size


@pytest.mark.slow
def test_the_gradient_is_that_of_bases_that_are_kept(getkey):
    model = {"w": jr.normal(getkey(), (6, 5))}
    params, frozen = adapters_of(model, NOLA(2, 19), getkey())

    @jax.jit
    def gradients(params):
        cubes = lambda factors: jnp.sum((model["w"] + factors.materialize()) ** 3)
        of = lambda p: eqx.combine(p, frozen)["w"].factors()[0]
        jacobian = jax.jacfwd(of)(params)
        outer = jax.grad(cubes)(of(params))
        left = jnp.einsum("mrk,mr->k", jacobian.left["w"].left, outer.left)
        right = jnp.einsum("nrk,nr->k", jacobian.right["w"].right, outer.right)
        return jax.grad(lambda p: cubes(of(p)))(params)["w"], left, right

    got, left, right = gradients(params)
    assert relative_error(got.left, left) < tol(left, condition=100)
    assert relative_error(got.right, right) < tol(right, condition=100)

"""Starts along a matrix, against dense float64 formulas and what each is made for."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax import LowRank, lowrank
from tests.helpers import assert_close, relative_error, tol, with_spectrum
from tests.reference import inits as reference


VALUES = np.array([7.0, 5.0, 4.0, 2.5, 1.5, 0.7])


def f64(x):
    return np.asarray(x, np.float64)


def product(pair):
    return f64(pair.left) @ f64(pair.right).T


def gap(pair, want):
    """How far a product is from that of a reference, whatever the signs of the vectors."""
    b, a = want
    return relative_error(product(pair), b @ a)


def spans(pair):
    """What does not depend on the signs of singular vectors that are no pairs."""
    return [f64(x) @ f64(x).T for x in (pair.left, pair.right)]


@pytest.fixture
def matrix(getkey):
    return with_spectrum(getkey(), 8, 6, VALUES)


def test_principal_and_minor_part(matrix):
    for which, want in (("largest", reference.pissa), ("smallest", reference.milora)):
        pair = lowrank.svd_init(matrix, 2, which=which)
        assert gap(pair, want(f64(matrix), 2, 1.0)) < tol(matrix, condition=10)
        grams = [f64(x).T @ f64(x) for x in (pair.left, pair.right)]
        np.testing.assert_allclose(*grams, atol=1e-4)
        np.testing.assert_allclose(
            np.diag(grams[0]), VALUES[:2] if which == "largest" else VALUES[-2:], rtol=1e-4
        )


@pytest.mark.slow
def test_factors_are_decomposed_without_their_product(matrix):
    u, values, vt = np.linalg.svd(f64(matrix), full_matrices=False)
    turn = np.linalg.qr(np.arange(36.0).reshape(6, 6) ** 1.5 + np.eye(6))[0]
    thin = LowRank(jnp.asarray(u * values @ turn), jnp.asarray(vt.T @ turn))
    same = lowrank.svd_init(matrix, 2).materialize()
    assert_close(lowrank.svd_init(thin, 2).materialize(), same, condition=100)
    got, want = (lowrank.disjoint_svd_init(x, 2) for x in (thin, matrix))
    assert_close(spans(got), spans(want), condition=100)


def test_orthonormal_columns_of_the_qr_decomposition(matrix):
    pair = lowrank.qr_init(matrix, 3)
    assert gap(pair, reference.olora(f64(matrix), 3)) < tol(matrix, condition=10)
    assert_close(pair.left.T @ pair.left, jnp.eye(3), condition=10)
    # Exact on the first columns, and their triangle has a positive diagonal.
    assert_close(pair.materialize()[:, :3], matrix[:, :3], condition=10)
    assert np.all(np.diagonal(pair.right) > 0)


def test_first_step_from_disjoint_vectors_is_the_best_of_twice_the_rank(matrix):
    """A step of the factors moves their product along ``B Bᵀ G + G Aᵀ A`` at first."""
    scale, rank = 0.5, 2
    pair = lowrank.disjoint_svd_init(matrix, rank, scale=scale)
    g, left, right = f64(matrix), f64(pair.left), f64(pair.right)
    step = left @ left.T @ g + g @ right @ right.T
    u, values, vt = np.linalg.svd(g)
    best = (u[:, :4] * values[:4]) @ vt[:4]
    assert relative_error(step, scale**2 * best) < tol(matrix, condition=10)
    b, a = reference.lora_ga(g, rank, 16.0)
    pair = lowrank.disjoint_svd_init(matrix, rank, scale=8**0.25 / 4.0)
    assert_close(spans(pair), [b @ b.T, a.T @ a], rtol=tol(pair.left, condition=100))


def test_weighted_vectors(matrix, getkey):
    rows = jr.normal(getkey(), (50, 6)) * jnp.array([3.0, 2.0, 1.0, 1.0, 0.5, 0.1])[None]
    moment = rows.T @ rows / len(rows)
    for which, kpm in (("largest", False), ("smallest", True)):
        pair = lowrank.weighted_svd_init(matrix, moment, 2, which=which, scale=3.0**-0.5)
        want = reference.corda(f64(matrix), f64(moment), 2, 3.0, kpm)
        assert gap(pair, want) < tol(matrix, condition=1e3)
    # All of them are the weight; without a direction of the inputs it is the plain SVD.
    whole = lowrank.weighted_svd_init(matrix, moment, 6)
    assert_close(whole.materialize(), matrix, condition=1e3)
    plain = lowrank.weighted_svd_init(matrix, jnp.eye(6), 2, damping=0.0)
    assert gap(plain, reference.pissa(f64(matrix), 2, 1.0)) < 1e-4
    # ‖(W − W_r) C‖ is least among the matrices of this rank: below that of the plain SVD.
    error = lambda pair: np.linalg.norm((f64(matrix) - product(pair)) @ f64(moment))
    context = lowrank.weighted_svd_init(matrix, moment, 2, damping=0.0)
    assert error(context) < error(lowrank.svd_init(matrix, 2)) * (1 + 1e-4)


def test_a_metric_without_a_direction_gives_finite_numbers(matrix):
    for metric in (jnp.zeros((6, 6)), jnp.diag(jnp.array([1.0, 1, 0, 0, 0, 0]))):
        for damping in (0.0, 0.01):
            pair = lowrank.weighted_svd_init(matrix, metric, 2, damping=damping)
            assert np.all(np.isfinite(product(pair)))


def test_under_vmap_and_in_half_precision(matrix, getkey):
    stack = jnp.stack([matrix, jr.normal(getkey(), (8, 6))])
    metric = jnp.diag(jnp.arange(1.0, 7.0))
    inits = {
        "svd": lambda x: lowrank.svd_init(x, 2),
        "qr": lambda x: lowrank.qr_init(x, 2),
        "weighted": lambda x: lowrank.weighted_svd_init(x, metric, 2),
    }
    every = jax.jit(lambda x: {k: f(x).materialize() for k, f in inits.items()})
    got = jax.jit(jax.vmap(every))(stack)
    for i, x in enumerate(stack):
        assert_close(jax.tree.map(lambda y, i=i: y[i], got), every(x), condition=1e3)
    half = every(matrix.astype(jnp.bfloat16))
    for name, x in every(matrix.astype(jnp.bfloat16).astype(jnp.float32)).items():
        assert half[name].dtype == jnp.float32
        assert_close(half[name], x, condition=100)


def test_what_does_not_fit_is_refused(matrix):
    for init, rank in (
        (lowrank.svd_init, 7),
        (lowrank.qr_init, 0),
        (lowrank.disjoint_svd_init, 4),
    ):
        with pytest.raises(ValueError, match="of a matrix that has 6"):
            init(matrix, rank)
    # The tests' runtime type checker may be the first to complain.
    with pytest.raises((ValueError, TypeError), match="which"):
        lowrank.svd_init(matrix, 2, which="middle")

"""Fits that have no derivative refuse both modes by name, also under jit and vmap."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import recovery

from ..helpers import relative_error


M, N, RANK = 24, 20, 2


def matrix(key):
    kl, kr = jr.split(key)
    return jr.normal(kl, (M, RANK)) @ jr.normal(kr, (RANK, N))


AT = np.nonzero(np.random.default_rng(0).random((M, N)) < 0.5)


def robust_pca(y, **options):
    return lrjax.fit_robust_pca(y, rank=4, max_steps=5, **options)


def completion(y, **options):
    return lrjax.fit_completion(*AT, y[AT], (M, N), rank=4, max_steps=3, **options)


FITS = {
    "fit_robust_pca": robust_pca,
    "RobustPCAFit.transform": lambda y: FITTED["robust_pca"].transform(y),
    "RobustPCAFit.update": lambda y: FITTED["robust_pca"].update(y, max_steps=3),
    "fit_completion": completion,
    "CompletionFit.transform": lambda y: transform(FITTED["completion"], y),
}
FITTED = {}


def transform(fit, y):
    return fit.transform(*AT, y[AT], M)


@pytest.fixture(scope="module", autouse=True)
def _fitted():
    y = matrix(jr.key(0))
    FITTED.update(robust_pca=jax.jit(robust_pca)(y), completion=jax.jit(completion)(y))


def total(tree):
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return sum(jnp.sum(x) for x in leaves)


MODES = {
    "grad": lambda f, y: jax.grad(f)(y),
    "grad of jit": lambda f, y: jax.grad(jax.jit(f))(y),
    "jit of vmap of grad": lambda f, y: jax.jit(jax.vmap(jax.grad(f)))(y[None]),
    "jvp": lambda f, y: jax.jvp(f, (y,), (y,)),
    "grad in scan": lambda f, y: jax.grad(
        lambda y: jax.lax.scan(lambda c, _: (c + f(y), None), 0.0, length=2)[0]
    )(y),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FITS)
def test_both_modes_are_refused_by_name(name, mode, getkey):
    run = lambda y: total(FITS[name](y))
    with pytest.raises(ValueError, match=rf"^{name} .*jax\.lax\.stop_gradient"):
        MODES[mode](run, matrix(getkey()))


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("fit_robust_pca", lambda w, y: robust_pca(y, nuclear_weight=w)),
        ("fit_robust_pca", lambda w, y: robust_pca(y, tol=1e-3 * w)),
        ("fit_completion", lambda w, y: completion(y, tol=1e-3 * w)),
        ("RobustPCAFit.transform", lambda w, y: scaled("robust_pca", w).transform(y)),
        ("RobustPCAFit.update", lambda w, y: scaled("robust_pca", w).update(y)),
        ("CompletionFit.transform", lambda w, y: transform(scaled("completion", w), y)),
    ],
)
def test_so_are_derivatives_by_numbers_and_by_the_fit(name, by, getkey):
    y = matrix(getkey())
    with pytest.raises(ValueError, match=f"^{name} "):
        jax.jvp(lambda w: total(by(w, y)), (1.0,), (1.0,))


def scaled(name, factor):
    return eqx.tree_at(
        lambda f: f.low_rank.right, FITTED[name], replace_fn=lambda x: factor * x
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_a_fit_that_is_held_constant_passes(name, getkey):
    y = matrix(getkey())

    @jax.jit
    @jax.value_and_grad
    def loss(scale):
        return scale * total(FITS[name](jax.lax.stop_gradient(scale * y)))

    value, slope = loss(2.0)
    assert value != 0
    np.testing.assert_allclose(value, 2 * slope, rtol=1e-6)


@pytest.mark.slow
def test_the_solution_of_robust_pca_has_no_derivative(x64):
    """Why: it moves by another amount for an error than for minus that error."""
    key_left, key_right, key_sparse, key_sign, key_error, key_part = jr.split(jr.key(0), 6)
    left = jr.normal(key_left, (60, RANK), jnp.float64)
    right = jr.normal(key_right, (50, RANK), jnp.float64)
    support = jr.bernoulli(key_sparse, 0.04, (60, 50))
    signs = jr.rademacher(key_sign, (60, 50), jnp.float64)
    clean = left @ right.T
    y = clean + jnp.where(support, 5 * signs, 0)

    @jax.jit
    def moved(change):
        fit = lrjax.fit_robust_pca(y + 1e-6 * change, rank=RANK, tol=1e-12, max_steps=200)
        return (fit.low_rank.materialize() - clean) / 1e-6

    error = jr.normal(key_error, y.shape, jnp.float64)
    there, back = moved(error), moved(-error)
    assert relative_error(there, -back) > 0.3
    # Within the tangent space and the support it is linear.
    tangent = left @ jr.normal(key_part, (RANK, 50), jnp.float64)
    inside = tangent + jnp.where(support, error, 0)
    assert relative_error(moved(inside), tangent) < 1e-4
    assert relative_error(moved(-inside), -tangent) < 1e-4


@jax.jit
def completion_with_noise(key):
    """A problem of which half the entries are seen, and a fit of it."""
    q = lrjax.matrix_completion(
        key, (M, N), RANK, observed=0.6, noise=0.1, dtype=jnp.float64
    )
    at = q.operator
    return q, lrjax.fit_completion(at.rows, at.cols, q.targets, (M, N), rank=RANK).low_rank


def pursuit(y, start, at):
    return recovery.principal_component_pursuit(y, max_steps=6, tol=None).low_rank


def steps(y, start, at):
    problem = lrjax.matrix_completion.from_data(at.rows, at.cols, y, (M, N))
    return lrjax.solve(problem, lrjax.scaled_gd(0.5), start, steps=4).x


@functools.partial(jax.jit, static_argnums=0)
def value_and_slopes(run, y, along, weight, start, at):
    value = jax.jit(lambda y: jnp.vdot(weight, run(y, start, at).materialize()))
    reverse = jnp.vdot(jax.grad(value)(y), along)
    return value(y), reverse, jax.jvp(value, (y,), (along,))[1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_what_is_offered_in_their_place_has_derivatives(x64, seed):
    """Both modes are those of central differences."""
    key_data, key_along, key_weight = jr.split(jr.key(seed), 3)
    p = robust_problem(key_data)
    q, start = completion_with_noise(key_data)
    weight = normal(key_weight, (M, N))
    for run, y in ((pursuit, p.targets), (steps, q.targets)):
        along, h = normal(key_along, y.shape), 1e-5
        at = lambda y, along=along, run=run: value_and_slopes(
            run, y, along, weight, start, q.operator
        )
        want = (at(y + h * along)[0] - at(y - h * along)[0]) / (2 * h)
        np.testing.assert_allclose(at(y)[1:], [want, want], rtol=1e-5)


@jax.jit
def robust_problem(key):
    return lrjax.robust_pca(key, (M, N), RANK, 0.03, dtype=jnp.float64)


def normal(key, shape):
    return jr.normal(key, shape, jnp.float64)

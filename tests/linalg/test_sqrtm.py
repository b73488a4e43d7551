"""Roots from products beside those of eigendecompositions in float64."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax.linalg import inverse_sqrtm, sqrtm
from lrjax.linalg.sqrtm import PADE_POLES, PADE_WEIGHTS, TAYLOR

from ..helpers import relative_error


def definite(key, n, condition):
    """A matrix with a spectrum of this condition, and its eigendecomposition."""
    vectors = np.linalg.qr(np.asarray(jr.normal(key, (n, n), jnp.float64)))[0]
    values = np.logspace(0, -np.log10(condition), n)
    return (vectors * values) @ vectors.T, values, vectors


def test_the_approximants_have_the_published_errors():
    """At z = 1/2, 5/6 and .999: 5e-9, 6e-5 and .063; 7e-6, 4e-3 and .146 of the series."""
    for z, pade, taylor in ((0.5, 5e-9, 7e-6), (5 / 6, 6e-5, 4e-3), (0.999, 0.063, 0.146)):
        root = np.sqrt(1 - z)
        fractions = zip(PADE_WEIGHTS, PADE_POLES, strict=True)
        got = 1 - sum(a * z / (1 - b * z) for a, b in fractions)
        assert abs(got - root) == pytest.approx(pade, rel=0.1)
        got = 1 + sum(t * z**k for k, t in enumerate(TAYLOR, 1))
        assert abs(got - root) == pytest.approx(taylor, rel=0.1)


@pytest.mark.slow_but("pade")
@pytest.mark.parametrize("method", ["pade", "taylor"])
def test_one_pass_is_its_scalar_function_of_the_spectrum(method, x64):
    values = np.array([0.9, 0.4, 0.1])
    unit = values / np.linalg.norm(values)
    if method == "pade":
        fractions = list(zip(PADE_WEIGHTS, PADE_POLES, strict=True))
        scalar = lambda z: 1 - sum(a * z / (1 - b * z) for a, b in fractions)
    else:
        scalar = lambda z: 1 + sum(t * z**k for k, t in enumerate(TAYLOR, 1))
    want = scalar(1 - unit) * np.sqrt(np.linalg.norm(values))
    root = sqrtm(jnp.diag(jnp.asarray(values)), method=method)
    assert relative_error(jnp.diag(root), want) < 1e-14
    inverse = inverse_sqrtm(jnp.diag(jnp.asarray(values)), method=method)
    assert relative_error(jnp.diag(inverse), 1 / want) < 1e-14


@pytest.mark.slow_but("100000000.0")
@pytest.mark.parametrize("condition", [1.0, 1e4, 1e8])
def test_newton_is_exact_to_rounding(getkey, condition, x64):
    a, values, vectors = definite(getkey(), 6, condition)
    eps = np.finfo(np.float64).eps
    root, inverse = sqrtm(jnp.asarray(a)), inverse_sqrtm(jnp.asarray(a))
    want = (vectors * np.sqrt(values)) @ vectors.T
    assert relative_error(root, want) < 50 * eps * condition**0.5
    want = (vectors / np.sqrt(values)) @ vectors.T
    assert relative_error(inverse, want) < 50 * eps * condition


@pytest.mark.slow
def test_gradients_are_those_of_an_eigendecomposition(getkey, x64):
    a, _, _ = definite(getkey(), 5, 100.0)
    a, g = jnp.asarray(a), jr.normal(getkey(), (5, 5), jnp.float64)

    def dense(power):
        def f(a):
            values, vectors = jnp.linalg.eigh((a + a.T) / 2)
            return jnp.sum(g * (vectors @ jnp.diag(values**power) @ vectors.T))

        return jax.grad(f)(a)

    for root, power in ((sqrtm, 0.5), (inverse_sqrtm, -0.5)):
        got = jax.grad(lambda a, root=root: jnp.sum(g * root(a)))(a)
        assert relative_error(got, dense(power)) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stacks_scales_and_singular_matrices(getkey, dtype):
    x = jr.normal(getkey(), (3, 4, 6)).astype(dtype)
    # Any scale, rank four of six, zero, and what rounding made indefinite.
    stack = (x.mT @ x) * jnp.array([1e-8, 1.0, 1e8]).astype(dtype)[:, None, None]
    stack = stack.at[0].multiply(0)
    root, inverse = jax.jit(lambda a: (sqrtm(a), inverse_sqrtm(a)))(stack)
    assert root.dtype == inverse.dtype == dtype
    assert bool(jnp.all(jnp.isfinite(root)) & jnp.all(jnp.isfinite(inverse)))
    assert not jnp.any(root[0])
    assert not jnp.any(inverse[0])
    eps, eps32 = float(jnp.finfo(dtype).eps), float(jnp.finfo(jnp.float32).eps)
    # What is added to the spectrum, and the rounding of a root of that condition.
    bound = 10 * eps + 4 * eps32**0.5
    for k in (1, 2):
        square = np.asarray(root[k], np.float64) @ np.asarray(root[k], np.float64)
        assert relative_error(square, stack[k]) < bound
    one = jax.vmap(sqrtm)(stack)
    assert relative_error(one, root) < bound


@pytest.mark.parametrize("root", [sqrtm, inverse_sqrtm])
def test_refusals(root, shapes_unchecked):
    with pytest.raises(ValueError, match=r"square matrices .*\(2, 3\)"):
        root(jnp.ones((2, 3)))
    with pytest.raises((ValueError, TypeError), match="method"):
        root(jnp.eye(2), method="svd")

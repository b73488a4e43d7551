import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax import LowRank, metrics

from ..helpers import assert_close, random_low_rank


def product(x, inputs):
    return inputs @ x.materialize().T


def test_the_kernel_of_a_product_is_that_of_its_factors(getkey, x64):
    """``z zᵀ``-weighted: ``⟨z, R Rᵀ z'⟩ I + ⟨z, z'⟩ L Lᵀ`` for the inputs z and z'."""
    x = random_low_rank(getkey(), 4, 3, 2, dtype=jnp.float64)
    inputs = jr.normal(getkey(), (5, 3))
    seen, given = inputs @ x.right @ x.right.T @ inputs.T, inputs @ inputs.T
    want = np.kron(seen, np.eye(4)) + np.kron(given, x.left @ x.left.T)
    assert_close(
        jax.jit(metrics.tangent_kernel, static_argnums=0)(product, x, inputs), want
    )


@pytest.mark.slow
def test_the_kernel_is_that_of_finite_differences(getkey, x64):
    model = eqx.nn.MLP(3, 2, 4, 1, jnp.tanh, key=getkey())
    inputs = jr.normal(getkey(), (4, 3))
    function = lambda model, x: jax.vmap(model)(x)
    kernel = metrics.tangent_kernel(function, model, inputs)
    assert kernel.shape == (8, 8)
    moving, fixed = eqx.partition(model, eqx.is_inexact_array)
    flat, unravel = jax.flatten_util.ravel_pytree(moving)
    run = jax.jit(
        jax.vmap(lambda p: function(eqx.combine(unravel(p), fixed), inputs).ravel())
    )
    step = 1e-5 * np.eye(len(flat))
    jacobian = (run(flat[None] + step) - run(flat[None] - step)) / 2e-5
    assert_close(kernel, jacobian.T @ jacobian, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_alignment_is_a_cosine_of_any_scale(size, getkey):
    x = jr.normal(getkey(), (3, 6, 4))
    x, y = x @ x.mT, jnp.eye(6)[None] * jnp.ones((3, 1, 1))
    got = metrics.kernel_alignment(size * x, y)
    want = jnp.trace(x, axis1=1, axis2=2) / (jnp.linalg.norm(x, axis=(1, 2)) * 6**0.5)
    assert_close(got, want)
    assert_close(metrics.kernel_alignment(size * x, x / size), jnp.ones(3))
    assert jnp.all(metrics.kernel_alignment(0 * x, y) == 0)


@pytest.mark.slow
def test_changes_are_relative(getkey):
    old = LowRank(3 * jnp.ones((1, 1)), 4 * jnp.ones((1, 1)))
    new = LowRank(3 * jnp.ones((1, 1)), 5 * jnp.ones((1, 1)))
    assert_close(metrics.relative_change((new, jnp.arange(3)), (old, None)), jnp.array(0.2))
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (new, old))
    assert metrics.relative_change(*narrow).dtype == jnp.float32
    from_zero = metrics.relative_change(new, jax.tree.map(jnp.zeros_like, old))
    assert_close(from_zero, jnp.array(34.0) ** 0.5)
    value = lambda x: x.materialize()
    change = metrics.kernel_change(value, new, old)
    # One output, K = L² + R²: from 25 to 34.
    np.testing.assert_allclose(change, [9 / 25, 0, 0.2], atol=1e-6)
    same = metrics.kernel_change(value, old, old)
    assert tuple(same) == (0, 0, 0)

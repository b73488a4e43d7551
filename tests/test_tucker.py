import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax.lowrank import (
    TuckerForm,
    higher_order_svd,
    multiply_axes,
    tucker_inner,
    unfold,
    unfolded_svd,
)


def random(key, shape=(5, 4, 3), ranks=(2, 3, 2), batch=()):
    keys = jr.split(key, len(shape) + 1)
    factors = [
        jr.normal(k, (*batch, n, r)) for k, n, r in zip(keys[1:], shape, ranks, strict=True)
    ]
    return TuckerForm(jr.normal(keys[0], (*batch, *ranks)), factors)


def test_value_is_the_sum_over_the_core(getkey):
    x = random(getkey())
    want = jnp.einsum("abc,ia,jb,kc->ijk", x.core, *x.factors)
    np.testing.assert_allclose(x.materialize(), want, atol=1e-4)
    assert x.shape == want.shape
    assert x.ranks == (2, 3, 2)


def test_a_stack_is_a_loop(getkey):
    x = random(getkey(), batch=(2,))
    assert x.shape == (2, 5, 4, 3)
    both = x.materialize()
    for k in range(2):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], x)
        np.testing.assert_allclose(both[k], one.materialize(), atol=1e-5)


@pytest.mark.slow
def test_inner_product_is_that_of_the_values(getkey):
    x, y = random(getkey()), random(getkey(), ranks=(1, 2, 3))
    want = jnp.sum(x.materialize() * y.materialize())
    np.testing.assert_allclose(tucker_inner(x, y), want, rtol=1e-4, atol=1e-3)


def test_two_axes_are_a_matrix(getkey):
    core, left, right = (jr.normal(getkey(), s) for s in ((2, 3), (5, 2), (4, 3)))
    x = TuckerForm(core, (left, right))
    np.testing.assert_allclose(x.materialize(), left @ core @ right.T, atol=1e-4)


@pytest.mark.slow
def test_higher_order_svd_is_exact_at_the_ranks_and_quasi_optimal_below(getkey):
    x = random(getkey()).materialize()
    exact = higher_order_svd(x, (2, 3, 2))
    np.testing.assert_allclose(exact.materialize(), x, atol=1e-4 * float(jnp.abs(x).max()))
    for u in exact.factors:
        np.testing.assert_allclose(u.T @ u, jnp.eye(u.shape[1]), atol=1e-5)
    values, _ = unfolded_svd(x)
    cut = higher_order_svd(x, (1, 1, 1)).materialize()
    tails = sum(float(jnp.sum(v[1:] ** 2)) for v in values)  # bounds the squared error
    assert float(jnp.sum((cut - x) ** 2)) <= tails * (1 + 1e-4)


@pytest.mark.slow
def test_unfoldings(getkey):
    x = jr.normal(getkey(), (3, 4, 5))
    for axis, size in enumerate(x.shape):
        matrix = jr.normal(getkey(), (2, size))
        eyes = [jnp.eye(n) for n in x.shape]
        eyes[axis] = matrix
        moved = multiply_axes(x, tuple(eyes))
        np.testing.assert_allclose(unfold(moved, axis), matrix @ unfold(x, axis), atol=1e-4)
        values, vectors = unfolded_svd(x)
        want = jnp.linalg.svd(unfold(x, axis), compute_uv=False)
        np.testing.assert_allclose(values[axis], want[: len(values[axis])], rtol=1e-4)
        assert vectors[axis].shape == (size, size)


def test_refuses():
    with pytest.raises(ValueError, match=r"core \(2, 2\) and factors"):
        TuckerForm(jnp.ones((2, 2)), (jnp.ones((3, 2)), jnp.ones((3, 1))))
    with pytest.raises(ValueError, match="rank between 1 and n"):
        higher_order_svd(jnp.ones((2, 3)), (3, 1))
    x = random(jr.key(0))
    with pytest.raises(ValueError, match="one shape"):
        tucker_inner(x, random(jr.key(0), shape=(5, 4, 2)))

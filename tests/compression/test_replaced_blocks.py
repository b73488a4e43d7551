import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax.compression import block_influence, replacement_errors, residual_low_rank


def tail(x, rank):
    """The squared error of the best approximation, of a stack."""
    values = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    return np.sum(values[..., rank:] ** 2)


def test_the_rest_is_the_best_of_its_rank_and_exact_at_full_width(getkey):
    base, target = jr.normal(getkey(), (2, 3, 7, 5))
    rest = residual_low_rank(target, base, 2)
    error = np.sum((target - base - rest.materialize()) ** 2)
    np.testing.assert_allclose(error, tail(target - base, 2), rtol=1e-4)
    # The lengths are on the left, as the papers start their adapters.
    np.testing.assert_allclose(
        rest.right.mT @ rest.right, np.broadcast_to(np.eye(2), (3, 2, 2)), atol=1e-5
    )
    whole = residual_low_rank(target, base, 5).materialize()
    np.testing.assert_allclose(base + whole, target, atol=1e-4)


def test_influence_is_one_minus_the_cosine(getkey):
    x, y = jr.normal(getkey(), (2, 4, 9, 6))
    cosine = np.sum(x * y, -1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))
    np.testing.assert_allclose(block_influence(x, y), 1 - cosine.mean(), atol=1e-5)
    np.testing.assert_allclose(block_influence(x, 3 * x), 0, atol=1e-5)
    np.testing.assert_allclose(block_influence(x, -x), 2, atol=1e-5)
    assert np.isfinite(block_influence(jnp.zeros((2, 3)), jnp.ones((2, 3))))


@pytest.mark.slow
def test_a_block_is_replaced_by_the_one_whose_rest_is_least(getkey):
    """Block 0 is block 4 and a large matrix of rank two."""
    blocks = {"in": jr.normal(getkey(), (5, 6, 8)), "bias": jr.normal(getkey(), (5, 6))}
    low = 9 * jr.normal(getkey(), (6, 2)) @ jr.normal(getkey(), (2, 8))
    blocks = jax.tree.map(lambda x: x.at[0].set(x[4]), blocks)
    blocks["in"] = blocks["in"].at[0].add(low)
    errors = jax.jit(replacement_errors, static_argnums=2)(blocks, 0, 2)
    assert np.argmin(errors) == 4
    assert errors[0] == np.inf
    for j in (1, 2, 3):
        want = tail(blocks["in"][0] - blocks["in"][j], 2)
        want += np.sum((blocks["bias"][0] - blocks["bias"][j]) ** 2)
        np.testing.assert_allclose(errors[j], want, rtol=1e-4)
    whole = replacement_errors({"in": blocks["in"]}, 0, 6)
    np.testing.assert_allclose(whole[1:], 0, atol=1e-6)


def test_refuses():
    with pytest.raises(ValueError, match=r"rank must be between 1 and .* = 3"):
        residual_low_rank(jnp.ones((3, 3)), jnp.ones((3, 3)), 4)

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lrjax import linalg, recovery

from ..helpers import assert_close
from ..reference import robust_pca as reference


FRACTIONS = (0.0, 0.07, 0.1, 0.29, 0.5, 1.0)
keep_largest = jax.jit(linalg.keep_largest)
hard_threshold = jax.jit(linalg.hard_threshold)
soft_threshold = jax.jit(linalg.soft_threshold)


@pytest.mark.parametrize("shape", [(20, 7), (3, 40)])
def test_keep_largest_is_the_definition(getkey, shape):
    x = jr.normal(getkey(), shape)
    for fraction in FRACTIONS:
        want = reference.keep_largest(np.asarray(x), fraction)
        np.testing.assert_array_equal(keep_largest(x, fraction), want)


def test_no_row_or_column_keeps_more_than_its_share(getkey):
    kept = np.asarray(keep_largest(jr.normal(getkey(), (20, 7)), 0.3)) != 0
    assert kept.sum(0).max() <= 6
    assert kept.sum(1).max() <= 2
    assert kept.any()


def test_keep_largest_commutes_with_scaling_transposes_and_signs(getkey):
    x = np.asarray(jr.normal(getkey(), (10, 10)))
    want = np.asarray(keep_largest(x, 0.2))
    for scale in (2.0**-100, 2.0**100):
        np.testing.assert_array_equal(keep_largest(scale * x, 0.2), scale * want)
    np.testing.assert_array_equal(keep_largest(x.T, 0.2), want.T)
    np.testing.assert_array_equal(keep_largest(-x, 0.2), -want)
    np.testing.assert_array_equal(keep_largest(want, 0.2), want)


def test_keep_largest_in_float64_and_in_half_precision(getkey, x64):
    # Differences that float32 would not see.
    x = 1 + 1e-12 * np.asarray(jr.normal(getkey(), (10, 10), jnp.float64))
    want = reference.keep_largest(x, 0.3)
    np.testing.assert_array_equal(keep_largest(x, 0.3), want)
    half = np.asarray(jr.normal(getkey(), (10, 10), jnp.bfloat16))
    got = keep_largest(half, 0.3)
    assert got.dtype == jnp.bfloat16
    want = reference.keep_largest(half.astype(np.float64), 0.3)
    np.testing.assert_array_equal(np.asarray(got, np.float64), want)


def test_ties_and_zeros():
    for x in (jnp.ones((10, 10)), jnp.zeros((10, 10))):
        np.testing.assert_array_equal(keep_largest(x, 0.25), x)


def test_vmap_is_the_loop_and_stacks_are_too(getkey):
    x = np.asarray(jr.normal(getkey(), (3, 10, 10)))
    fractions = np.array([0.2, 0.4, 0.6], np.float32)
    want = np.stack([keep_largest(*pair) for pair in zip(x, fractions, strict=True)])
    np.testing.assert_array_equal(jax.jit(jax.vmap(keep_largest))(x, fractions), want)
    want = np.stack([keep_largest(one, 0.4) for one in x])
    np.testing.assert_array_equal(keep_largest(x, 0.4), want)


def test_sharded_rows_stay_where_they_are(getkey):
    x = jr.normal(getkey(), (16, 10))
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    blocks = NamedSharding(mesh, PartitionSpec("rows", None))
    sharded = jax.device_put(x, blocks)
    compiled = keep_largest.lower(sharded, 0.3).compile()
    assert "all-gather" not in compiled.as_text()
    got = compiled(sharded, 0.3)
    assert got.sharding.is_equivalent_to(blocks, 2)
    np.testing.assert_array_equal(got, keep_largest(x, 0.3))


def test_hard_and_soft_thresholds(getkey):
    x = np.asarray(jr.normal(getkey(), (20,)))
    hard, soft = hard_threshold(x, 0.7), soft_threshold(x, 0.7)
    big = np.abs(x) > 0.7
    np.testing.assert_array_equal(hard, np.where(big, x, 0))
    assert_close(soft, np.where(big, x - np.float32(0.7) * np.sign(x), 0), rtol=1e-6)
    assert_close(soft_threshold(x, 0.0), x)
    levels = np.linspace(0, 1, 20, dtype=np.float32)
    each = jax.vmap(hard_threshold)(x, levels)
    np.testing.assert_array_equal(hard_threshold(x, levels), each)


def test_soft_is_a_proximal_map_and_its_remainder_the_gradient_of_huber(getkey):
    x, level = np.asarray(jr.normal(getkey(), (20,))), 0.5
    value = lambda s: 0.5 * np.sum((s - x) ** 2, -1) + level * np.sum(np.abs(s), -1)
    best = np.asarray(soft_threshold(x, level))
    others = best[None, :] + 0.1 * np.asarray(jr.normal(getkey(), (200, 20)))
    assert value(best) <= value(others).min()
    assert_close(x - best, recovery.Huber(level).subgradient(jnp.asarray(x)))
    slope = jax.grad(lambda z: jnp.sum(soft_threshold(x, z)))(level)
    assert_close(slope, -np.sum(np.sign(best)))


@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_lq_threshold_is_the_global_minimum(q):
    """Against a search over a fine grid, both sides of the jump."""
    x = np.linspace(0.0, 4.0, 33)
    z = np.linspace(0.0, 4.0, 40_001)
    weight = 0.7
    with jax.enable_x64():
        got = np.asarray(linalg.lq_threshold(jnp.asarray(x), weight, q))
    powers = lambda z: weight * np.where(z > 0, np.maximum(z, 1e-300) ** q, 0)
    least = np.min((z[None] - x[:, None]) ** 2 / 2 + powers(z)[None], axis=1)
    mine = (got - x) ** 2 / 2 + powers(got)
    # The grid misses the minimum by its spacing squared.
    assert np.all(mine <= least + 1e-12)


@pytest.mark.slow
def test_limits_of_lq_and_firm_thresholds(getkey):
    x = 2 * jr.normal(getkey(), (50,))
    assert_close(linalg.lq_threshold(x, 0.5, 1.0), linalg.soft_threshold(x, 0.5))
    assert_close(linalg.lq_threshold(x, 0.5, 0.0), linalg.hard_threshold(x, 1.0))
    assert_close(linalg.firm_threshold(x, 0.5, 0.5), linalg.hard_threshold(x, 0.5))
    wide = linalg.firm_threshold(x, 0.5, 1e6)
    assert_close(wide, linalg.soft_threshold(x, 0.5), condition=100)


@pytest.mark.slow
def test_the_derivative_of_lq_is_that_of_the_root(getkey):
    with jax.enable_x64():
        x, h = jnp.array([1.5, 2.0, 3.0]), 1e-6
        f = lambda x: linalg.lq_threshold(x, 0.4, 0.5)
        slopes = jax.vmap(jax.grad(lambda x: f(x)))(x)
        assert_close(slopes, (f(x + h) - f(x - h)) / (2 * h), condition=1e10)

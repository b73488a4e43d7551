"""Merges that choose: clusters, Fisher information, masks; what outliers cannot move."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import merging
from tests.helpers import assert_close, random_low_rank, tol
from tests.reference.merging import sum_of_distances


cluster_units = jax.jit(merging.cluster_units, static_argnums=1)
weighted_sum, masked_sum = jax.jit(merging.weighted_sum), jax.jit(merging.masked_sum)
fisher_average = jax.jit(merging.fisher_average)
geometric_median = jax.jit(merging.geometric_median)
flag_mean = jax.jit(merging.flag_mean, static_argnames="steps")


def rng_of(key):
    return np.random.default_rng(np.asarray(jr.key_data(key)))


def normal(key, *shape):
    return rng_of(key).standard_normal(shape, np.float32)


def matrix(pair):
    """The product of two factors, in NumPy."""
    return np.asarray(pair.left) @ np.asarray(pair.right).swapaxes(-2, -1)


@pytest.mark.slow
def test_as_many_clusters_as_units_are_all_units(getkey):
    changes = [random_low_rank(getkey(), 6, 5, width) for width in (1, 3)]
    merged = cluster_units(changes, 4, key=getkey())
    exact = sum(map(matrix, changes))
    # The root of the mean width over the units.
    assert_close(matrix(merged), np.float32(0.5**0.5) * exact, rtol=1e-5)


@pytest.mark.slow
def test_units_that_all_have_are_there_once(getkey):
    """Copies with their columns in another order merge to the adapter itself."""
    x = random_low_rank(getkey(), 8, 7, 3, batch=(2,))
    turned = jax.tree.map(lambda f: jnp.asarray(np.asarray(f)[..., ::-1]), x)
    merged = cluster_units([x, turned, x], 3, key=getkey())
    assert_close(matrix(merged), matrix(x), rtol=1e-5)


def test_a_center_is_stretched_to_the_length_of_its_members(getkey):
    a, b = normal(getkey(), 6, 1), normal(getkey(), 5, 1)
    near = [lrjax.LowRank(jnp.asarray(a * s), jnp.asarray(b * s)) for s in (1, 2)]
    merged = cluster_units(near, 1, key=getkey())
    assert_close(merged.left, np.float32(1.5) * a, rtol=1e-5)


def test_fisher_information_finds_the_joint_minimum(getkey):
    """Of quadratic losses with diagonal Hessians, each model at its own minimum."""
    optima = [normal(getkey(), 4, 3) for _ in range(3)]
    curves = [rng_of(getkey()).standard_exponential((4, 3), np.float32) for _ in range(3)]
    got = np.asarray(fisher_average(optima, curves))
    slope = sum(h * (got - x) for h, x in zip(curves, optima, strict=True))
    assert np.abs(slope).max() < 1e-5
    even = [np.ones((4, 3), np.float32)] * 3
    assert_close(fisher_average(optima, even), np.mean(optima, axis=0), rtol=1e-6)
    none = [curves[0], 0 * curves[1], 0 * curves[2]]
    assert_close(fisher_average(optima, none), optima[0], rtol=1e-6)
    tiny = [np.float32(1e-30) * h for h in curves]
    assert_close(fisher_average(optima, tiny), got, rtol=1e-5)


def test_a_mask_is_a_coin_that_gradients_reach(getkey):
    logits = {"w": jnp.asarray(normal(getkey(), 400, 50)), "b": jnp.zeros(3)}
    mask = jax.jit(merging.concrete_mask)
    sharp = np.asarray(mask(logits, key=getkey(), temperature=1e-3)["w"], np.float64)
    chance = 1 / (1 + np.exp(-np.asarray(logits["w"], np.float64)))
    spread = np.sqrt(np.sum(chance * (1 - chance))) / chance.size
    assert abs(np.mean(sharp - chance)) < 5 * spread + 1e-3
    key = getkey()
    total = lambda x: sum(map(jnp.sum, merging.concrete_mask(x, key=key).values()))
    # Zero in float32 where a coin is a decision already.
    slopes = jax.jit(jax.grad(total))(logits)
    assert all(np.mean(np.asarray(g) > 0) > 0.9 for g in jax.tree.leaves(slopes))


def test_a_constant_mask_is_none_and_others_keep_the_size(getkey):
    changes = [{"w": normal(getkey(), 5, 4)} for _ in range(2)]
    exact = weighted_sum(changes, jnp.ones(2))
    even = {"w": np.full((5, 4), 0.3, np.float32)}
    assert_close(masked_sum(changes, even), exact, rtol=1e-5)
    mask = {"w": rng_of(getkey()).random((5, 4), np.float32)}
    want = mask["w"] / np.mean(mask["w"]) * (2 * changes[0]["w"] - changes[1]["w"])
    assert_close(masked_sum(changes, mask, [2.0, -1.0])["w"], want, rtol=1e-5)


def cloud(key, bad):
    """Nine honest gradients around a truth, and some that are anything."""
    draws = normal(key, 12, 20, 20)
    truth, honest = draws[0], list(draws[0] + 0.5 * draws[1:10])
    return truth, honest + list(50 * draws[10 : 10 + bad])


def cosine(x, y):
    return np.vdot(x, y) / np.linalg.norm(x) / np.linalg.norm(y)


@pytest.mark.parametrize("mean", [geometric_median, flag_mean], ids=["median", "flag"])
def test_a_few_workers_cannot_move_the_mean(mean, getkey):
    truth, gradients = cloud(getkey(), bad=2)
    assert cosine(sum(gradients), truth) < 0.5
    merged = np.asarray(mean([{"w": g} for g in gradients])["w"])
    assert cosine(merged, truth) > 0.95
    assert 0.7 < np.linalg.norm(merged) / np.linalg.norm(truth) < 1.4
    scaled = mean([{"w": np.float32(1e3) * g} for g in gradients])["w"]
    assert_close(scaled, np.float32(1e3) * merged, rtol=1e-3)


def test_the_median_has_the_least_sum_of_distances(getkey):
    _, gradients = cloud(getkey(), bad=2)
    points = [np.asarray(g, np.float64) for g in gradients]
    median = np.asarray(geometric_median(gradients))
    best = sum_of_distances(median, points)
    for _ in range(5):
        moved = median + 0.05 * normal(getkey(), 20, 20)
        assert sum_of_distances(moved, points) > best


@pytest.mark.slow
def test_the_mean_of_nodes_is_that_of_their_products(getkey):
    changes = [random_low_rank(k, 9, 8, 2) for k in jr.split(getkey(), 4)]
    arrays = [matrix(c) for c in changes]
    for mean in (geometric_median, flag_mean):
        got = mean(changes)
        assert got.rank == 8
        assert_close(matrix(got), mean(arrays), rtol=1e-3)


def test_a_flag_of_one_direction_is_that_of_the_singular_vector(getkey):
    """Without reweighting: the leading left singular vector of the unit gradients."""
    x = normal(getkey(), 30, 5)
    got = flag_mean(list(x.T), steps=0)
    lengths = np.linalg.norm(np.asarray(x, np.float64), axis=0)
    unit = np.asarray(x, np.float64) / lengths
    y = np.linalg.svd(unit)[0][:, :1]
    want = y @ (y.T @ unit.mean(axis=1)) * np.median(lengths)
    assert_close(got, np.asarray(want, np.float32), rtol=100 * tol(got))


@pytest.mark.slow
def test_nothing_gives_nothing():
    zeros = [{"w": jnp.zeros((3, 2))}] * 3
    for mean in (geometric_median, flag_mean):
        assert_close(mean(zeros), zeros[0])
    node = lrjax.LowRank(jnp.zeros((3, 1)), jnp.zeros((2, 1)))
    for merge in (merging.orthogonalized_sum, merging.isotropic_sum):
        assert_close(jax.jit(merge)([node, node]).materialize(), jnp.zeros((3, 2)))
    merged = cluster_units([node, node], 1, key=jr.key(0))
    assert_close(matrix(merged), np.zeros((3, 2), np.float32))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda x: merging.cluster_units([x], 3, key=jr.key(0)),
            "found 2 units at the root",
        ),
        (
            lambda x: merging.cluster_units([x.left], 1, key=jr.key(0)),
            "needs LowRank nodes",
        ),
        (lambda x: merging.fisher_average([x], [x]), "Fisher information of a factor"),
        (lambda x: merging.fisher_average([x.left], []), "for each of 1"),
        (lambda x: merging.fisher_average([x.left], [x.left], [1, 2]), "each of 1 trees"),
        (lambda x: merging.masked_sum([x], x), "entries of a matrix"),
        (lambda x: merging.flag_mean([x], rank=2), "trees, 1; got 2"),
    ],
)
def test_refusals(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(random_low_rank(jr.key(0), 6, 5, 2))

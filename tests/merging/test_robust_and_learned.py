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


def test_as_many_clusters_as_units_are_all_units(getkey):
    changes = [random_low_rank(getkey(), 6, 5, width) for width in (1, 3)]
    merged = merging.cluster_units(changes, 4, key=getkey())
    exact = merging.weighted_sum(changes, jnp.ones(2)).materialize()
    # The root of the mean width over the units.
    assert_close(merged.materialize(), (2 / 4) ** 0.5 * exact, rtol=1e-5)


def test_units_that_all_have_are_there_once(getkey):
    """Copies with their columns in another order merge to the adapter itself."""
    x = random_low_rank(getkey(), 8, 7, 3, batch=(2,))
    turned = lrjax.LowRank(x.left[..., ::-1], x.right[..., ::-1])
    merged = merging.cluster_units([x, turned, x], 3, key=getkey())
    assert_close(merged.materialize(), x.materialize(), rtol=1e-5)


def test_a_center_is_stretched_to_the_length_of_its_members(getkey):
    a, b = jr.normal(getkey(), (6, 1)), jr.normal(getkey(), (5, 1))
    near = [lrjax.LowRank(a * s, b * s) for s in (1.0, 2.0)]
    merged = merging.cluster_units(near, 1, key=getkey())
    assert_close(merged.left, 1.5 * a, rtol=1e-5)


def test_fisher_information_finds_the_joint_minimum(getkey):
    """Of quadratic losses with diagonal Hessians, each model at its own minimum."""
    keys = jr.split(getkey(), 6)
    optima = [jr.normal(k, (4, 3)) for k in keys[:3]]
    curves = [jr.exponential(k, (4, 3)) for k in keys[3:]]
    got = merging.fisher_average(optima, curves)
    slope = sum(h * (got - x) for h, x in zip(curves, optima, strict=True))
    assert float(jnp.abs(slope).max()) < 1e-5
    even = [jnp.ones((4, 3))] * 3
    assert_close(merging.fisher_average(optima, even), sum(optima) / 3, rtol=1e-6)
    none = [curves[0], 0 * curves[1], 0 * curves[2]]
    assert_close(merging.fisher_average(optima, none), optima[0], rtol=1e-6)
    tiny = [1e-30 * h for h in curves]
    assert_close(merging.fisher_average(optima, tiny), got, rtol=1e-5)


def test_a_mask_is_a_coin_that_gradients_reach(getkey):
    logits = {"w": jr.normal(getkey(), (400, 50)), "b": jnp.zeros(3)}
    sharp = merging.concrete_mask(logits, key=getkey(), temperature=1e-3)["w"]
    chance = jax.nn.sigmoid(logits["w"])
    spread = float(jnp.sqrt(jnp.sum(chance * (1 - chance)))) / chance.size
    assert abs(float(jnp.mean(sharp - chance))) < 5 * spread + 1e-3
    key = getkey()
    total = lambda x: sum(map(jnp.sum, merging.concrete_mask(x, key=key).values()))
    # Zero in float32 where a coin is a decision already.
    assert all(jnp.mean(g > 0) > 0.9 for g in jax.tree.leaves(jax.grad(total)(logits)))


def test_a_constant_mask_is_none_and_others_keep_the_size(getkey):
    changes = [{"w": jr.normal(k, (5, 4))} for k in jr.split(getkey(), 2)]
    exact = merging.weighted_sum(changes, jnp.ones(2))
    assert_close(
        merging.masked_sum(changes, {"w": jnp.full((5, 4), 0.3)}), exact, rtol=1e-5
    )
    mask = {"w": jr.uniform(getkey(), (5, 4))}
    want = mask["w"] / jnp.mean(mask["w"]) * (2 * changes[0]["w"] - changes[1]["w"])
    assert_close(merging.masked_sum(changes, mask, [2.0, -1.0])["w"], want, rtol=1e-5)


def cloud(key, bad):
    """Nine honest gradients around a truth, and some that are anything."""
    keys = jr.split(key, 12)
    truth = jr.normal(keys[0], (20, 20))
    honest = [truth + 0.5 * jr.normal(k, (20, 20)) for k in keys[1:10]]
    return truth, honest + [50 * jr.normal(k, (20, 20)) for k in keys[10 : 10 + bad]]


def cosine(x, y):
    return float(jnp.vdot(x, y) / jnp.linalg.norm(x) / jnp.linalg.norm(y))


@pytest.mark.parametrize("mean", [merging.geometric_median, merging.flag_mean])
def test_a_few_workers_cannot_move_the_mean(mean, getkey):
    truth, gradients = cloud(getkey(), bad=2)
    assert cosine(sum(gradients), truth) < 0.5
    merged = mean([{"w": g} for g in gradients])["w"]
    assert cosine(merged, truth) > 0.95
    assert 0.7 < float(jnp.linalg.norm(merged) / jnp.linalg.norm(truth)) < 1.4
    scaled = mean([{"w": 1e3 * g} for g in gradients])["w"]
    assert_close(scaled, 1e3 * merged, rtol=1e-3)


def test_the_median_has_the_least_sum_of_distances(getkey):
    _, gradients = cloud(getkey(), bad=2)
    points = [np.asarray(g, np.float64) for g in gradients]
    best = sum_of_distances(merging.geometric_median(gradients), points)
    for k in jr.split(getkey(), 5):
        moved = merging.geometric_median(gradients) + 0.05 * jr.normal(k, (20, 20))
        assert sum_of_distances(moved, points) > best


def test_the_mean_of_nodes_is_that_of_their_products(getkey):
    changes = [random_low_rank(k, 9, 8, 2) for k in jr.split(getkey(), 4)]
    arrays = [c.materialize() for c in changes]
    for mean in (merging.geometric_median, merging.flag_mean):
        got = mean(changes)
        assert got.rank == 8
        assert_close(got.materialize(), mean(arrays), rtol=1e-3)


def test_a_flag_of_one_direction_is_that_of_the_singular_vector(getkey):
    """Without reweighting: the leading left singular vector of the unit gradients."""
    x = jr.normal(getkey(), (30, 5))
    got = merging.flag_mean(list(x.T), steps=0)
    lengths = np.linalg.norm(np.asarray(x, np.float64), axis=0)
    unit = np.asarray(x, np.float64) / lengths
    y = np.linalg.svd(unit)[0][:, :1]
    want = y @ (y.T @ unit.mean(axis=1)) * np.median(lengths)
    assert_close(got, jnp.asarray(want, jnp.float32), rtol=100 * tol(got))


def test_nothing_gives_nothing():
    zeros = [{"w": jnp.zeros((3, 2))}] * 3
    for mean in (merging.geometric_median, merging.flag_mean):
        assert_close(jax.jit(mean)(zeros), zeros[0])
    node = lrjax.LowRank(jnp.zeros((3, 1)), jnp.zeros((2, 1)))
    for merge in (merging.orthogonalized_sum, merging.isotropic_sum):
        assert_close(jax.jit(merge)([node, node]).materialize(), jnp.zeros((3, 2)))
    merged = merging.cluster_units([node, node], 1, key=jr.key(0))
    assert_close(merged.materialize(), jnp.zeros((3, 2)))


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

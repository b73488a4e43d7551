"""Gradients of workers of whom some may send anything: as stacks, and on a mesh."""

import functools
import re

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from lrjax import merging
from tests.helpers import assert_close


RULES = {
    "mean": merging.Mean(),
    "geometric median": merging.GeometricMedian(),
    "flag": merging.FlagMean(),
    "krum": merging.Krum(outliers=2),
    "multi-krum": merging.Krum(outliers=2, keep=5),
    "trimmed": merging.TrimmedMean(2),
    "median": merging.TrimmedMean(),
}
ROBUST = [name for name in RULES if name != "mean"]
BY_GRAM = [name for name in RULES if isinstance(RULES[name], merging.GramRule)]
rules = pytest.mark.parametrize("name", RULES)


@functools.partial(jax.jit, static_argnums=(1, 2))
def workers(key, honest, bad):
    """A true gradient of 400 numbers in two arrays, and those of all workers."""
    k_truth, k_honest, k_bad = jr.split(key, 3)
    truth = jr.normal(k_truth, (400,))
    near = truth[None] + 0.5 * jr.normal(k_honest, (honest, 400))
    rows = jnp.concatenate([near, 50 * jr.normal(k_bad, (bad, 400))])
    tree = lambda x: {
        "w": x[..., :390].reshape(*x.shape[:-1], 13, 30),
        "b": x[..., 390:],
    }
    return tree(truth), tree(rows)


def flat(tree):
    return np.concatenate(
        [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    )


def cosine(x, y):
    x, y = flat(x), flat(y)
    return x @ y / np.linalg.norm(x) / np.linalg.norm(y)


aggregated = jax.jit(merging.aggregate_gradients)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROBUST)
def test_three_gross_outliers_of_twelve_are_borne(name, getkey):
    """The mean of nine has a cosine of 0.986; that of all of twelve one of 0.1."""
    truth, gradients = workers(getkey(), 9, 3)
    if name in ("krum", "multi-krum", "trimmed"):
        rule = type(RULES[name])(3, *((7,) if name == "multi-krum" else ()))
    else:
        rule = RULES[name]
    found = aggregated(gradients, rule)
    assert cosine(aggregated(gradients, merging.Mean()), truth) < 0.3
    # One worker alone, which Krum chooses, has 1 / sqrt(1.25) = 0.89; the median of each
    # coordinate has the noise of one of (9 · 2 / pi) and the pull of three on one side.
    assert cosine(found, truth) > {"krum": 0.85, "trimmed": 0.96, "median": 0.96}.get(
        name, 0.975
    )
    length = np.linalg.norm(flat(found)) / np.linalg.norm(flat(truth))
    assert 0.7 < length < 1.4
    scaled = aggregated(jax.tree.map(lambda x: 1e3 * x, gradients), rule)
    assert_close(scaled, jax.tree.map(lambda x: 1e3 * x, found), rtol=1e-3)


def test_rules_beside_their_formulas():
    x = np.asarray(jr.normal(jr.key(0), (7, 5)))
    found = lambda rule: aggregated(jnp.asarray(x), rule)
    np.testing.assert_allclose(found(merging.Mean()), x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found(merging.TrimmedMean()), np.median(x, 0), rtol=1e-6)
    np.testing.assert_allclose(
        found(merging.TrimmedMean(2)), np.sort(x, 0)[2:-2].mean(0), rtol=1e-5
    )
    # An even number of workers: the mean of the two in the middle.
    np.testing.assert_allclose(
        aggregated(jnp.asarray(x[:6]), merging.TrimmedMean()),
        np.median(x[:6], 0),
        rtol=1e-6,
    )
    gaps = np.sum((x[:, None] - x[None]) ** 2, -1)
    scores = np.sort(gaps, 1)[:, 1 : 7 - 2 - 2 + 1].sum(1)  # without itself
    best = np.argsort(scores)
    np.testing.assert_allclose(found(merging.Krum(2)), x[best[0]], rtol=1e-6)
    np.testing.assert_allclose(found(merging.Krum(2, 3)), x[best[:3]].mean(0), rtol=1e-5)
    np.testing.assert_allclose(found(merging.Krum()), x[best[0]], rtol=1e-6)  # 2 of 7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["geometric median", "flag"])
def test_stacks_and_lists_of_trees_are_one_thing(name, getkey):
    _, gradients = workers(getkey(), 5, 1)
    trees = [jax.tree.map(lambda x, i=i: x[i], gradients) for i in range(6)]
    alone = {"geometric median": merging.geometric_median, "flag": merging.flag_mean}[name]
    assert_close(aggregated(gradients, RULES[name]), alone(trees), rtol=1e-4)


MESH = jax.make_mesh((8,), ("workers",), axis_types=(AxisType.Auto,))


def on_mesh(rule):
    """A worker on each of eight devices, the result the same on all."""

    def worker(gradients):
        own = jax.tree.map(lambda x: x[0], gradients)
        return merging.aggregate_gradients(own, rule, axis_name="workers")

    return jax.jit(jax.shard_map(worker, mesh=MESH, in_specs=P("workers"), out_specs=P()))


@pytest.mark.slow_but("mean")
@rules
def test_a_mesh_gives_what_a_stack_gives(name, getkey):
    _, gradients = workers(getkey(), 6, 2)
    stacked = aggregated(gradients, RULES[name])
    # Weiszfeld's iteration on products that were summed in another order.
    assert_close(on_mesh(RULES[name])(gradients), stacked, rtol=1e-4)


@pytest.mark.parametrize("name", ["flag", "median"])
def test_an_axis_of_vmap_gives_what_a_stack_gives(name, getkey):
    _, gradients = workers(getkey(), 5, 1)
    worker = lambda g: merging.aggregate_gradients(g, RULES[name], axis_name="workers")
    found = jax.jit(jax.vmap(worker, axis_name="workers"))(gradients)
    stacked = aggregated(gradients, RULES[name])
    for i in (0, 5):
        assert_close(jax.tree.map(lambda x, i=i: x[i], found), stacked, rtol=1e-4)


@rules
def test_no_device_gathers_the_gradients_of_all(name, getkey):
    """No all-gather at all, and no array of the program has eight whole gradients."""
    _, gradients = workers(getkey(), 6, 2)
    text = on_mesh(RULES[name]).lower(gradients).compile().as_text()
    assert "all-gather" not in text
    sizes = [
        int(np.prod(list(map(int, dims.split(",")))))
        for dims in re.findall(r"f32\[([\d,]+)\]", text)
    ]
    assert max(sizes) <= 392  # 390 numbers of one worker, and what makes them divide by 8


@pytest.mark.slow_but("mean")
@rules
def test_numbers_that_are_none_or_too_large_count_as_zeros(name, getkey):
    _, gradients = workers(getkey(), 8, 0)
    bad = jnp.array([jnp.nan, jnp.inf, 1e30, 1.0])
    spoiled = jax.tree.map(lambda x: x.at[0].set(bad[0]).at[1].mul(bad[2]), gradients)
    zeros = jax.tree.map(lambda x: x.at[:2].set(0), gradients)
    wanted = aggregated(zeros, RULES[name])
    assert_close(aggregated(spoiled, RULES[name]), wanted)
    assert_close(on_mesh(RULES[name])(spoiled), wanted, rtol=1e-4)


@rules
def test_degenerate_gradients_are_finite_and_dtypes_stay(name):
    zeros = {"w": jnp.zeros((7, 3, 2), jnp.bfloat16), "b": jnp.zeros((7, 4))}
    found = aggregated(zeros, RULES[name])
    assert_close(found, jax.tree.map(lambda x: x[0], zeros))
    assert found["w"].dtype == jnp.bfloat16
    same = jax.tree.map(lambda x: x + 3, zeros)
    assert_close(aggregated(same, RULES[name]), jax.tree.map(lambda x: x[0], same))


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda x: merging.aggregate_gradients({"a": x, "b": x[1:]}),
            ValueError,
            "one length",
        ),
        (lambda x: merging.aggregate_gradients(x[0, 0]), ValueError, "the root"),
        (lambda x: merging.aggregate_gradients(x, merging.Krum(1)), ValueError, "bears 0"),
        (lambda x: merging.aggregate_gradients(x[:2], merging.Krum()), ValueError, "got 2"),
        (
            lambda x: merging.aggregate_gradients(x, merging.Krum(0, 5)),
            ValueError,
            "keeps from",
        ),
        (
            lambda x: merging.aggregate_gradients(x, merging.TrimmedMean(2)),
            ValueError,
            "half of 4",
        ),
        (
            lambda x: merging.aggregate_gradients(x, merging.FlagMean(5)),
            ValueError,
            "4; got 5",
        ),
        (lambda x: merging.aggregate_gradients(1j * x), TypeError, "complex"),
    ],
)
def test_refusals(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(jnp.ones((4, 3)))

"""Sums of changes: exact in factors, entry by entry, and by their spectra."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import merging
from tests.helpers import assert_close, random_low_rank, tol
from tests.reference.merging import elected, orthogonalized, trimmed


WIDTHS = (1, 3, 2)
WEIGHTS = (0.5, -2.0, 1.5)


def tree(key, width, dtype=jnp.float32):
    keys = jr.split(key, 4)
    return {
        "pair": random_low_rank(keys[0], 8, 5, width, dtype=dtype),
        "stack": random_low_rank(keys[1], 6, 7, width, batch=(2,), dtype=dtype),
        "svd": lrjax.svd(random_low_rank(keys[2], 7, 6, width, dtype=dtype)),
        "bias": jr.normal(keys[3], (4,), dtype),
        "none": None,
    }


def trees(key, widths=WIDTHS, dtype=jnp.float32):
    keys = jr.split(key, len(widths))
    return [tree(k, w, dtype) for k, w in zip(keys, widths, strict=True)]


def is_node(x):
    return isinstance(x, lrjax.LowRank | lrjax.SVDForm)


def dense(tree):
    return jax.tree.map(
        lambda x: x.materialize() if is_node(x) else x, tree, is_leaf=is_node
    )


def summed(changes, weights):
    return jax.tree.map(
        lambda *xs: sum(w * x for w, x in zip(weights, xs, strict=True)), *changes
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_widths_add_up_and_products_are_summed(dtype, getkey):
    changes = trees(getkey(), dtype=dtype)
    merged = jax.jit(merging.weighted_sum)(changes, jnp.array(WEIGHTS))
    assert merged["pair"].rank == merged["svd"].rank == sum(WIDTHS)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(dtype)}
    # In units of the parts, which may cancel.
    want = summed([dense(c) for c in trees_in(changes, jnp.float32)], WEIGHTS)
    pairs = zip(jax.tree.leaves(dense(merged)), jax.tree.leaves(want), strict=True)
    for got, exact in pairs:
        error = jnp.linalg.norm((got.astype(jnp.float32) - exact).ravel())
        assert error <= tol(got) * 10 * exact.size**0.5


def trees_in(changes, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), changes)


def test_one_change_of_weight_one_comes_back(getkey):
    change, one = tree(getkey(), 3), jnp.ones(1)
    want = jax.jit(dense)(change)
    for merge in (
        lambda x: merging.weighted_sum([x], one),
        lambda x: merging.add_factors([x], one),
        lambda x: merging.ties([x], density=1.0),
        lambda x: merging.orthogonalized_sum([x]),
    ):
        got = jax.jit(lambda x, merge=merge: dense(merge(x)))(change)
        assert_close(got, want, condition=10)


def test_the_default_is_the_mean_and_a_rank_the_best_approximation(getkey):
    changes = trees(getkey())
    exact = jax.jit(merging.weighted_sum)(changes)
    assert_close(dense(exact), summed([dense(c) for c in changes], [1 / 3] * 3), rtol=1e-5)
    cut = jax.jit(lambda x: merging.weighted_sum(x, rank=2))(changes)
    for path in ("pair", "stack", "svd"):
        assert cut[path].rank == 2
        want = lrjax.truncate(exact[path].materialize(), 2)
        assert_close(cut[path].materialize(), want.materialize())


def test_a_rank_that_no_matrix_has_cuts_to_the_shorter_side(getkey):
    wide = [random_low_rank(key, 6, 5, 4) for key in jr.split(getkey(), 3)]
    exact = merging.weighted_sum(wide)
    cut = merging.weighted_sum(wide, rank=9)
    assert (exact.rank, cut.rank) == (12, 5)
    assert_close(cut.materialize(), exact.materialize(), condition=10)


def test_a_node_beside_an_array_is_an_array(getkey):
    x, y = random_low_rank(getkey(), 6, 5, 2), jr.normal(getkey(), (6, 5))
    merged = merging.weighted_sum([x, y], [2.0, 3.0])
    assert_close(merged, 2 * x.materialize() + 3 * y, rtol=1e-5)


def test_weights_are_traced_mapped_and_differentiated_at_zero(getkey):
    changes = [c["pair"] for c in trees(getkey())]
    value = lambda w: merging.weighted_sum(changes, w).materialize()
    slopes = jax.jacobian(value)(jnp.zeros(3))
    for k, change in enumerate(changes):
        assert_close(slopes[..., k], change.materialize(), rtol=1e-5)
    many = jr.normal(getkey(), (4, 3))
    assert_close(jax.jit(jax.vmap(value))(many), jnp.stack([value(w) for w in many]))


def test_factors_added_have_cross_terms(getkey):
    x, y = (random_low_rank(k, 6, 5, 2) for k in jr.split(getkey()))
    merged = merging.add_factors([x, y], [4.0, -9.0])
    want = (2 * x.left + 3 * y.left) @ (2 * x.right - 3 * y.right).T
    assert_close(merged.materialize(), want, rtol=1e-5)


@pytest.mark.parametrize("by", ["total", "frequency"])
def test_signs_are_elected_as_the_loop_does(by, getkey):
    # Integers, so that there are draws and zeros.
    arrays = [jr.randint(k, (5, 4), -2, 3).astype(float) for k in jr.split(getkey(), 4)]
    weights = [0.5, 2.0, 1.0, 3.0]
    got = merging.elect_signs(arrays, weights, by=by)
    assert_close(got, jnp.asarray(elected(arrays, weights, by), got.dtype))


def test_ties_trims_first_and_takes_factors_one_by_one(getkey):
    changes = [random_low_rank(k, 6, 5, 2) for k in jr.split(getkey(), 3)]
    weights, density = jnp.array([0.25, 4.0, 9.0]), 0.5
    merged = merging.ties(changes, weights, density=density)
    for side in ("left", "right"):
        factors = [trimmed(getattr(c, side), density) for c in changes]
        want = elected(factors, np.sqrt(weights), "total")
        assert_close(getattr(merged, side), jnp.asarray(want, jnp.float32), rtol=1e-5)


@pytest.mark.parametrize("density", [0.0, 0.3, 0.7, 1.0])
def test_trim_keeps_as_many_as_it_says(density, getkey):
    x = jr.normal(getkey(), (10, 10))
    got = jax.jit(merging.trim)(x, density)
    assert_close(got, jnp.asarray(trimmed(x, density), jnp.float32))
    assert int(jnp.sum(merging.trim(jnp.ones(100), density))) == round(100 * density)


def test_drop_keeps_the_mean_of_each(getkey):
    x = jnp.full((200, 100), 3.0)
    for density in (0.2, 0.9):
        kept = merging.drop(x, density, key=getkey())
        assert set(np.unique(kept).tolist()) == {0.0, np.float32(3.0) / np.float32(density)}
        # Four standard deviations of a mean of coins.
        spread = 3 * ((1 - density) / density / x.size) ** 0.5
        assert abs(float(jnp.mean(kept)) - 3) < 5 * spread
    assert_close(merging.drop(x, 1.0, key=getkey()), x)
    pair = random_low_rank(getkey(), 30, 20, 3)
    kept = merging.drop(pair, 0.5, key=getkey())
    assert not np.array_equal(kept.left[:20] == 0, kept.right == 0)


def test_bases_are_made_orthonormal_together(getkey):
    matrices = [jr.normal(k, (12, 9)) for k in jr.split(getkey(), 3)]
    weights = [1.0, 0.5, 2.0]
    got = merging.orthogonalized_sum(matrices, weights, rank=2)
    assert got.rank == 6
    want = orthogonalized(matrices, weights, 2)
    assert_close(got.materialize(), jnp.asarray(want, jnp.float32), rtol=1e-3)
    values = np.sort(np.linalg.norm(np.asarray(got.left), axis=0))
    kept = np.sort(np.linalg.svd(np.asarray(got.materialize()), compute_uv=False)[:6])
    np.testing.assert_allclose(values, kept, rtol=1e-4)


def test_stacks_and_nodes_are_orthogonalized_as_matrices(getkey):
    changes = [random_low_rank(k, 9, 8, 2, batch=(3,)) for k in jr.split(getkey(), 2)]
    got = merging.orthogonalized_sum(changes).materialize()
    for i in range(3):
        own = [c.materialize()[i] for c in changes]
        alone = merging.orthogonalized_sum(own, rank=2).materialize()
        assert_close(got[i], alone, rtol=1e-3)


def test_orthogonal_tasks_are_summed(getkey):
    q = jnp.linalg.qr(jr.normal(getkey(), (9, 9)))[0]
    changes = [lrjax.LowRank(3 * q[:, i : i + 2], q[:, i : i + 2]) for i in (0, 2, 4)]
    exact = merging.weighted_sum(changes, jnp.ones(3))
    assert_close(
        merging.orthogonalized_sum(changes).materialize(), exact.materialize(), rtol=1e-5
    )


def test_all_singular_values_are_their_mean(getkey):
    matrices = [jr.normal(k, (7, 5)) for k in jr.split(getkey(), 3)]
    got = merging.isotropic_sum(matrices)
    u, s, vt = np.linalg.svd(np.asarray(sum(matrices), np.float64), full_matrices=False)
    assert_close(got, jnp.asarray(s.mean() * u @ vt, jnp.float32), rtol=1e-4)
    changes = [random_low_rank(k, 9, 8, 2) for k in jr.split(getkey(), 2)]
    node = merging.isotropic_sum(changes)
    s = np.linalg.svd(np.asarray(sum(c.materialize() for c in changes)), compute_uv=False)
    kept = np.linalg.svd(np.asarray(node.materialize()), compute_uv=False)
    np.testing.assert_allclose(kept[:4], s[:4].mean(), rtol=1e-4)
    assert node.rank == 4


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x, y: merging.weighted_sum([]), "at least one tree"),
        (lambda x, y: merging.weighted_sum([x, x], [1.0]), "one weight for each of 2"),
        (lambda x, y: merging.weighted_sum([{"a": x}, {"b": x}]), r"\['a', 'b'\]"),
        (lambda x, y: merging.weighted_sum([{"a": x}, {"a": x.T}]), "one shape at a"),
        (
            lambda x, y: merging.add_factors([{"a": x}, {"a": y}], [1, 1]),
            "width 2.*width 3",
        ),
        (lambda x, y: merging.ties([x, x.materialize()]), "of one width at the root"),
        (lambda x, y: merging.elect_signs([x], by="vote"), "got 'vote'"),
        (lambda x, y: merging.trim(x, 1.5), r"a share in \[0, 1\], got 1.5"),
        (lambda x, y: merging.drop(x, 0.0, key=jr.key(0)), "above 0"),
        (lambda x, y: merging.orthogonalized_sum([x, y], rank=3), "rank may be 2 there"),
    ],
)
def test_refusals(call, sentence, shapes_unchecked):
    x, y = random_low_rank(jr.key(0), 6, 5, 2), random_low_rank(jr.key(1), 6, 5, 3)
    with pytest.raises(ValueError, match=sentence):
        call(x, y)

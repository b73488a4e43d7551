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
    """Changes of one width, of NumPy's numbers."""
    rng = np.random.default_rng(np.asarray(jr.key_data(key)))
    array = lambda x: jnp.asarray(x, dtype)
    normal = lambda *shape: array(rng.standard_normal(shape))
    basis = lambda n: array(np.linalg.qr(rng.standard_normal((n, width)))[0])
    return {
        "pair": lrjax.LowRank(normal(8, width), normal(5, width)),
        "stack": lrjax.LowRank(normal(2, 6, width), normal(2, 7, width)),
        "svd": lrjax.SVDForm(basis(7), normal(width, width), basis(6)),
        "bias": normal(4),
        "none": None,
    }


def trees(key, widths=WIDTHS, dtype=jnp.float32):
    return [tree(jr.fold_in(key, i), w, dtype) for i, w in enumerate(widths)]


def is_node(x):
    return isinstance(x, lrjax.LowRank | lrjax.SVDForm)


@jax.jit
def dense(tree):
    return jax.tree.map(
        lambda x: x.materialize() if is_node(x) else x, tree, is_leaf=is_node
    )


def summed(changes, weights):
    """The weighted sum of trees of matrices, in NumPy."""
    add = lambda *xs: sum(w * np.asarray(x) for w, x in zip(weights, xs, strict=True))
    return jax.tree.map(add, *changes)


def normal(key, *shape):
    rng = np.random.default_rng(np.asarray(jr.key_data(key)))
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def matrix(pair):
    """The product of two factors, in NumPy."""
    return np.asarray(pair.left) @ np.asarray(pair.right).swapaxes(-2, -1)


# Each is one program for all changes of one layout.
weighted_sum = jax.jit(merging.weighted_sum, static_argnames="rank")
orthogonalized_sum = jax.jit(merging.orthogonalized_sum, static_argnames="rank")
add_factors, isotropic_sum = jax.jit(merging.add_factors), jax.jit(merging.isotropic_sum)
ties = jax.jit(merging.ties)
elect_signs = jax.jit(merging.elect_signs, static_argnames="by")
trim, drop = jax.jit(merging.trim), jax.jit(merging.drop)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_widths_add_up_and_products_are_summed(dtype, getkey):
    changes = trees(getkey(), dtype=dtype)
    merged = weighted_sum(changes, jnp.array(WEIGHTS))
    assert merged["pair"].rank == merged["svd"].rank == sum(WIDTHS)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(dtype)}
    # In units of the parts, which may cancel.
    want = summed([dense(c) for c in trees_in(changes, jnp.float32)], WEIGHTS)
    pairs = zip(jax.tree.leaves(dense(merged)), jax.tree.leaves(want), strict=True)
    for got, exact in pairs:
        error = np.linalg.norm(np.asarray(got, np.float32) - exact)
        assert error <= tol(got) * 10 * exact.size**0.5


def trees_in(changes, dtype):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), changes)


@pytest.mark.slow
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
    exact = weighted_sum(changes)
    assert_close(dense(exact), summed([dense(c) for c in changes], [1 / 3] * 3), rtol=1e-5)
    cut = weighted_sum(changes, rank=2)
    got, whole = dense(cut), dense(exact)
    for path in ("pair", "stack", "svd"):
        assert cut[path].rank == 2
        u, s, vt = np.linalg.svd(np.asarray(whole[path], np.float64))
        want = (u[..., :2] * s[..., None, :2]) @ vt[..., :2, :]
        assert_close(got[path], want.astype(np.float32))


def test_a_rank_that_no_matrix_has_cuts_to_the_shorter_side(getkey):
    wide = [random_low_rank(key, 6, 5, 4) for key in jr.split(getkey(), 3)]
    exact = weighted_sum(wide)
    cut = weighted_sum(wide, rank=9)
    assert (exact.rank, cut.rank) == (12, 5)
    assert_close(matrix(cut), matrix(exact), condition=10)


def test_a_node_beside_an_array_is_an_array(getkey):
    x, y = random_low_rank(getkey(), 6, 5, 2), normal(getkey(), 6, 5)
    merged = weighted_sum([x, y], [2.0, 3.0])
    assert_close(merged, 2 * matrix(x) + 3 * np.asarray(y), rtol=1e-5)


def test_weights_are_traced_mapped_and_differentiated_at_zero(getkey):
    changes = [c["pair"] for c in trees(getkey())]
    value = lambda w: merging.weighted_sum(changes, w).materialize()
    slopes = np.asarray(jax.jit(jax.jacobian(value))(jnp.zeros(3)))
    for k, change in enumerate(changes):
        assert_close(slopes[..., k], matrix(change), rtol=1e-5)
    many, single = normal(getkey(), 4, 3), jax.jit(value)
    assert_close(jax.jit(jax.vmap(value))(many), np.stack([single(w) for w in many]))


def test_factors_added_have_cross_terms(getkey):
    x, y = (random_low_rank(k, 6, 5, 2) for k in jr.split(getkey()))
    merged = add_factors([x, y], [4.0, -9.0])
    (a, b), (c, d) = (map(np.asarray, (z.left, z.right)) for z in (x, y))
    assert_close(matrix(merged), (2 * a + 3 * c) @ (2 * b - 3 * d).T, rtol=1e-5)


@pytest.mark.parametrize("by", ["total", "frequency"])
def test_signs_are_elected_as_the_loop_does(by, getkey):
    # Integers, so that there are draws and zeros.
    arrays = [jr.randint(k, (5, 4), -2, 3).astype(float) for k in jr.split(getkey(), 4)]
    weights = [0.5, 2.0, 1.0, 3.0]
    got = elect_signs(arrays, weights, by=by)
    assert_close(got, np.asarray(elected(arrays, weights, by), got.dtype))


def test_ties_trims_first_and_takes_factors_one_by_one(getkey):
    changes = [random_low_rank(k, 6, 5, 2) for k in jr.split(getkey(), 3)]
    weights, density = jnp.array([0.25, 4.0, 9.0]), 0.5
    merged = ties(changes, weights, density=density)
    for side in ("left", "right"):
        factors = [trimmed(getattr(c, side), density) for c in changes]
        want = elected(factors, np.sqrt(weights), "total")
        assert_close(getattr(merged, side), np.asarray(want, np.float32), rtol=1e-5)


@pytest.mark.parametrize("density", [0.0, 0.3, 0.7, 1.0])
def test_trim_keeps_as_many_as_it_says(density, getkey):
    x = normal(getkey(), 10, 10)
    assert_close(trim(x, density), np.asarray(trimmed(x, density), np.float32))
    assert int(np.sum(trim(jnp.ones(100), density))) == round(100 * density)


def test_drop_keeps_the_mean_of_each(getkey):
    x = jnp.full((200, 100), 3.0)
    for density in (0.2, 0.9):
        kept = np.asarray(drop(x, density, key=getkey()))
        assert set(np.unique(kept).tolist()) == {0.0, np.float32(3.0) / np.float32(density)}
        # Four standard deviations of a mean of coins.
        spread = 3 * ((1 - density) / density / x.size) ** 0.5
        assert abs(kept.mean(dtype=np.float64) - 3) < 5 * spread
    assert_close(drop(x, 1.0, key=getkey()), x)
    pair = random_low_rank(getkey(), 30, 20, 3)
    kept = drop(pair, 0.5, key=getkey())
    assert not np.array_equal(np.asarray(kept.left)[:20] == 0, np.asarray(kept.right) == 0)


def test_bases_are_made_orthonormal_together(getkey):
    matrices = [normal(getkey(), 12, 9) for _ in range(3)]
    weights = [1.0, 0.5, 2.0]
    got = orthogonalized_sum(matrices, weights, rank=2)
    assert got.rank == 6
    want = orthogonalized(matrices, weights, 2)
    assert_close(matrix(got), np.asarray(want, np.float32), rtol=1e-3)
    values = np.sort(np.linalg.norm(np.asarray(got.left), axis=0))
    kept = np.sort(np.linalg.svd(matrix(got), compute_uv=False)[:6])
    np.testing.assert_allclose(values, kept, rtol=1e-4)


@pytest.mark.slow
def test_stacks_and_nodes_are_orthogonalized_as_matrices(getkey):
    changes = [random_low_rank(k, 9, 8, 2, batch=(3,)) for k in jr.split(getkey(), 2)]
    got = matrix(orthogonalized_sum(changes))
    for i in range(3):
        own = [jnp.asarray(matrix(c)[i]) for c in changes]
        assert_close(got[i], matrix(orthogonalized_sum(own, rank=2)), rtol=1e-3)


def test_orthogonal_tasks_are_summed(getkey):
    q = np.linalg.qr(normal(getkey(), 9, 9))[0]
    pair = lambda u: lrjax.LowRank(jnp.asarray(3 * u), jnp.asarray(u))
    changes = [pair(q[:, i : i + 2]) for i in (0, 2, 4)]
    exact = weighted_sum(changes, jnp.ones(3))
    assert_close(matrix(orthogonalized_sum(changes)), matrix(exact), rtol=1e-5)


def test_all_singular_values_are_their_mean(getkey):
    matrices = [normal(getkey(), 7, 5) for _ in range(3)]
    got = isotropic_sum(matrices)
    total = np.sum(np.asarray(matrices, np.float64), axis=0)
    u, s, vt = np.linalg.svd(total, full_matrices=False)
    assert_close(got, np.asarray(s.mean() * u @ vt, np.float32), rtol=1e-4)
    changes = [random_low_rank(k, 9, 8, 2) for k in jr.split(getkey(), 2)]
    node = isotropic_sum(changes)
    s = np.linalg.svd(sum(map(matrix, changes)), compute_uv=False)
    kept = np.linalg.svd(matrix(node), compute_uv=False)
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

"""The pool of clusters against lists, and what its rule promises."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax.continual import ClusterPool

from ..helpers import assert_close
from ..reference.cluster_pool import Clusters


add = jax.jit(ClusterPool.add)


@jax.jit
def offer(pool, points, carried, pools):
    """One point after the other."""
    each = lambda own, new: (own.add(new[0], new[1], pool=new[2]), None)
    return jax.lax.scan(each, pool, (points, carried, pools))[0]


def filled(points, **settings):
    pool = ClusterPool.start(points[0], jnp.zeros([], jnp.int32), **settings)
    return offer(pool, points, jnp.arange(len(points)), jnp.zeros(len(points), jnp.int32))


def times(pool, index=0):
    """When the points of each cluster came, the oldest first."""
    born = np.sort(np.asarray(pool.born[index]))
    return [list(row[row >= 0]) for row in born if (row >= 0).any()]


@pytest.mark.slow_but("2-1-True")
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(("clusters", "size"), [(2, 1), (5, 3)])
def test_it_is_the_loop_over_lists(clusters, size, merge, x64, getkey):
    """Streams whose modes come one after the other, and one that is mixed."""
    modes = 3 * jr.normal(getkey(), (4, 2), jnp.float64)
    noise = jr.normal(getkey(), (60, 2), jnp.float64)
    sorted_ = jnp.repeat(modes, 15, axis=0) + noise
    for points in (sorted_, jr.permutation(getkey(), sorted_)):
        want = Clusters(clusters, size, merge)
        for z in np.asarray(points):
            want.add(z)
        pool = filled(points, clusters=clusters, size=size, merge=merge)
        assert times(pool) == want.times()
        assert_close(pool.means[0], np.array(want.means()), condition=100)
        # What is stored is what came then, and carries what it came with.
        there = np.asarray(pool.born) >= 0
        born = np.asarray(pool.born)[there]
        np.testing.assert_array_equal(pool.points[there], points[born])
        np.testing.assert_array_equal(pool.carried[there], born)


@pytest.mark.slow
def test_the_first_points_open_a_cluster_each(getkey):
    points = jr.normal(getkey(), (7, 3))
    pool = filled(points[:4], clusters=4, size=3)
    assert times(pool) == [[0], [1], [2], [3]]
    assert_close(pool.means[0], points[:4])
    early = filled(points[:2], clusters=4, size=3)
    np.testing.assert_array_equal(early.counts(), [[1, 1, 0, 0]])
    assert int(early.contents()[2].sum()) == 2
    assert not np.any(early.contents()[0][~np.asarray(early.contents()[2])])


@pytest.mark.slow
def test_a_cluster_keeps_its_last_points(getkey):
    points = jr.normal(getkey(), (8, 3))
    pool = filled(points, clusters=1, size=3)
    assert times(pool) == [[5, 6, 7]]
    assert_close(pool.means[0, 0], points[5:].mean(0), condition=100)
    same = filled(jnp.ones((6, 3)), clusters=1, size=3)
    np.testing.assert_array_equal(same.points, np.ones((1, 1, 3, 3)))


def modes_of(getkey, order):
    """Points far apart by mode, in an order of modes."""
    noise = 0.1 * jr.normal(getkey(), (len(order), 2))
    corners = jnp.array([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    return corners[order] + noise


def purity(pool, order):
    """The share of clusters that hold points of one mode alone."""
    return np.mean([len(set(order[np.array(c)])) == 1 for c in times(pool)])


def test_what_was_seen_before_the_pool_was_full_stays(getkey):
    """A buffer of as many last points would hold the last mode alone."""
    order = np.repeat([0, 1, 2, 0], [2, 2, 2, 40])
    pool = filled(modes_of(getkey, order), clusters=6, size=3)
    kept = [set(order[np.array(c)]) for c in times(pool)]
    assert set.union(*kept) == {0, 1, 2}
    assert purity(pool, order) == 1


@pytest.mark.slow
def test_a_late_mode_takes_a_cluster_of_another_one_unless_they_merge(getkey):
    order = np.repeat([0, 1], [30, 8])
    points = modes_of(getkey, order)
    taken = filled(points, clusters=4, size=10)
    assert purity(taken, order) < 1
    merged = filled(points, clusters=4, size=10, merge=True)
    assert purity(merged, order) == 1
    assert {m for c in times(merged) for m in order[np.array(c)]} == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("merge", [False, True])
def test_pools_are_apart_and_members_of_a_vmap_too(merge, getkey):
    """Each pool sees its own points; as if there were one object for each."""
    points = jr.normal(getkey(), (2, 40, 3))
    own = jr.randint(getkey(), (2, 40), 0, 3)
    settings = {"clusters": 3, "size": 2, "merge": merge}
    start = ClusterPool.start(points[0, 0], jnp.zeros([], jnp.int32), pools=3, **settings)
    number = jnp.arange(40)
    many = jax.jit(jax.vmap(lambda p, o: offer(start, p, number, o)))(points, own)
    for member in range(2):
        for pool in range(3):
            chosen = np.flatnonzero(np.asarray(own[member]) == pool)
            want = Clusters(3, 2, merge)
            for z in np.asarray(points[member])[chosen]:
                want.add(z)
            got = times(jax.tree.map(lambda x, m=member: x[m], many), pool)
            assert got == [[chosen[t] for t in c] for c in want.times()]


@pytest.mark.slow
def test_trees_are_points_and_distances_are_those_of_all_numbers(x64, getkey):
    flat = jr.normal(getkey(), (30, 5), jnp.float64)
    tree = {"a": flat[:, :3].reshape(-1, 3, 1), "b": flat[:, 3:]}
    whole = filled(flat, clusters=4, size=2)
    start = ClusterPool.start(
        jax.tree.map(lambda x: x[0], tree), jnp.zeros([], jnp.int32), clusters=4, size=2
    )
    number = jnp.arange(30)
    pool = offer(start, tree, number, 0 * number)
    np.testing.assert_array_equal(pool.born, whole.born)


def test_means_of_narrow_numbers_are_wide():
    pool = ClusterPool.start(jnp.zeros(2, jnp.bfloat16), clusters=1, size=2)
    pool = add(add(pool, jnp.full(2, 256.0, jnp.bfloat16)), jnp.ones(2, jnp.bfloat16))
    assert pool.points.dtype == jnp.bfloat16
    np.testing.assert_array_equal(pool.means[0, 0], np.full(2, 128.5, np.float32))


@pytest.mark.slow
def test_a_sample_is_some_of_the_points_without_repetition(getkey):
    points = jr.normal(getkey(), (9, 3))
    pool = filled(points, clusters=5, size=3)
    have = int(pool.counts().sum())
    draw = jax.jit(ClusterPool.sample, static_argnums=1)
    seen = set()
    for key in jr.split(getkey(), 40):
        _, numbers, there = draw(pool, 4, key=key)
        chosen = np.asarray(numbers)[np.asarray(there)]
        assert len(set(chosen)) == min(4, have)
        seen |= set(chosen)
    # Any point is missed by all forty draws with a chance of (1 − 4/9)⁴⁰ < 1e-10.
    assert seen == {t for c in times(pool) for t in c}
    few = filled(points[:2], clusters=5, size=3)
    assert int(draw(few, 4, key=getkey())[2].sum()) == 2


@pytest.mark.usefixtures("shapes_unchecked")
def test_errors():
    start = functools.partial(ClusterPool.start, jnp.zeros(3))
    with pytest.raises(ValueError, match="needs clusters >= 1, got 0"):
        start(clusters=0)
    with pytest.raises(ValueError, match="one cluster has no two"):
        start(clusters=1, merge=True)
    with pytest.raises(ValueError, match=r"floating-point .* got int32: cast"):
        ClusterPool.start(jnp.zeros(3, jnp.int32))
    pool = start()
    with pytest.raises(ValueError, match=r"takes point as start saw it, of shapes .*3,"):
        pool.add(jnp.zeros(4))
    with pytest.raises(ValueError, match=r"takes carried as start saw it, .* \[\], got"):
        pool.add(jnp.zeros(3), jnp.zeros(1))
    with pytest.raises(ValueError, match=r"between 1 and 30 points.*got 31"):
        pool.sample(31, key=jr.key(0))
    with pytest.raises(TypeError, match=r"jax.random.key\(1\)"):
        pool.sample(3, key=1)  # pyright: ignore[reportArgumentType]

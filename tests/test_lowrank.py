import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from tests.helpers import all_finite, assert_close, random_low_rank, relative_error


BATCHES = [(), (3,), (2, 3)]


def dense(x):
    return np.einsum("...mr,...nr->...mn", np.asarray(x.left), np.asarray(x.right))


@pytest.mark.parametrize("batch", BATCHES)
def test_node_is_its_dense_value(getkey, batch):
    x = random_low_rank(getkey(), 7, 5, 2, batch=batch)
    assert x.shape == (*batch, 7, 5)
    assert x.rank == 2
    assert_close(x.materialize(), dense(x))
    assert_close(x.T.materialize(), dense(x).swapaxes(-1, -2))
    v, w = jr.normal(getkey(), (*batch, 5)), jr.normal(getkey(), (*batch, 7))
    assert_close(x.matvec(v), np.einsum("...mn,...n->...m", dense(x), v), condition=10)
    assert_close(x.rmatvec(w), np.einsum("...mn,...m->...n", dense(x), w), condition=10)


@pytest.mark.parametrize("batch", BATCHES)
def test_algebra_is_that_of_the_dense_values(getkey, batch):
    x = random_low_rank(getkey(), 9, 6, 2, batch=batch)
    y = random_low_rank(getkey(), 9, 6, 3, batch=batch)
    assert_close(lrjax.add(x, y).materialize(), dense(x) + dense(y))
    assert lrjax.add(x, y).rank == 5
    assert_close(lrjax.inner(x, y), (dense(x) * dense(y)).sum((-2, -1)), condition=100)
    assert_close(lrjax.norm(x), np.linalg.norm(dense(x), axis=(-2, -1)))
    s = lrjax.svd(y)
    assert_close(s.materialize(), dense(y))
    singular = np.linalg.svd(dense(y), compute_uv=False)[..., :3]
    assert_close(jnp.diagonal(s.core, axis1=-2, axis2=-1), singular)
    u, _, vt = np.linalg.svd(dense(y))
    best = (u[..., :2] * singular[..., None, :2]) @ vt[..., :2, :]
    assert_close(lrjax.truncate(y, 2).materialize(), best, condition=100)
    b = lrjax.balance(y)
    assert_close(b.materialize(), dense(y))
    gram = np.swapaxes(b.left, -1, -2) @ np.asarray(b.left)
    assert_close(gram, np.swapaxes(b.right, -1, -2) @ np.asarray(b.right), condition=10)
    assert_close(np.diagonal(gram, axis1=-2, axis2=-1), singular)


def test_norm_keeps_its_digits_under_cancellation(getkey, x64):
    x = random_low_rank(getkey(), 30, 20, 3, dtype=jnp.float64)
    nudge = random_low_rank(getkey(), 30, 20, 3, dtype=jnp.float64)
    y = lrjax.LowRank(x.left + 1e-9 * nudge.left, x.right)
    minus_x = lrjax.LowRank(-x.left, x.right)
    difference = np.linalg.norm(1e-9 * np.asarray(nudge.left) @ np.asarray(x.right).T)
    assert relative_error(lrjax.norm(lrjax.add(y, minus_x)), difference) < 1e-5


def test_degenerate_values_stay_finite():
    zero = lrjax.LowRank(jnp.zeros((4, 2)), jnp.zeros((3, 2)))
    for y in (lrjax.balance(zero), lrjax.truncate(zero, 1), lrjax.svd(zero)):
        assert all_finite(y)
    assert lrjax.norm(zero) == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_is_kept(getkey, dtype):
    x = random_low_rank(getkey(), 9, 6, 2, dtype=dtype)
    for y in (x.materialize(), lrjax.norm(x), lrjax.inner(x, x), lrjax.balance(x).left):
        assert y.dtype == dtype
    assert relative_error(lrjax.balance(x).materialize(), x.materialize()) < 5 * float(
        jnp.finfo(dtype).eps
    )


def test_rank_of_an_svd_form_changes_under_jit_and_vmap(getkey):
    full = lrjax.svd(random_low_rank(getkey(), 8, 6, 4))
    traces = 0

    @jax.jit
    def cut(rank):
        nonlocal traces
        traces += 1
        return lrjax.SVDForm(full.left, full.core, full.right, rank=rank).materialize()

    for rank in range(1, 5):
        assert_close(cut(rank), lrjax.truncate(full, rank).materialize(), condition=100)
    assert traces == 1
    assert_close(jax.vmap(cut)(jnp.arange(1, 5)), jnp.stack([cut(i) for i in range(1, 5)]))
    stacked = lrjax.svd(random_low_rank(getkey(), 8, 6, 4, batch=(3,)))
    ranks = jnp.array([1, 2, 4])
    masked = lrjax.SVDForm(stacked.left, stacked.core, stacked.right, rank=ranks)
    assert np.linalg.matrix_rank(masked.materialize(), tol=1e-4).tolist() == [1, 2, 4]


def test_svd_form_is_its_dense_value(getkey):
    x = random_low_rank(getkey(), 8, 6, 3)
    s = lrjax.svd(x)
    assert s.rank == 3
    assert s.shape == (8, 6)
    v, w = jr.normal(getkey(), (6,)), jr.normal(getkey(), (8,))
    assert_close(s.matvec(v), x.matvec(v), condition=10)
    assert_close(s.rmatvec(w), x.rmatvec(w), condition=10)
    assert_close(s.T.materialize(), x.T.materialize())


def test_copies_may_hold_anything(getkey):
    x = random_low_rank(getkey(), 4, 3, 2)
    for value in (True, "label", None, 1.0):
        copy = jax.tree.map(lambda leaf, v=value: v, x)
        assert isinstance(copy, lrjax.LowRank)
        assert copy.left is value or copy.left == value
        jax.tree.structure(copy)
        repr(copy)
    assert eqx.combine(*eqx.partition(x, lambda leaf: leaf.shape[0] == 4)).rank == 2
    eqx.filter_jit(lambda t: t)(jax.tree.map(lambda leaf: None, x))


@pytest.mark.parametrize(
    ("left", "right", "error", "message"),
    [
        (jnp.ones((4, 2)), jnp.ones((3, 1)), ValueError, r"one rank.*\(4, 2\).*\(3, 1\)"),
        (jnp.ones((4, 2)), jnp.ones((2, 3)), ValueError, "must be transposed"),
        (jnp.ones((2, 4, 2)), jnp.ones((3, 2)), ValueError, r"batch axes.*\(2, 4, 2\)"),
        (jnp.ones((4, 2)), jnp.ones((3, 2), jnp.bfloat16), ValueError, "one dtype"),
        (jnp.ones((4, 2), int), jnp.ones((3, 2), int), TypeError, "floating point"),
        (jnp.ones(4), jnp.ones(4), ValueError, "at least two axes"),
        (None, jnp.ones((3, 2)), TypeError, "must be an array"),
    ],
)
def test_refuses_what_is_no_factorization(left, right, error, message):
    # Outside tests nothing checks annotations: call the check itself.
    from lrjax.lowrank.nodes import _check_pair

    with pytest.raises(error, match=message):
        _check_pair("LowRank", left, right)
    with pytest.raises(Exception, match=r"."):
        lrjax.LowRank(left, right)


def test_refuses_wrong_arguments(getkey):
    x = random_low_rank(getkey(), 4, 3, 2)
    s = lrjax.svd(x)
    with pytest.raises(ValueError, match=r"core of shape \(2, 2\)"):
        lrjax.SVDForm(s.left, jnp.ones((3, 3)), s.right)
    with pytest.raises(TypeError, match="integer"):
        lrjax.SVDForm(s.left, s.core, s.right, rank=1.5)
    with pytest.raises(ValueError, match="between 1 and the width 2"):
        lrjax.truncate(x, 3)
    with pytest.raises(ValueError, match=r"one shape.*\(4, 3\).*\(3, 4\)"):
        lrjax.add(x, x.T)
    with pytest.raises(ValueError, match="wider"):
        lrjax.svd(random_low_rank(getkey(), 4, 3, 5))


def test_serialises(getkey, tmp_path):
    x = random_low_rank(getkey(), 4, 3, 2)
    eqx.tree_serialise_leaves(tmp_path / "x.eqx", x)
    back = eqx.tree_deserialise_leaves(tmp_path / "x.eqx", jax.tree.map(jnp.zeros_like, x))
    assert_close(back, x, rtol=0)

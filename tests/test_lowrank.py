import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
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


@pytest.mark.parametrize("batch", BATCHES)
def test_truncation_of_the_transpose_is_the_transpose(batch, getkey, x64):
    """Factor by factor: the common signs of singular vectors favour neither side."""
    x = random_low_rank(getkey(), 9, 6, 3, batch=batch, dtype=jnp.float64)
    want = lrjax.truncate(x, 2)
    got = lrjax.truncate(x.T, 2)
    assert_close(got.left, want.right, condition=1e3)
    assert_close(got.right, want.left, condition=1e3)


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
        (jnp.ones((4, 2), complex), jnp.ones((3, 2), complex), TypeError, "real"),
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


@pytest.mark.parametrize("batch", [(), (3,)])
def test_products_with_arrays_and_nodes_are_those_of_the_value(getkey, batch):
    x = random_low_rank(getkey(), 4, 5, 2, batch=batch)
    dense = np.asarray(x.materialize(), np.float64)
    right, left = jr.normal(getkey(), (5, 3)), jr.normal(getkey(), (3, 4))
    close = lambda got, want: assert_close(got, jnp.asarray(want, jnp.float32), rtol=1e-5)
    close(x @ right[:, 0], dense @ np.asarray(right[:, 0]))
    close(left[0] @ x, np.asarray(left[0]) @ dense)
    if batch:
        right, left = jnp.stack([right] * 3), jnp.stack([left] * 3)
    close(x @ right, dense @ np.asarray(right))
    close(left @ x, np.asarray(left) @ dense)
    close(np.asarray(left) @ x, np.asarray(left) @ dense)
    for y in (random_low_rank(getkey(), 5, 6, r, batch=batch) for r in (1, 3)):
        product = x @ y
        assert product.rank == min(x.rank, y.rank)
        close(product.materialize(), dense @ np.asarray(y.materialize(), np.float64))
        close((lrjax.svd(x) @ lrjax.svd(y)).materialize(), product.materialize())


ARITHMETIC = [
    lambda x: 2 * x,
    lambda x: x / 2,
    lambda x: x + x,
    lambda x: x - jnp.ones((4, 3)),
    lambda x: np.ones((4, 3)) + x,
    lambda x: np.float32(2) * x,
    lambda x: -x,
]


@pytest.mark.parametrize("operation", ARITHMETIC)
@pytest.mark.parametrize("form", [lambda x: x, lrjax.svd])
def test_arithmetic_says_what_to_call(operation, form):
    x = form(lrjax.LowRank(jnp.ones((4, 1)), jnp.ones((3, 1))))
    with pytest.raises(TypeError, match=r"lrjax\.add.*matvec.* x\.materialize\(\)"):
        operation(x)


def test_nothing_turns_into_a_dense_array_by_itself():
    x = lrjax.LowRank(jnp.ones((4, 1)), jnp.ones((3, 1)))
    assert x.ndim == lrjax.svd(x).ndim == 2
    for convert in (np.asarray, jnp.asarray):
        with pytest.raises(TypeError, match=r"shape \(4, 3\).* x\.materialize\(\)"):
            convert(x)
    doubled = optax.tree_utils.tree_scale(2.0, x)
    assert_close(doubled.materialize(), 4 * x.materialize())


@pytest.mark.parametrize("shape", [(2,), (3, 2), (3, 3)])
def test_matvec_of_what_is_no_vector_says_so(shape):
    x = lrjax.LowRank(jnp.ones((4, 1)), jnp.ones((3, 1)))
    with pytest.raises(ValueError, match=r"3 numbers .*\(3,\), got .* x @ columns"):
        x.matvec(jnp.ones(shape))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (2, 5, 5)])
def test_the_algebra_takes_dense_matrices_and_svd_forms(getkey, x64, shape):
    dense = jr.normal(getkey(), shape, jnp.float64)
    form = lrjax.svd(dense)
    values = np.linalg.svd(np.asarray(dense), compute_uv=False)
    got = jnp.diagonal(form.core, axis1=-2, axis2=-1)
    np.testing.assert_allclose(got, values, atol=1e-12)
    assert_close(form.materialize(), dense, rtol=1e-13)
    for x in (dense, form):
        np.testing.assert_allclose(
            lrjax.norm(x), np.linalg.norm(np.asarray(dense), axis=(-2, -1)), rtol=1e-13
        )
        assert_close(lrjax.inner(x, x), lrjax.norm(x) ** 2, rtol=1e-13)
        assert_close(lrjax.balance(x).materialize(), dense, rtol=1e-12)
        cut = lrjax.truncate(x, 2).materialize()
        rest = np.sqrt((values[..., 2:] ** 2).sum(-1))
        np.testing.assert_allclose(lrjax.norm(cut - dense), rest, rtol=1e-12)
    assert_close(lrjax.svd(form).materialize(), dense, rtol=1e-12)
    assert_close(lrjax.add(form, form).materialize(), 2 * dense, rtol=1e-12)


@pytest.mark.parametrize("x", [3.0, jnp.ones((4, 3), int), jnp.ones(4), "matrix"])
def test_what_is_no_matrix_is_refused(x):
    from lrjax.lowrank.nodes import factors_of

    with pytest.raises(TypeError, match=r"svd needs a lrjax\.LowRank, a lrjax\.SVDForm or"):
        factors_of("svd", x)


def test_serialises(getkey, tmp_path):
    x = random_low_rank(getkey(), 4, 3, 2)
    eqx.tree_serialise_leaves(tmp_path / "x.eqx", x)
    back = eqx.tree_deserialise_leaves(tmp_path / "x.eqx", jax.tree.map(jnp.zeros_like, x))
    assert_close(back, x, rtol=0)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_projected_step_is_the_projection_of_the_gradient(getkey, x64, batch):
    x = random_low_rank(getkey(), 8, 6, 2, batch=batch, dtype=jnp.float64)
    g = jr.normal(getkey(), (*batch, 8, 6), jnp.float64)
    factors = lrjax.LowRank(g @ x.right, g.mT @ x.left)
    step = lrjax.lowrank.project_to_tangent(x, factors)
    p, q = (a @ jnp.linalg.pinv(a) for a in (x.left, x.right))
    got = step.left @ x.right.mT + x.left @ step.right.mT
    assert_close(got, p @ g + g @ q - p @ g @ q, condition=1e3)
    # Projecting the projection changes nothing.
    again = lrjax.LowRank(got @ x.right, got.mT @ x.left)
    assert_close(lrjax.lowrank.project_to_tangent(x, again), step, condition=1e4)


@pytest.mark.parametrize("batch", BATCHES)
def test_relative_step_is_that_of_dense_matrices(getkey, x64, batch):
    x = random_low_rank(getkey(), 8, 6, 2, batch=batch, dtype=jnp.float64)
    u = random_low_rank(getkey(), 8, 6, 2, batch=batch, dtype=jnp.float64)
    move = u.left @ x.right.mT + x.left @ u.right.mT
    norm = lambda a: np.linalg.norm(a, axis=(-2, -1))
    assert_close(lrjax.lowrank.relative_step(x, u), norm(move) / norm(dense(x)))
    # Two halves that undo each other.
    undo = lrjax.LowRank(x.left, -x.right)
    assert (lrjax.lowrank.relative_step(x, undo) < 1e-7).all()


def test_relative_step_of_rows_on_several_devices(getkey):
    x, u = (random_low_rank(getkey(), 16, 6, 2) for _ in range(2))
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    spread = lrjax.LowRank.__new__(lrjax.LowRank)  # a tree of specs, not of arrays
    object.__setattr__(spread, "left", spec("rows"))
    object.__setattr__(spread, "right", spec())
    total = lambda a: jax.lax.psum(a, "rows")
    run = jax.shard_map(
        lambda x, u: lrjax.lowrank.relative_step(x, u, reduce=total),
        mesh=mesh,
        in_specs=(spread, spread),
        out_specs=spec(),
    )
    assert_close(jax.jit(run)(x, u), lrjax.lowrank.relative_step(x, u), condition=10)


def test_initializations_have_the_size_and_the_dtype_that_they_say(getkey, x64):
    key = getkey()
    for dtype in (jnp.float32, jnp.float64):
        drawn = (
            lrjax.lowrank.lora_init((300, 200), 4, key=key, dtype=dtype),
            lrjax.lowrank.gaussian_init((300, 200), 4, 0.1, key=key, dtype=dtype),
            lrjax.lowrank.small_init((300, 200), 4, 0.1, key=key, dtype=dtype),
            lrjax.lowrank.orthogonal_init((300, 200), 4, 0.1, key=key, dtype=dtype),
        )
        for x in drawn:
            assert x.dtype == dtype
            assert x.shape == (300, 200)
    lengths = [jnp.linalg.norm(side, axis=0) for side in (drawn[2].left, drawn[2].right)]
    assert_close(lengths, [jnp.full(4, 0.1)] * 2, rtol=0.15)
    assert np.std(drawn[1].right) == pytest.approx(0.1, rel=0.1)
    even = lrjax.lowrank.small_init((9, 9), 2, 1e-3, key=key, symmetric=True)
    assert_close(even.left, even.right)
    with pytest.raises(ValueError, match="square"):
        lrjax.lowrank.small_init((9, 8), 2, 1e-3, key=key, symmetric=True)
    with pytest.raises(ValueError, match="at least 1"):
        lrjax.lowrank.small_init((9, 8), 0, 1e-3, key=key)


def test_norm_and_singular_values_can_be_differentiated(getkey, x64):
    x = random_low_rank(getkey(), 8, 6, 2, dtype=jnp.float64)
    both = lambda f: jax.grad(lambda left: f(lrjax.LowRank(left, x.right)))(x.left)
    full = lambda f: jax.grad(lambda left: f(left @ x.right.T))(x.left)
    assert_close(both(lrjax.norm), full(jnp.linalg.norm), condition=100)
    values = lambda x: jnp.sum(lrjax.metrics.singular_values(x)[:2] ** 3)
    assert_close(both(values), full(values), condition=1e3)


def test_balanced_factors_have_no_more_values_than_a_side(getkey):
    with pytest.raises(ValueError, match="balanced_init got 5 values"):
        lrjax.lowrank.balanced_init((6, 4), jnp.ones(5), key=getkey())

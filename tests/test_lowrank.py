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


jitted = {
    name: jax.jit(getattr(lrjax, name))
    for name in ("add", "inner", "norm", "svd", "balance")
}
truncate = jax.jit(lrjax.truncate, static_argnums=1)
materialize = jax.jit(lambda x: x.materialize())


@jax.jit
def parts(x, v, w):
    """The value of a node, that of its transpose, and its products with vectors."""
    return x.materialize(), x.T.materialize(), x.matvec(v), x.rmatvec(w)


@pytest.mark.slow_but("batch0", "batch1")
@pytest.mark.parametrize("batch", BATCHES)
def test_node_is_its_dense_value(getkey, batch):
    x = random_low_rank(getkey(), 7, 5, 2, batch=batch)
    assert x.shape == (*batch, 7, 5)
    assert x.rank == 2
    rng = np.random.default_rng(getkey.seed)
    v, w = (rng.standard_normal((*batch, k)).astype(np.float32) for k in (5, 7))
    value, transposed, right, left = parts(x, v, w)
    assert_close(value, dense(x))
    assert_close(transposed, dense(x).swapaxes(-1, -2))
    assert_close(right, np.einsum("...mn,...n->...m", dense(x), v), condition=10)
    assert_close(left, np.einsum("...mn,...m->...n", dense(x), w), condition=10)


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
def test_algebra_is_that_of_the_dense_values(getkey, batch):
    x = random_low_rank(getkey(), 9, 6, 2, batch=batch)
    y = random_low_rank(getkey(), 9, 6, 3, batch=batch)
    both = jitted["add"](x, y)
    assert_close(materialize(both), dense(x) + dense(y))
    assert both.rank == 5
    assert_close(jitted["inner"](x, y), (dense(x) * dense(y)).sum((-2, -1)), condition=100)
    assert_close(jitted["norm"](x), np.linalg.norm(dense(x), axis=(-2, -1)))
    s = jitted["svd"](y)
    assert_close(materialize(s), dense(y))
    singular = np.linalg.svd(dense(y), compute_uv=False)[..., :3]
    assert_close(np.diagonal(s.core, axis1=-2, axis2=-1), singular)
    u, _, vt = np.linalg.svd(dense(y))
    best = (u[..., :2] * singular[..., None, :2]) @ vt[..., :2, :]
    assert_close(materialize(truncate(y, 2)), best, condition=100)
    b = jitted["balance"](y)
    assert_close(materialize(b), dense(y))
    gram = np.swapaxes(b.left, -1, -2) @ np.asarray(b.left)
    assert_close(gram, np.swapaxes(b.right, -1, -2) @ np.asarray(b.right), condition=10)
    assert_close(np.diagonal(gram, axis1=-2, axis2=-1), singular)


@pytest.mark.slow_but("batch0")
@pytest.mark.parametrize("batch", BATCHES)
def test_truncation_of_the_transpose_is_the_transpose(batch, getkey, x64):
    """Factor by factor: the common signs of singular vectors favour neither side."""
    x = random_low_rank(getkey(), 9, 6, 3, batch=batch, dtype=jnp.float64)
    want = truncate(x, 2)
    got = truncate(x.T, 2)
    assert_close(got.left, want.right, condition=1e3)
    assert_close(got.right, want.left, condition=1e3)


@pytest.mark.slow
def test_norm_keeps_its_digits_under_cancellation(getkey, x64):
    x = random_low_rank(getkey(), 30, 20, 3, dtype=jnp.float64)
    nudge = random_low_rank(getkey(), 30, 20, 3, dtype=jnp.float64)
    y = lrjax.LowRank(x.left + 1e-9 * nudge.left, x.right)
    minus_x = lrjax.LowRank(-x.left, x.right)
    difference = np.linalg.norm(1e-9 * np.asarray(nudge.left) @ np.asarray(x.right).T)
    assert relative_error(lrjax.norm(lrjax.add(y, minus_x)), difference) < 1e-5


@pytest.mark.slow
def test_degenerate_values_stay_finite():
    zero = lrjax.LowRank(jnp.zeros((4, 2)), jnp.zeros((3, 2)))
    for y in (jitted["balance"](zero), truncate(zero, 1), jitted["svd"](zero)):
        assert all_finite(y)
    assert jitted["norm"](zero) == 0


@pytest.mark.slow_but("float32")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_is_kept(getkey, dtype):
    x = random_low_rank(getkey(), 9, 6, 2, dtype=dtype)
    value, even = materialize(x), jitted["balance"](x)
    for y in (value, jitted["norm"](x), jitted["inner"](x, x), even.left):
        assert y.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    assert relative_error(materialize(even), value) < 5 * eps


@pytest.mark.slow
def test_rank_of_an_svd_form_changes_under_jit_and_vmap(getkey):
    full = lrjax.svd(random_low_rank(getkey(), 8, 6, 4))
    traces = 0

    @jax.jit
    def cut(rank):
        nonlocal traces
        traces += 1
        return lrjax.SVDForm(full.left, full.core, full.right, rank=rank).materialize()

    for rank in range(1, 5):
        assert_close(cut(rank), materialize(truncate(full, rank)), condition=100)
    assert traces == 1
    assert_close(jax.vmap(cut)(jnp.arange(1, 5)), np.stack([cut(i) for i in range(1, 5)]))
    stacked = jitted["svd"](random_low_rank(getkey(), 8, 6, 4, batch=(3,)))
    ranks = jnp.array([1, 2, 4])
    masked = lrjax.SVDForm(stacked.left, stacked.core, stacked.right, rank=ranks)
    assert np.linalg.matrix_rank(masked.materialize(), tol=1e-4).tolist() == [1, 2, 4]


def test_svd_form_is_its_dense_value(getkey):
    x = random_low_rank(getkey(), 8, 6, 3)
    s = jitted["svd"](x)
    assert s.rank == 3
    assert s.shape == (8, 6)
    v, w = jr.normal(getkey(), (6,)), jr.normal(getkey(), (8,))
    assert_close(parts(s, v, w), parts(x, v, w), condition=10)


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(), (3,)])
def test_products_with_arrays_and_nodes_are_those_of_the_value(getkey, batch):
    x = random_low_rank(getkey(), 4, 5, 2, batch=batch)
    dense = np.asarray(x.materialize(), np.float64)
    right, left = (np.asarray(jr.normal(getkey(), shape)) for shape in ((5, 3), (3, 4)))
    close = lambda got, want: assert_close(got, want.astype(np.float32), rtol=1e-5)
    times = jax.jit(lambda x, y: x @ y)
    close(times(x, right[:, 0]), dense @ right[:, 0])
    close(times(left[0], x), left[0] @ dense)
    if batch:
        right, left = np.stack([right] * 3), np.stack([left] * 3)
    close(times(x, right), dense @ right)
    close(times(left, x), left @ dense)
    close(left @ x, left @ dense)  # numpy asks the node
    for y in (random_low_rank(getkey(), 5, 6, r, batch=batch) for r in (1, 3)):
        product, forms = products(x, y)
        assert product.rank == min(x.rank, y.rank)
        value = np.asarray(materialize(product))
        close(value, dense @ np.asarray(materialize(y), np.float64))
        close(forms, value)


@jax.jit
def products(x, y):
    """Of two nodes, and the value of that of their SVD forms."""
    return x @ y, (lrjax.svd(x) @ lrjax.svd(y)).materialize()


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


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (2, 5, 5)])
def test_the_algebra_takes_dense_matrices_and_svd_forms(getkey, x64, shape):
    dense = jr.normal(getkey(), shape, jnp.float64)
    form = jitted["svd"](dense)
    values = np.linalg.svd(np.asarray(dense), compute_uv=False)
    got = np.diagonal(form.core, axis1=-2, axis2=-1)
    np.testing.assert_allclose(got, values, atol=1e-12)
    assert_close(materialize(form), dense, rtol=1e-13)
    for x in (dense, form):
        np.testing.assert_allclose(
            jitted["norm"](x), np.linalg.norm(np.asarray(dense), axis=(-2, -1)), rtol=1e-13
        )
        assert_close(jitted["inner"](x, x), np.square(jitted["norm"](x)), rtol=1e-13)
        assert_close(materialize(jitted["balance"](x)), dense, rtol=1e-12)
        cut = materialize(truncate(x, 2))
        rest = np.sqrt((values[..., 2:] ** 2).sum(-1))
        np.testing.assert_allclose(jitted["norm"](cut - dense), rest, rtol=1e-12)
    assert_close(materialize(jitted["svd"](form)), dense, rtol=1e-12)
    assert_close(materialize(jitted["add"](form, form)), 2 * dense, rtol=1e-12)


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


@pytest.mark.slow_but("batch0")
@pytest.mark.parametrize("batch", BATCHES)
def test_a_projected_step_is_the_projection_of_the_gradient(getkey, x64, batch):
    x = random_low_rank(getkey(), 8, 6, 2, batch=batch, dtype=jnp.float64)
    left, right = np.asarray(x.left), np.asarray(x.right)
    g = np.random.default_rng(getkey.seed).standard_normal((*batch, 8, 6))
    project = jax.jit(
        lambda g: lrjax.lowrank.project_to_tangent(
            x, lrjax.LowRank(g @ x.right, g.mT @ x.left)
        )
    )
    step = project(g)
    p, q = (a @ np.linalg.pinv(a) for a in (left, right))
    got = step.left @ np.swapaxes(right, -1, -2) + left @ np.swapaxes(step.right, -1, -2)
    assert_close(got, p @ g + g @ q - p @ g @ q, condition=1e3)
    # Projecting the projection changes nothing.
    assert_close(project(got), step, condition=1e4)


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_norm_and_singular_values_can_be_differentiated(getkey, x64):
    x = random_low_rank(getkey(), 8, 6, 2, dtype=jnp.float64)
    values = lambda x: jnp.sum(lrjax.metrics.singular_values(x)[:2] ** 3)

    @jax.jit
    def gradients(left):
        both = lambda f: jax.grad(lambda left: f(lrjax.LowRank(left, x.right)))(left)
        full = lambda f: jax.grad(lambda left: f(left @ x.right.T))(left)
        return (both(lrjax.norm), both(values)), (full(jnp.linalg.norm), full(values))

    (norm, singular), (want_norm, want_singular) = gradients(x.left)
    assert_close(norm, want_norm, condition=100)
    assert_close(singular, want_singular, condition=1e3)


def test_balanced_factors_have_no_more_values_than_a_side(getkey):
    with pytest.raises(ValueError, match="balanced_init got 5 values"):
        lrjax.lowrank.balanced_init((6, 4), jnp.ones(5), key=getkey())

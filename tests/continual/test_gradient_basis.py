import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lrjax
from lrjax.continual import GradientBasis
from tests.helpers import assert_close


PARAMS = {"a": jnp.zeros((3, 4)), "b": (jnp.zeros(5), None), "head": jnp.zeros((2, 2))}
SIZE = 3 * 4 + 5 + 2 * 2
add = eqx.filter_jit(GradientBasis.add)


project_out = eqx.filter_jit(GradientBasis.project_out)


def normal(key, *shape):
    rng = np.random.default_rng(np.asarray(jr.key_data(key)))
    return rng.standard_normal(shape).astype(jnp.result_type(float))


def trees(rows):
    """Rows ``(*b, count, p)`` as gradients with a leading axis."""
    a, b, head = rows[..., :12], rows[..., 12:17], rows[..., 17:]
    lead = rows.shape[:-1]
    parts = {"a": a.reshape(*lead, 3, 4), "b": (b, None), "head": head.reshape(*lead, 2, 2)}
    return jax.tree.map(jnp.asarray, parts)


def row(tree, index):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[index]), tree)


def matrix(tree):
    """All numbers of a tree with a leading axis, a row each, in float64."""
    parts = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(len(x), -1) for x in parts], axis=1)


def projector(rows):
    _, s, vt = np.linalg.svd(np.asarray(rows, np.float64), full_matrices=False)
    vt = vt[s > 1e-5 * s[0]]
    return vt.T @ vt


@pytest.mark.slow
def test_it_spans_what_was_added_and_no_more(getkey):
    g = (normal(getkey(), 6, SIZE) * np.logspace(-3, 3, 6)[:, None]).astype(np.float32)
    basis = add(GradientBasis.start(PARAMS, 9), trees(g[:4]))
    basis = add(basis, trees(np.concatenate([g[:2] + g[2:4], g[4:]])))  # two are old
    v = matrix(basis.directions)
    assert basis.used == 6
    np.testing.assert_allclose(v @ v.T, np.diag([1.0] * 6 + [0] * 3), atol=1e-6)
    q = np.linalg.qr(np.asarray(g, np.float64).T)[0]
    np.testing.assert_allclose(np.abs(np.sum(q.T * v[:6], axis=1)), 1, atol=1e-5)
    assert_close(basis.kept, jnp.ones(()))
    u = normal(getkey(), 1, SIZE)
    got = project_out(basis, row(trees(u), 0))
    rest = matrix(row(got, None))
    np.testing.assert_allclose(rest, u @ (np.eye(SIZE) - q @ q.T), atol=2e-6)
    assert_close(project_out(basis, got), got, condition=10)


@pytest.mark.slow
def test_what_is_no_number_stays_out(getkey):
    g = normal(getkey(), 4, SIZE)
    g[1, 3], g[2, 20], g[3] = np.nan, np.inf, 0
    for keep in ("first", "largest"):
        basis = add(GradientBasis.start(PARAMS, 3, keep=keep), trees(g))
        assert basis.used == 1
        want, got = trees(g[:1] / np.linalg.norm(g[0])), row(basis.directions, slice(1))
        sign = np.sign(np.vdot(got["a"], want["a"]))
        assert_close(jax.tree.map(lambda x, s=sign: s * np.asarray(x), got), want)


def test_a_full_one_keeps_the_first_and_says_what_is_missing(getkey):
    g = normal(getkey(), 6, SIZE)
    basis = add(GradientBasis.start(PARAMS, 4), trees(g[:3]))
    full = add(basis, trees(g[3:]))
    assert full.used == 4
    assert_close(
        row(full.directions, slice(3)),
        row(basis.directions, slice(3)),
        rtol=0,
    )
    p = projector(g[:4])
    assert full.kept < 0.9
    np.testing.assert_allclose(full.kept, np.sum((g @ p) ** 2) / np.sum(g**2), rtol=1e-5)


def test_the_largest_are_those_of_an_incremental_decomposition(getkey):
    g = np.asarray(normal(getkey(), 12, SIZE), np.float64)
    g[:4] *= 10
    basis = GradientBasis.start(PARAMS, 5, keep="largest")
    known = np.zeros((0, SIZE))
    for rows in (g[:4], g[4:8], g[8:]):
        basis = add(basis, trees(rows.astype(np.float32)))
        _, s, vt = np.linalg.svd(np.concatenate([known, rows]), full_matrices=False)
        known = s[:5, None] * vt[:5]
    v = matrix(basis.directions)
    np.testing.assert_allclose(v @ v.T, np.eye(5), atol=1e-6)
    np.testing.assert_allclose(v.T @ v, projector(known), atol=1e-4)
    np.testing.assert_allclose(basis.sizes, s[:5], rtol=1e-5)
    np.testing.assert_allclose(basis.kept, np.sum(known**2) / np.sum(g**2), rtol=1e-5)
    # In other units the directions are the same.
    scaled = GradientBasis.start(PARAMS, 5, keep="largest")
    for rows in (g[:4], g[4:8], g[8:]):
        scaled = add(scaled, trees((1e-3 * rows).astype(np.float32)))
    w = matrix(scaled.directions)
    np.testing.assert_allclose(w.T @ w, v.T @ v, atol=1e-4)


@pytest.mark.slow_but("first")
@pytest.mark.parametrize("keep", ["first", "largest"])
def test_twenty_tasks_leave_it_orthonormal(keep, getkey):
    basis = GradientBasis.start(PARAMS, 12, keep=keep)
    steep = np.logspace(0, -2, SIZE, dtype=np.float32)
    for g in steep * normal(getkey(), 20, 3, SIZE):
        basis = add(basis, trees(g))
    v = matrix(basis.directions)
    np.testing.assert_allclose(v @ v.T, np.eye(12), atol=2e-6)


def output(params, x, c):
    """Linear in the parameters: fixed features, and a readout with a bias."""
    return (params["w"] @ jnp.tanh(x) + params["b"])[c]


@pytest.mark.slow
def test_outputs_of_a_linear_model_stay_through_adam_and_decay(getkey):
    params = {"w": jnp.asarray(normal(getkey(), 3, 8)), "b": jnp.ones(3)}
    x, c = normal(getkey(), 5, 8), np.array([0, 1, 2, 0, 1])
    gradients = jax.jit(jax.vmap(jax.grad(output), (None, 0, 0)))(params, x, c)
    basis = add(GradientBasis.start(params, 6), gradients)
    new, label = 3 * normal(getkey(), 20, 8), np.arange(20) % 3

    def loss(params):
        logits = jax.vmap(lambda x: jnp.stack([output(params, x, i) for i in range(3)]))
        return jnp.mean(
            optax.losses.softmax_cross_entropy_with_integer_labels(logits(new), label)
        )

    def train(tx, params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=40)[0][0]

    adam = optax.adamw(0.05, weight_decay=0.1)
    behind = optax.chain(adam, lrjax.project_out(basis))
    before = optax.chain(lrjax.project_out(basis), adam)

    @jax.jit
    def moved(params):
        at = lambda p: jax.vmap(output, (None, 0, 0))(p, x, c)
        trained = [train(tx, params) for tx in (behind, before)]
        return *(jnp.max(jnp.abs(at(p) - at(params))) for p in trained), loss(
            trained[0]
        ) / loss(params)

    still, leaking, learnt = moved(params)
    assert still < 1e-5  # of 40 steps, each of them to rounding
    assert leaking > 0.1
    assert learnt < 0.7


def test_outputs_of_a_network_move_by_the_square_of_the_step(getkey, x64):
    draw = lambda: jax.tree.map(
        jnp.asarray, {"w": normal(getkey(), 6, 4), "v": normal(getkey(), 3, 6)}
    )
    params = draw()
    logit = lambda p, x, c: (p["v"] @ jnp.tanh(p["w"] @ x))[c]
    x, c = normal(getkey(), 4, 4), np.array([0, 1, 2, 0])
    gradients = jax.jit(jax.vmap(jax.grad(logit), (None, 0, 0)))(params, x, c)
    basis = add(GradientBasis.start(params, 4), gradients)
    step = project_out(basis, draw())

    @jax.jit
    def change(t):
        new = jax.tree.map(lambda p, d: p + t * d, params, step)
        at = lambda p: jax.vmap(logit, (None, 0, 0))(p, x, c)
        return jnp.linalg.norm(at(new) - at(params))

    np.testing.assert_allclose(change(1e-4) / change(5e-5), 4, rtol=1e-2)


@pytest.mark.slow
def test_sharded_parameters_have_sharded_directions(getkey):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    g = {"w": normal(getkey(), 3, 16, 4), "b": normal(getkey(), 3, 6)}
    params = {"w": normal(getkey(), 16, 4), "b": normal(getkey(), 6)}
    g, params = (jax.tree.map(jnp.asarray, tree) for tree in (g, params))
    spec = {"w": P("x"), "b": P()}
    place = lambda tree, lead: {
        k: jax.device_put(x, NamedSharding(mesh, P(*lead, *spec[k])))
        for k, x in tree.items()
    }
    for keep in ("first", "largest"):
        start = lambda p, keep=keep: GradientBasis.start(p, 4, keep=keep)
        want = add(start(params), g)
        with jax.set_mesh(mesh):
            here = place(params, ())
            basis = add(start(here), place(g, (None,)))
            assert basis.directions["w"].sharding.spec == P(None, "x", None)
            got = project_out(basis, here)
            assert got["w"].sharding.spec == P("x", None)
        assert_close(jax.device_get(basis.sizes), jax.device_get(want.sizes), condition=10)
        assert_close(
            jax.device_get(got), jax.device_get(project_out(want, params)), condition=10
        )


def test_many_runs_have_a_basis_each(getkey):
    g, empty = trees(normal(getkey(), 2, 3, SIZE)), GradientBasis.start(PARAMS, 4)
    both = jax.jit(jax.vmap(lambda g: empty.add(g)))(g)
    assert_close(row(both, 1), add(empty, row(g, 1)), condition=10)


def test_a_head_stays_free_and_new_tasks_compile_nothing(getkey):
    g = trees(normal(getkey(), 3, SIZE))
    basis = GradientBasis.start(PARAMS, 4, where=lambda path, shape: "head" not in path)
    tx = optax.chain(optax.sgd(1.0), lrjax.project_out(basis))
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    one = row(g, 0)
    got, _ = update(one, state)
    assert_close(got, jax.tree.map(np.negative, one))
    got, _ = update(one, optax.tree.set(state, basis=add(basis, g)))
    assert update._cache_size() == 1
    assert np.max(np.abs(got["a"])) < 1e-6
    assert_close(got["head"], -np.asarray(one["head"]))


def test_bfloat16_is_protected_in_float32(getkey):
    low = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    g = low(trees(normal(getkey(), 2, SIZE)))
    basis = add(GradientBasis.start(low(PARAMS), 3), g)
    v = matrix(basis.directions)
    np.testing.assert_allclose(v @ v.T, np.diag([1.0, 1.0, 0.0]), atol=1e-6)
    got = project_out(basis, row(g, 0))
    assert got["a"].dtype == jnp.bfloat16
    assert all(np.all(np.abs(np.asarray(x, float)) < 1e-5) for x in jax.tree.leaves(got))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientBasis.start(PARAMS, 0), "room for one direction or more, got 0"),
        (
            lambda: GradientBasis.start(PARAMS, 3, where=lambda path, shape: False),
            "picked none of the leaves a, b.0, head",
        ),
        (
            lambda: GradientBasis.start(PARAMS, 3).add(PARAMS),
            r"protects a and needs gradients of shape \(count, 3, 4\) there, got \(3, 4\)",
        ),
        (
            lambda: lrjax.project_out(GradientBasis.start(PARAMS, 3)).init(
                {**PARAMS, "head": None}
            ),
            r"protects head and needs updates of shape \(2, 2\) there, got nothing",
        ),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()

"""Training in low rank whose rank adapts: the same numbers as with real shapes."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax.linalg import orthonormalize
from tests.helpers import all_finite, assert_close, relative_error
from tests.reference import dynamical_low_rank as reference


M, N, R = 20, 14, 6


def start_at(key, values, width=R, *, m=M, n=N, batch=(), dtype=jnp.float64):
    """A node with these singular values, and columns out of use behind them."""
    kl, kr = jr.split(key)
    basis = lambda k, size: orthonormalize(jr.normal(k, (*batch, size, width), dtype))
    spectrum = jnp.zeros(width, dtype).at[: len(values)].set(jnp.asarray(values, dtype))
    core = jnp.broadcast_to(jnp.diag(spectrum), (*batch, width, width))
    return lrjax.SVDForm(basis(kl, m), core, basis(kr, n))


def target_of(key, rank=M, m=M, n=N):
    kl, kr = jr.split(key)
    left = jr.normal(kl, (m, rank), jnp.float64)
    return left @ jr.normal(kr, (rank, n), jnp.float64) / rank**0.5


def quadratic(key, target):
    """A strongly convex loss with a gradient of full rank; its gradient in NumPy."""
    weights = jr.uniform(key, target.shape, jnp.float64, 0.5, 1.5)
    loss = lambda x: jnp.sum(weights * (x.materialize() - target) ** 2) / 2
    return loss, lambda w: np.asarray(weights) * (w - np.asarray(target))


def train(tx, loss, x, steps, **extra):
    """The matrices and ranks after every step, in one scan."""

    def body(carry, _):
        x, state = carry
        updates, state = tx.update(jax.grad(loss)(x), state, x, **extra)
        x = optax.apply_updates(x, updates)
        return (x, state), (x.materialize(), optax.tree.get(state, "rank"))

    return jax.lax.scan(body, (x, tx.init(x)), length=steps)


@pytest.mark.slow
@pytest.mark.parametrize("width", [R, 9])  # twice nine columns do not fit on either side
@pytest.mark.parametrize(
    ("method", "every", "momentum"),
    [
        ("parallel", 1, 0.0),
        ("parallel", 1, 0.7),
        ("parallel", 3, 0.7),
        ("kls", 1, 0.0),
        ("kls", 2, 0.7),
        ("augmented", 4, 0.0),
        ("augmented", 3, 0.7),
    ],
)
def test_masked_columns_are_real_shapes(method, every, momentum, width, getkey, x64):
    """Same matrices and ranks, for 30 steps, under jit and vmap over tol."""
    x = start_at(getkey(), [3.0, 2.0, 0.5], width)
    loss, gradient = quadratic(getkey(), target_of(getkey()))
    extra = {}
    if method == "kls":
        extra = {"value_and_grad_fn": jax.value_and_grad(loss)}
    rate, tols, traces = 0.3, [0.0, 0.05, 0.15, 0.4], 0

    def run(tol):
        nonlocal traces
        traces += 1
        inner = optax.sgd(rate, momentum)
        tx = lrjax.dynamical_low_rank(inner, tol, method=method, every=every)
        return train(tx, loss, x, 30, **extra)[1]

    matrices, ranks = jax.jit(jax.vmap(run))(jnp.array(tols))
    assert traces == 1
    u, v = np.asarray(x.left)[:, :3], np.asarray(x.right)[:, :3]
    settings = {"method": method, "rate": rate, "every": every, "momentum": momentum}
    for i, tol in enumerate(tols):
        start = (u, np.array([3.0, 2.0, 0.5]), v)
        want = reference.train(start, gradient, tol=tol, cap=width, steps=30, **settings)
        assert ranks[i].tolist() == [rank for _, rank in want]
        for got, (w, _) in zip(matrices[i], want, strict=True):
            # A few dozen roundings a step, which add up.
            assert relative_error(got, w) < 30 * 50 * np.finfo(float).eps
    assert len(set(np.asarray(ranks).ravel().tolist())) > 2


@pytest.mark.slow_but("augmented-1e-06")
@pytest.mark.parametrize("smallest", [1.0, 1e-6, 1e-12])
@pytest.mark.parametrize("method", ["kls", "augmented", "parallel"])
def test_one_step_reaches_a_matrix_of_the_rank(method, smallest, getkey, x64):
    """For ``½‖W − T‖²`` and a step of one, however small a singular value is.

    The parallel method reaches ``P(T)`` alone, and the rest in a quadratic tail.
    """
    x = start_at(getkey(), [2.0, 1.0, smallest], 6)
    target = target_of(getkey(), rank=3)
    loss = lambda x: jnp.sum((x.materialize() - target) ** 2) / 2
    every = 2 if method == "augmented" else 1
    tx = lrjax.dynamical_low_rank(optax.sgd(1.0), 1e-13, method=method, every=every)
    extra = {}
    if method == "kls":
        extra = {"value_and_grad_fn": jax.value_and_grad(loss)}
    _, (matrices, ranks) = jax.jit(lambda x: train(tx, loss, x, 10, **extra))(x)
    if method == "parallel":
        u, v = np.asarray(x.left)[:, :3], np.asarray(x.right)[:, :3]
        first = reference.tangent(u, v, np.asarray(target))
        assert relative_error(matrices[0], first) < 1e-12
        assert relative_error(matrices[0], target) > 0.05
        assert relative_error(matrices[-1], target) < 1e-12
    else:
        assert relative_error(matrices[every - 1], target) < 1e-12
        assert int(ranks[every - 1]) == 3


@pytest.mark.slow
def test_a_parallel_step_is_the_tangent_step(getkey, x64):
    """``W − η P(G)`` exactly, before any truncation: its rank is at most twice as large."""
    x = start_at(getkey(), [3.0, 2.0, 0.5], 6)
    loss, gradient = quadratic(getkey(), target_of(getkey()))
    w, u, v = (np.asarray(a) for a in (x.materialize(), x.left[:, :3], x.right[:, :3]))
    _, (matrices, ranks) = train(lrjax.dynamical_low_rank(optax.sgd(0.7)), loss, x, 1)
    assert (
        relative_error(matrices[0], w - 0.7 * reference.tangent(u, v, gradient(w))) < 1e-13
    )
    assert int(ranks[0]) == 6


@pytest.mark.slow
def test_the_methods_differ_by_the_square_of_the_step(getkey, x64):
    """Back at the old rank; the differences fall fourfold when the step is halved."""
    x = start_at(getkey(), [3.0, 2.0, 1.0], 3)
    loss, _ = quadratic(getkey(), target_of(getkey()))

    @functools.partial(jax.jit, static_argnums=1)
    def after(rate, method):
        tx = lrjax.dynamical_low_rank(optax.sgd(rate), method=method)
        extra = {"value_and_grad_fn": jax.value_and_grad(loss)}
        return train(tx, loss, x, 1, **extra)[1][0][0]

    gaps = [
        np.linalg.norm(after(rate, "parallel") - after(rate, "kls"))
        for rate in (2e-3, 1e-3)
    ]
    assert 3.9 < gaps[0] / gaps[1] < 4.1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["parallel", "augmented", "kls"])
def test_the_step_of_the_matrix_ignores_how_it_is_factored(method, getkey, x64):
    """``(U Q₁, Q₁ᵀ S Q₂, V Q₂)`` is the same matrix, and takes the same steps."""
    x = start_at(getkey(), [3.0, 2.0, 1.0, 0.5], 4)
    turn = lambda: jnp.linalg.qr(jr.normal(getkey(), (4, 4), jnp.float64))[0]
    p, q = turn(), turn()
    y = lrjax.SVDForm(x.left @ p, p.T @ x.core @ q, x.right @ q)
    loss, _ = quadratic(getkey(), target_of(getkey()))
    inner = optax.sgd(0.3, 0.5)
    tx = lrjax.dynamical_low_rank(inner, 0.1, method=method, every=2)
    extra = {}
    if method == "kls":
        extra = {"value_and_grad_fn": jax.value_and_grad(loss)}
    run = jax.jit(lambda x: train(tx, loss, x, 6, **extra)[1])
    (first, ranks), (second, others) = run(x), run(y)
    assert_close(second, first, condition=1e3)
    assert ranks.tolist() == others.tolist()


@pytest.mark.slow
def test_the_error_of_truncation_is_within_the_tolerance(getkey, x64):
    x = start_at(getkey(), [3.0, 2.0, 0.5])
    loss, _ = quadratic(getkey(), target_of(getkey()))
    after = lambda tol: train(lrjax.dynamical_low_rank(optax.sgd(0.5), tol), loss, x, 1)[1]
    whole = np.asarray(after(0.0)[0][0])
    for tol in (0.1, 0.3, 0.6):
        matrix, rank = after(tol)
        error = np.linalg.norm(np.asarray(matrix[0]) - whole)
        assert error <= tol * np.linalg.norm(whole)
        assert error == pytest.approx(
            np.linalg.norm(np.linalg.svd(whole, compute_uv=False)[int(rank[0]) :])
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"method": "augmented", "every": 5}, {"moments": "reset", "every": 5}]
)
def test_adam_on_the_core_and_on_the_rest(settings, getkey, x64):
    """Other leaves are trained as by the inner optimizer; ranks fall, bases stay."""
    x = start_at(getkey(), [3.0, 2.0, 1.0, 0.5], 6)
    target, inputs = target_of(getkey(), rank=2), jr.normal(getkey(), (64, N), jnp.float64)
    offset = jr.normal(getkey(), (M,), jnp.float64)
    params = {"w": x, "b": jnp.zeros(M, jnp.float64), "none": None}

    def loss(p):
        outputs = inputs @ p["w"].materialize().T + p["b"][None]
        return jnp.mean((outputs - inputs @ target.T - offset[None]) ** 2)

    inner = optax.adam(0.1)
    tx = lrjax.dynamical_low_rank(inner, 0.05, **settings)

    def body(carry, _):
        p, state = carry
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return (optax.apply_updates(p, updates), state), updates["b"]

    run = jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), length=600))
    (p, state), biases = run(params)
    assert loss(p) < (0.5 if "moments" in settings else 0.05) * loss(params)
    for side in (p["w"].left[:, :2], p["w"].right[:, :2]):
        assert_close(side.T @ side, np.eye(2), condition=10)
    rank = int(state.rank["w"])
    assert 2 <= rank <= (6 if "moments" in settings else 4)
    assert not np.any(np.asarray(p["w"].core)[rank:])
    # The first step of the bias is that of Adam alone.
    want, _ = inner.update(jax.grad(loss)(params)["b"], inner.init(params["b"]))
    assert_close(biases[0], want)


@pytest.mark.slow
def test_weight_decay_shrinks_the_matrix_and_not_the_bases(getkey, x64):
    x = start_at(getkey(), [3.0, 2.0], 4)
    inner = optax.chain(optax.add_decayed_weights(0.1), optax.scale(-1.0))
    tx = lrjax.dynamical_low_rank(inner)
    zero = jax.tree.map(jnp.zeros_like, x)
    updates, _ = tx.update(zero, tx.init(x), x)
    y = optax.apply_updates(x, updates)
    assert_close(y.materialize(), 0.9 * x.materialize(), condition=10)
    assert_close(y.left[:, :2].T @ y.left[:, :2], np.eye(2), condition=10)


@pytest.mark.slow
def test_a_step_of_nothing_moves_nothing(getkey, x64):
    """Signs of singular vectors stay, so that averages of parameters mean something."""
    x = start_at(getkey(), [3.0, 2.0, 1.0], 3)
    x = lrjax.SVDForm(-x.left, x.core, -x.right)
    tx = lrjax.dynamical_low_rank(optax.sgd(1.0))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, x), tx.init(x), x)
    assert max(float(jnp.max(jnp.abs(u))) for u in jax.tree.leaves(updates)) < 1e-13


@pytest.mark.slow
def test_bases_stay_orthonormal_in_float32(getkey):
    x = start_at(getkey(), [3.0, 2.0, 1.0], 6, dtype=jnp.float32)
    target = jr.normal(getkey(), (M, N))
    loss = lambda x: jnp.sum((x.materialize() - target) ** 2) / 2
    tx = lrjax.dynamical_low_rank(optax.sgd(0.3, 0.9))
    (y, _), _ = jax.jit(lambda x: train(tx, loss, x, 1000))(x)
    eps = float(jnp.finfo(jnp.float32).eps)
    for side in (y.left, y.right):
        assert np.max(np.abs(side.T @ side - np.eye(6))) < 50 * eps


@pytest.mark.slow
def test_rank_grows_where_it_is_needed(getkey, x64):
    x = start_at(getkey(), [1e-3], 6)
    target = target_of(getkey(), rank=4)
    loss = lambda x: jnp.sum((x.materialize() - target) ** 2) / 2
    tx = lrjax.dynamical_low_rank(optax.sgd(0.5), 1e-3)
    (y, state), _ = jax.jit(lambda x: train(tx, loss, x, 60))(x)
    assert int(state.rank) == 4
    assert relative_error(y.materialize(), target) < 1e-2


@pytest.mark.slow
def test_no_decomposition_is_wider_than_twice_the_rank(getkey):
    """And nothing is tall but products: the Cholesky factors are small as well."""
    x = start_at(getkey(), [3.0, 2.0], 4, m=40, n=30, dtype=jnp.float32)
    tx = lrjax.dynamical_low_rank(optax.sgd(0.1), 0.1)
    jaxpr = jax.make_jaxpr(lambda g, s, x: tx.update(g, s, x))(x, tx.init(x), x)
    shapes = set()

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("svd", "eigh", "cholesky", "qr", "geqrf"):
                shapes.add(eqn.invars[0].aval.shape)
            for sub in jax.extend.core.jaxprs_in_params(eqn.params):
                visit(sub)

    visit(jaxpr.jaxpr)
    assert shapes
    assert max(map(max, shapes)) <= 8


@pytest.mark.slow
def test_degenerate_nodes_stay_finite(getkey):
    x = start_at(getkey(), [2.0, 1.0], 4, dtype=jnp.float32)
    zero = jax.tree.map(jnp.zeros_like, x)
    for method, every in (("parallel", 1), ("augmented", 2)):
        tx = lrjax.dynamical_low_rank(optax.adam(0.1), 0.1, method=method, every=every)
        one = jax.jit(lambda g, x, tx=tx: tx.update(g, tx.init(x), x))
        for params, grads in ((x, zero), (zero, zero), (zero, x)):
            assert all_finite(one(grads, params))
    # A core of zeros has no gradient along new directions, but one inside.
    updates, _ = one(lrjax.SVDForm(zero.left, x.core, zero.right), zero)
    assert all_finite(updates)


@pytest.mark.slow
def test_rounding_along_new_directions_makes_no_step(getkey):
    """Adam would make whole steps of it, where the gradient lies inside the bases."""
    x = start_at(getkey(), [3.0, 2.0], 4, dtype=jnp.float32)
    loss = lambda x: jnp.sum(x.materialize() ** 2) / 2
    tx = lrjax.dynamical_low_rank(optax.adam(0.1), 1e-4)
    _, (matrices, ranks) = jax.jit(lambda x: train(tx, loss, x, 5))(x)
    assert np.all(np.asarray(ranks) == 2)
    left, right = x.left[:, :2], x.right[:, :2]
    for w in matrices:
        assert_close(left @ (left.T @ w @ right) @ right.T, w, condition=10)


@pytest.mark.parametrize("make", [lrjax.dlrt, lrjax.cond_lr, lrjax.riemannian_sgd])
def test_without_a_node_it_is_the_inner_optimizer(make, getkey):
    params = {"w": jr.normal(getkey(), (3, 2)), "n": None}
    tx = make(0.1)
    plain = {
        lrjax.dlrt: optax.adam(0.1),
        lrjax.cond_lr: optax.sgd(0.1, 0.3),
        lrjax.riemannian_sgd: optax.sgd(0.1, 0.9),
    }[make]
    state, other = tx.init(params), plain.init(params)
    for _ in range(2):
        step, state = tx.update(params, state)
        want, other = plain.update(params, other)
        assert_close(step, want)


@pytest.mark.slow
def test_refusals(getkey):
    x = start_at(getkey(), [2.0, 1.0], 4, dtype=jnp.float32)
    pair = lrjax.LowRank(jnp.ones((3, 2)), jnp.ones((4, 2)))
    for tx in (lrjax.dynamical_low_rank(optax.sgd(0.1)), lrjax.riemannian_sgd(0.1)):
        with pytest.raises(ValueError, match=r"found lrjax\.LowRank nodes alone"):
            tx.init({"w": pair})
    wide = lrjax.SVDForm(jnp.ones((3, 4)), jnp.eye(4), jnp.ones((5, 4)))
    with pytest.raises(ValueError, match=r"no wider than the matrix.*\(3, 5\)"):
        lrjax.dynamical_low_rank(optax.sgd(0.1)).init(wide)
    tx = lrjax.dynamical_low_rank(optax.sgd(0.1), method="kls")
    with pytest.raises(ValueError, match="value_and_grad_fn=f"):
        tx.update(x, tx.init(x), x)
    with pytest.raises(ValueError, match="call tx"):
        lrjax.dynamical_low_rank(optax.sgd(0.1)).update(x, tx.init(x))
    with pytest.raises(ValueError, match=r"tol.*-1"):
        lrjax.dynamical_low_rank(optax.sgd(0.1), -1.0)

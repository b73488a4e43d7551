"""The transforms of plain leaves: each against its definition or a twin in optax."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax import subspaces as sub

from ..helpers import assert_close, with_spectrum
from ..subspaces.conftest import noisy as noisy, rollout as rollout
from ..subspaces.test_loop import FACTORIZATIONS, _primitives


anything = lambda path, shape: len(shape) >= 2


def test_amplify_slow_follows_the_average(rollout, noisy, getkey):
    g = noisy(getkey(), 6, 3, 4)
    got, _ = rollout(lrjax.amplify_slow(2.0, 0.8), g)
    assert_close(got[0], 3 * g[0])
    slow = g[0]
    for t in range(1, 6):
        slow = 0.8 * slow + 0.2 * g[t]
        assert_close(got[t], g[t] + 2 * slow)


def test_amplify_slow_waits_until_its_window_is_full(rollout, noisy, getkey):
    g = noisy(getkey(), 6, 3, 4)
    got, _ = rollout(lrjax.amplify_slow(2.0, window=3), g)
    assert_close(got[:2], g[:2])
    for t in range(2, 6):
        assert_close(got[t], g[t] + 2 * g[t - 2 : t + 1].mean(0))


@pytest.mark.slow
def test_amplify_slow_in_a_full_subspace_is_itself(rollout, noisy, getkey, x64):
    g = noisy(getkey(), 5, 4, 6, dtype=jnp.float64)
    tx = lrjax.project_updates(
        lrjax.amplify_slow(),
        sub.RandomOrthonormal(4),
        schedule=sub.Periodic(2),
        carry=sub.Rotate(),
        lift=sub.Residual(),
        where=anything,
    )
    assert_close(rollout(tx, g)[0], rollout(lrjax.amplify_slow(), g)[0])


def test_lion_k_of_the_l1_norm_is_lion(rollout, noisy, getkey):
    g = noisy(getkey(), 4, 3, 5)
    want = rollout(optax.scale_by_lion(0.9, 0.99), g)[0]
    assert_close(rollout(lrjax.scale_by_lion_k(), g)[0], want)


@pytest.mark.parametrize(
    ("norm", "dual"),
    [
        ("l1", lambda w: jnp.max(jnp.abs(w))),
        ("l2", jnp.linalg.norm),
        ("nuclear", lambda w: jnp.linalg.norm(w, 2)),
    ],
)
def test_lion_k_pulls_the_weights_into_the_dual_ball(norm, dual, noisy, getkey):
    rate, decay = 0.2, 0.5
    g = noisy(getkey(), 30, 3, 5)
    tx = optax.chain(
        lrjax.scale_by_lion_k(norm),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(rate),
    )

    def step(carry, g):
        w, state = carry
        updates, state = tx.update(g, state, w)
        return (w + updates, state), dual(w)

    w = 20 * jr.normal(getkey(), (3, 5))
    _, sizes = jax.lax.scan(step, (w, tx.init(w)), g)
    excess = jnp.maximum(sizes - 1 / decay, 0)
    assert excess[0] > 1
    assert jnp.all(excess[1:] <= (1 - rate * decay) * excess[:-1] + 1e-4)


@pytest.mark.slow
def test_norms_grow_by_no_more_than_the_limit(rollout, noisy, getkey):
    g = noisy(getkey(), 8, 2, 12).reshape(8, 2, 3, 4)  # two layers, each with its limit
    g = g * jnp.exp(jr.normal(getkey(), (8, 2)))[..., None, None]
    got, _ = rollout(lrjax.limit_norm_growth(1.2), g)
    norms = jnp.linalg.norm(got, axis=(-2, -1))
    assert_close(got[0], g[0])
    assert jnp.all(norms[1:] <= 1.2 * norms[:-1] * (1 + 1e-5))
    # Where the limit does not bind nothing happens, and elsewhere only the length does.
    wanted = jnp.linalg.norm(g, axis=(-2, -1))
    factor = jnp.minimum(1, 1.2 * norms[:-1] / wanted[1:])
    assert_close(got[1:], g[1:] * factor[..., None, None], condition=10)
    assert jnp.any(factor < 1)
    assert jnp.any(factor == 1)


@pytest.mark.slow
def test_layer_trust_is_optax_with_a_schedule(rollout, noisy, getkey):
    g, w = noisy(getkey(), 3, 4, 5), jr.normal(getkey(), (4, 5))
    got, _ = rollout(lrjax.scale_by_layer_trust(lambda t: 0.1 / (1 + t)), g, w)
    twin = optax.scale_by_trust_ratio(trust_coefficient=1.0)
    want = rollout(twin, g, w)[0] * (0.1 / jnp.arange(1.0, 4))[:, None, None]
    assert_close(got, want)
    tx = lrjax.scale_by_layer_trust(1.0, max_norm=10.0)
    step = lambda g, w: tx.update(g, tx.init(w), w)[0]
    far, unit = jnp.full((2, 2), 50.0), jnp.full((2, 2), 0.5)
    assert_close(step(unit, far), 10 * unit)
    assert_close(step(unit, 0 * far), unit)
    with pytest.raises(ValueError, match="params"):
        tx.update(unit, tx.init(unit))


def test_subset_norms_add_up_like_adagrad(rollout, noisy, getkey):
    g = noisy(getkey(), 4, 3, 5)
    got, state = rollout(lrjax.scale_by_subset_norm(b2=1.0, eps=0.0), g)
    sums = jnp.cumsum(jnp.sum(g**2, axis=1, keepdims=True), axis=0)
    assert_close(got, g / jnp.sqrt(sums))
    assert state.squares.shape == (1, 5)


def test_subset_norms_of_a_square_matrix_are_those_of_its_columns(getkey):
    g = jr.normal(getkey(), (2, 4, 4))
    tx = lrjax.scale_by_subset_norm(b2=0.5, eps=0.0)
    got, state = tx.update(g, tx.init(g))
    assert_close(got, g / jnp.linalg.norm(g, axis=1, keepdims=True))
    assert state.squares.shape == (2, 1, 4)


@pytest.mark.slow
def test_orthogonal_updates_have_singular_values_one(getkey):
    g = {"w": jr.normal(getkey(), (2, 8, 12)), "head": jr.normal(getkey(), (8, 9))}
    tx = lrjax.orthogonalize_updates()
    got, _ = tx.update(g, tx.init(g))
    assert_close(got["w"], lrjax.linalg.polar(g["w"]), condition=100)
    assert_close(got["head"], g["head"], rtol=0)
    spec = sub.MatrixSpec(rows=(2,), cols=(0, 1))
    tx = lrjax.orthogonalize_updates("svd", where=lambda path, shape: spec)
    kernel = tx.update(g["w"], tx.init(g["w"]))[0].reshape(16, 12)
    assert_close(kernel, lrjax.linalg.polar(g["w"].reshape(16, 12)), condition=10)
    with pytest.raises(ValueError, match=r"orthogonalize_updates chose none of head"):
        lrjax.orthogonalize_updates(where=sub.is_hidden_matrix).init({"head": g["head"]})


def test_orthogonal_updates_after_momentum_are_muon(rollout, noisy, getkey):
    g = noisy(getkey(), 3, 8, 12)
    ours = optax.chain(optax.ema(0.9), lrjax.orthogonalize_updates("muon"))
    theirs = optax.contrib.scale_by_muon(beta=0.9, nesterov=False)
    assert_close(rollout(ours, g)[0], rollout(theirs, g)[0], condition=1e3)


@pytest.mark.slow
def test_what_is_projected_out_does_nothing_to_its_inputs(getkey):
    m = jnp.linalg.qr(jr.normal(getkey(), (6, 2)))[0]
    g = {"w": jr.normal(getkey(), (3, 4, 6)), "b": jr.normal(getkey(), (4,))}
    bases = lambda m: {"w": jnp.broadcast_to(m, (3, 6, 2)), "b": None}
    tx = optax.chain(optax.scale_by_adam(), lrjax.project_out(bases(m)))
    state = tx.init(g)
    update = jax.jit(tx.update)
    got, _ = update(g, state)
    x = m @ jr.normal(getkey(), (2,))
    adam = optax.scale_by_adam().update(g, optax.scale_by_adam().init(g))[0]
    assert jnp.max(jnp.abs(got["w"] @ x)) < 1e-6 * jnp.max(jnp.abs(adam["w"] @ x))
    assert_close(got["b"], adam["b"])
    outside = jnp.eye(6) - m @ m.T
    assert_close(got["w"], adam["w"] @ outside, condition=10)
    again = lrjax.project_out(bases(m))
    assert_close(again.update(got, again.init(g))[0], got, condition=10)
    mirrored = lrjax.project_out({"w": bases(m)["w"]}, side="left")
    flipped = {"w": adam["w"].mT}
    want = mirrored.update(flipped, mirrored.init(flipped))[0]["w"].mT
    assert_close(got["w"], want, condition=10)
    # Zero columns are room for later tasks; new bases compile nothing.
    traces = update._cache_size()
    free, _ = update(g, optax.tree.set(state, basis=bases(0 * m)))
    assert_close(free, adam)
    assert update._cache_size() == traces


def test_kernels_are_projected_by_their_patches(getkey):
    kernel = jr.normal(getkey(), (2, 4, 3, 2, 2))  # a stack, outputs, inputs, taps
    m = jnp.linalg.qr(jr.normal(getkey(), (2, 12, 5)))[0]
    tx = lrjax.project_out(m)
    got, _ = tx.update(kernel, tx.init(kernel))
    flat = kernel.reshape(2, 4, 12)
    want = flat - flat @ m @ m.mT
    assert_close(got, want.reshape(kernel.shape), condition=10)
    # As other libraries store them: taps, inputs, outputs.
    first = lambda x: x.transpose(0, 3, 4, 2, 1)
    order = m.reshape(2, 3, 2, 2, 5).transpose(0, 2, 3, 1, 4).reshape(2, 12, 5)
    left = lrjax.project_out(order, side="left")
    other, _ = left.update(first(kernel), left.init(first(kernel)))
    assert_close(other, first(got), condition=10)


@pytest.mark.slow
def test_grown_bases_hold_the_least_that_is_asked_for(getkey, x64):
    first = with_spectrum(getkey(), 20, 8, jnp.array([4.0, 2.0, 1.0, 0.1]), jnp.float64)
    grow = jax.jit(sub.grow_basis)
    m = grow(jnp.zeros((8, 4)), first, 20.5 / 21.02)
    assert int(jnp.sum(jnp.any(m != 0, axis=0))) == 3  # two hold 20 of 21.01
    v = jnp.linalg.svd(first, full_matrices=False)[2][:3].T
    assert_close(m[:, :3] @ m[:, :3].T, v @ v.T, condition=10)
    # What is there already counts, and is not touched; no room is no error.
    assert_close(grow(m, first, 0.9), m, rtol=0)
    assert_close(grow(m, first @ m @ m.T, 1.0), m, rtol=0)  # but for rounding
    second = with_spectrum(getkey(), 20, 8, jnp.array([3.0, 2.0]), jnp.float64)
    full = grow(m, jnp.concatenate([first, second]), 1.0)
    assert_close(full[:, :3], m[:, :3], rtol=0)
    assert_close(full.T @ full, jnp.eye(4))
    layer = lrjax.project_out(m)
    update, _ = layer.update(jnp.ones((5, 8)), layer.init(jnp.ones((5, 8))))
    assert jnp.max(jnp.abs(update @ m)) < 1e-14


@pytest.mark.parametrize(
    ("basis", "message"),
    [
        ({"v": jnp.eye(6)}, r"no leaf at the path.*leaves are w\."),
        ({"w": jnp.eye(5)}, r"shape \(5, 5\) for the leaf w of shape \(4, 6\)"),
    ],
)
def test_bases_that_fit_nothing_are_named(basis, message):
    with pytest.raises(ValueError, match=message):
        lrjax.project_out(basis).init({"w": jnp.ones((4, 6))})


def test_every_runs_a_transform_on_its_steps_alone(rollout, noisy, getkey):
    g = noisy(getkey(), 6, 3, 4)
    got, state = rollout(lrjax.every(3, optax.scale_by_adam()), g)
    adam, inner = rollout(optax.scale_by_adam(), g[2::3])
    silent = jnp.array([0, 1, 3, 4])
    assert_close(got[silent], g[silent])
    assert_close(got[2::3], adam)
    assert_close(state.inner, inner)


@pytest.mark.slow
def test_every_maps_the_parameters_themselves(getkey):
    """Truncation to low rank on every second step of plain descent, under vmap."""

    def truncate(params):
        u, s, vt = jnp.linalg.svd(params["w"], full_matrices=False)
        return {**params, "w": (u[..., :2] * s[..., None, :2]) @ vt[..., :2, :]}

    tx = optax.chain(optax.sgd(0.1), lrjax.every(2, truncate))
    params = {"w": jr.normal(getkey(), (5, 4, 6)), "b": jnp.ones((5, 3))}
    grads = jax.tree.map(lambda x: jr.normal(getkey(), x.shape), params)
    state = jax.vmap(tx.init)(params)
    update = jax.vmap(tx.update)
    found = [
        p
        for p in _primitives(jax.make_jaxpr(update)(grads, state, params).jaxpr)
        if p[0] in FACTORIZATIONS
    ]
    assert found
    assert all(inside for _, inside in found)
    step = jax.jit(lambda s, p: update(grads, s, p))
    ranks = []
    for _ in range(2):
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        updates, state = step(state, params)
        params = optax.apply_updates(params, updates)
        assert_close(params["b"], moved["b"])
        ranks.append(np.linalg.matrix_rank(params["w"], tol=1e-4).tolist())
    assert ranks == [[4] * 5, [2] * 5]
    assert_close(params, truncate(moved), condition=10)
    with pytest.raises(ValueError, match="at least one step"):
        lrjax.every(0, truncate)


def test_impossible_ways_to_orthogonalize_are_refused_at_once():
    with pytest.raises(ValueError, match="polar method 'svd' is not iterative"):
        lrjax.orthogonalize_updates("svd", steps=3)

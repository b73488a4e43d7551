"""Steps within norm balls: rates, gaps, ranks, and the optimizers that they are."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax

from ..helpers import assert_close, tol


M, N, STEPS = 8, 6, 60
RADIUS = 2.0
NORMS = {
    "spectral": lambda w: np.linalg.norm(w, 2, axis=(-2, -1)),
    "nuclear": lambda w: np.sum(np.linalg.svd(w, compute_uv=False), -1),
    "frobenius": lambda w: np.linalg.norm(w, axis=(-2, -1)),
}
ORDERS = {"spectral": np.inf, "frobenius": 2, "nuclear": 1}
anything = lambda path, shape: True


def open_loop(t):
    return 2 / (t + 2)


@functools.partial(jax.jit, static_argnames=("name", "rate", "steps"))
def descend(target, curvature, start, *, name, rate=open_loop, steps=STEPS):
    """Weights, losses and gaps on ``½ Σ curvature (w − target)²``, before each step."""
    loss = lambda w: jnp.sum(curvature * (w - target) ** 2) / 2
    direction = lrjax.frank_wolfe(name, RADIUS, where=anything)
    tx = optax.chain(direction, optax.scale_by_learning_rate(rate))

    def step(carry, _):
        w, state = carry
        value, grad = jax.value_and_grad(loss)(w)
        updates, state = tx.update(grad, state, w)
        gap = optax.tree.get(state, "gap")
        return (optax.apply_updates(w, updates), state), (w, value, gap)

    return jax.lax.scan(step, (start, tx.init(start)), length=steps)[1]


def projected(values, name):
    """The nearest singular values in the ball: those of the nearest matrix in it."""
    if name == "spectral":
        return np.minimum(values, RADIUS)
    if name == "frobenius":
        return values * min(1.0, RADIUS / np.linalg.norm(values))
    if values.sum() <= RADIUS:
        return values
    levels = (np.cumsum(values) - RADIUS) / np.arange(1, len(values) + 1)
    return np.maximum(values - levels[values > levels][-1], 0)


@pytest.fixture
def target(x64, getkey):
    return 1.5 * jr.normal(getkey(), (M, N), jnp.float64)


@pytest.mark.slow_but("spectral")
@pytest.mark.parametrize("name", NORMS)
def test_convex_losses_fall_as_one_over_the_steps(target, name):
    """``loss − min ≤ 2 L d²/(t + 2)``, and never more than the gap."""
    weights, losses, gaps = descend(target, 1.0, jnp.zeros_like(target), name=name)
    values = np.linalg.svd(target, compute_uv=False)
    least = np.sum((values - projected(values, name)) ** 2) / 2
    # The ball lies in the Frobenius ball of this radius.
    d = 2 * RADIUS * (np.sqrt(N) if name == "spectral" else 1)
    rounding = tol(np.asarray(losses)) * losses[0]
    t = np.arange(STEPS)
    assert np.all(losses[1:] - least <= 2 * d**2 / (t[1:] + 2) + rounding)
    assert np.all(losses - least >= -rounding)
    # Singular values of the gradient below a thousandth of its norm, √(2 loss), fall short.
    short = 1e-3 * N * RADIUS * np.sqrt(2 * losses)
    assert np.all(losses - least <= gaps + short)
    assert np.min(gaps) < 0.1 * gaps[0]
    assert np.all(NORMS[name](weights) <= RADIUS * (1 + tol(weights, condition=100)))


@pytest.mark.parametrize("name", NORMS)
def test_weights_outside_come_into_the_ball(target, getkey, name):
    """By a factor 1 − γ of what they are too long, at any constant γ."""
    far = 20 * jr.normal(getkey(), target.shape, jnp.float64)
    weights = descend(target, 1.0, far, name=name, rate=0.2)[0]
    sizes = NORMS[name](weights)
    excess = np.maximum(sizes[0] - RADIUS, 0) * 0.8 ** np.arange(STEPS)
    assert np.all(sizes <= (RADIUS + excess) * (1 + tol(weights, condition=100)))


def test_nuclear_steps_add_one_to_the_rank(target, getkey):
    curvature = jr.uniform(getkey(), target.shape, jnp.float64, 0.5, 2.0)
    start = jnp.zeros_like(target)
    weights = np.asarray(descend(target, curvature, start, name="nuclear", steps=5)[0])
    for t, w in enumerate(weights):
        assert np.linalg.matrix_rank(w, tol=1e-10 * RADIUS) <= t


def test_a_loss_of_full_curvature_is_certified_too(target, getkey):
    """The gap of a quadratic whose minimum in the ball has no closed form bounds it."""
    curvature = jr.uniform(getkey(), target.shape, jnp.float64, 0.1, 3.0)
    start = jnp.zeros_like(target)
    for name in NORMS:
        _, losses, gaps = descend(target, curvature, start, name=name)
        lower = np.max(losses - gaps)
        assert lower <= np.min(losses) * (1 + 1e-6)
        assert np.min(losses) - lower < 0.2 * (losses[0] - lower)


def test_the_oracles_maximize_the_inner_product(x64, getkey):
    """``⟨G, V⟩`` is the dual norm, and V has norm one; of random matrices of a stack."""
    g = jr.normal(getkey(), (4, M, N), jnp.float64)
    zeros = jnp.zeros_like(g)
    values = np.linalg.svd(g, compute_uv=False)
    dual = {"spectral": 1, "frobenius": 2, "nuclear": np.inf}
    for name in NORMS:
        tx = lrjax.frank_wolfe(name, where=anything)
        v, state = jax.jit(lambda g, tx=tx: tx.update(g, tx.init(g), zeros))(g)
        np.testing.assert_allclose(NORMS[name](v), 1, rtol=1e-6)
        want = np.linalg.norm(values, dual[name], axis=-1)
        # Power iterations may stop short of a leading value that is nearly double.
        rtol = 1e-3 if name == "nuclear" else 1e-6
        np.testing.assert_allclose(jnp.sum(g * v, (-2, -1)), want, rtol=rtol)
        np.testing.assert_allclose(state.gap, np.sum(want), rtol=rtol)


def test_the_spectral_ball_is_muon_with_decoupled_decay(target, getkey):
    """Number by number, with momentum and a schedule."""
    decay = 1 / RADIUS
    rate = lambda t: 0.3 / (t + 1)
    where = {"where": anything}
    ours = optax.chain(
        optax.trace(0.9),
        lrjax.frank_wolfe("spectral", RADIUS, **where),
        optax.scale_by_learning_rate(lambda t: decay * rate(t)),
    )
    theirs = optax.chain(
        optax.trace(0.9),
        lrjax.orthogonalize_updates(**where),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(rate),
    )
    assert_close(trained(ours, target), trained(theirs, target), condition=1e3)


def test_the_spectral_ball_is_the_muon_of_optax(getkey):
    """With its five steps of one polynomial; it does not scale square matrices."""
    target = jr.normal(getkey(), (N, N))
    muon = functools.partial(lrjax.linalg.polar, method="muon")
    ours = optax.chain(
        optax.ema(0.9),
        lrjax.frank_wolfe(muon, 1 / 0.25, where=anything),
        optax.scale_by_learning_rate(0.25 * 0.1),
    )
    theirs = optax.contrib.muon(0.1, beta=0.9, nesterov=False, weight_decay=0.25)
    assert_close(trained(ours, target), trained(theirs, target), rtol=1e-4)


def trained(tx, target):
    """Weights after ten steps."""

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(w - target, state, w)
        return (optax.apply_updates(w, updates), state), None

    w = jnp.full_like(target, 0.1)
    return jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), length=10)[0][0])(w)


def test_polyak_behind_it_needs_no_schedule(target):
    """The target lies in the ball, so that its loss, zero, is the minimum."""
    target = target * RADIUS / (2 * np.linalg.norm(target, 2))
    tx = optax.chain(
        lrjax.frank_wolfe("spectral", RADIUS, where=anything),
        lrjax.scale_by_polyak(cap=1.0),
        optax.scale_by_learning_rate(1.0),
    )

    def step(carry, _):
        w, state = carry
        value, grad = jax.value_and_grad(lambda w: jnp.sum((w - target) ** 2))(w)
        updates, state = tx.update(grad, state, w, value=value, grad=grad)
        return (optax.apply_updates(w, updates), state), value

    w = jnp.zeros_like(target)
    run = jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), length=200)[1])
    values = run(w)
    assert values[-1] < 1e-3 * values[0]


def test_other_leaves_pass_and_the_gap_is_of_those_chosen(getkey):
    params = {"weight": jr.normal(getkey(), (9, 8)), "bias": jnp.ones(9), "none": None}
    tx = lrjax.frank_wolfe("frobenius")
    updates, state = tx.update(params, tx.init(params), params)
    assert jnp.array_equal(updates["bias"], params["bias"])
    size = jnp.linalg.norm(params["weight"])
    assert_close(state.gap, size**2 + size, condition=10)


def test_what_it_does_not_know_is_refused(getkey):
    with pytest.raises(ValueError, match=r"radius >= 0, got -1"):
        lrjax.frank_wolfe("spectral", -1.0)
    tx = lrjax.frank_wolfe("spectral")
    x = jnp.ones((8, 8))
    with pytest.raises(ValueError, match="params"):
        tx.update(x, tx.init(x))


@pytest.mark.slow
def test_an_orthogonal_dictionary_is_learned_online(getkey):
    """Sparse codes are the spikiest: ``max E Σ|D y|³`` over the spectral ball finds them.

    The relaxation of orthogonal dictionary learning (Xue et al., 2021, arXiv 2103.01484):
    stochastic Frank-Wolfe with averaged gradients, a new batch in every step.
    """
    d, batch, steps = 8, 256, 300
    keys = jr.split(getkey(), 3)
    planted = jnp.linalg.qr(jr.normal(keys[0], (d, d)))[0]
    tx = optax.chain(
        optax.ema(0.8),
        lrjax.frank_wolfe("spectral", where=anything),
        optax.scale_by_learning_rate(lambda t: 2 / (t / 8 + 4)),
    )

    @jax.jit
    def learn(start):
        def step(carry, key):
            w, state = carry
            k_values, k_support = jr.split(key)
            codes = jr.normal(k_values, (batch, d))
            codes = jnp.where(jr.bernoulli(k_support, 0.25, codes.shape), codes, 0)
            loss = lambda w: -jnp.mean(jnp.sum(jnp.abs(codes @ planted @ w.T) ** 3, axis=1))
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            w = optax.apply_updates(w, updates)
            return (w, state), jnp.linalg.norm(w, 2)

        return jax.lax.scan(step, (start, tx.init(start)), jr.split(keys[1], steps))

    start = jnp.linalg.qr(jr.normal(keys[2], (d, d)))[0]
    (found, _), norms = learn(start)
    assert norms.max() < 1.01  # up to what polynomials leave of a polar factor
    # Each row of the product is one of the atoms, up to its sign and the noise of batches.
    match = np.abs(np.asarray(found @ planted.T))
    assert match.max(axis=1).min() > 0.99
    assert len(set(match.argmax(axis=1))) == d
    assert np.sort(match, axis=1)[:, -2].max() < 0.05

"""Unrolled robust PCA whose thresholds and rates are trained."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from lrjax import recovery

from ..helpers import assert_close, relative_error


def draw(key, size, rank, fraction=0.1):
    """Factors with columns of length about one, outliers as large as the entries."""
    k_left, k_right, k_where, k_size = jr.split(key, 4)
    left, right = (jr.normal(k, (size, rank)) for k in (k_left, k_right))
    truth = left @ right.T / size
    limit = jnp.mean(jnp.abs(truth))
    outliers = jr.uniform(k_size, truth.shape, minval=-limit, maxval=limit)
    hit = jr.bernoulli(k_where, fraction, truth.shape)
    return truth, truth + jnp.where(hit, outliers, 0)


def errors(layers, truth, y, rank):
    """Relative errors before every layer and after the last."""
    distance = lambda x: jnp.linalg.norm(x.materialize() - truth) / jnp.linalg.norm(truth)
    observe = lambda state: distance(state.params)
    fit = recovery.learned_robust_pca(y, layers, rank, observe=observe)
    return jnp.append(fit.observed, distance(fit.low_rank))


SIZE, DEPTH = 80, 10


def untrained():
    return recovery.geometric_layers(DEPTH, first=0.5 / SIZE, decay=0.6)


def train(logs, key, *, steps=80, batch=1, rate=0.05):
    """Fresh problems in every step; every layer counts, the last one more."""
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def loss(logs, truth, y):
        layers = jax.tree.map(jnp.exp, logs)
        e = jnp.log(jax.vmap(lambda t, y: errors(layers, t, y, 1))(truth, y))
        return jnp.mean(e) + 0.25 * jnp.mean(e[:, -1])

    def step(carry, key):
        logs, state = carry
        data = jax.vmap(lambda k: draw(k, SIZE, 1))(jr.split(key, batch))
        updates, state = tx.update(jax.grad(loss)(logs, *data), state)
        return (optax.apply_updates(logs, updates), state), None

    carry, _ = jax.lax.scan(step, (logs, tx.init(logs)), jr.split(key, steps))
    return carry[0]


@pytest.mark.slow
def test_training_through_the_scan_pays_and_transfers():
    """A hundred times better where it was trained, and at three times size and rank 2."""
    before = untrained()
    logs = jax.jit(train)(jax.tree.map(jnp.log, before), jr.key(0))
    after = jax.tree.map(jnp.exp, logs)
    for size, rank in ((SIZE, 1), (3 * SIZE, 2)):
        run = lambda layers, size=size, rank=rank: errors(
            layers.transfer(size=(SIZE, size), rank=(1, rank)),
            *draw(jr.key(7), size, rank),
            rank,
        )
        both = jax.tree.map(lambda *x: jnp.stack(x), before, after)
        plain, trained = np.asarray(jax.jit(jax.vmap(run))(both))[:, -1]
        assert trained < 0.01 * plain


@pytest.mark.slow
def test_gradients_are_those_of_finite_differences(x64):
    truth, y = (x.astype(jnp.float64) for x in draw(jr.key(0), 16, 2))
    layers = recovery.geometric_layers(3, first=jnp.float64(0.05))
    loss = jax.jit(lambda layers: errors(layers, truth, y, 2)[-1])
    grads = jax.grad(loss)(layers)
    for leaf, (slope, at) in enumerate(
        zip(jax.tree.leaves(grads), jax.tree.leaves(layers), strict=True)
    ):
        for index in np.ndindex(at.shape):
            step = 1e-6 * float(at[index])

            def moved(sign, leaf=leaf, index=index, step=step):
                leaves, tree = jax.tree.flatten(layers)
                leaves[leaf] = leaves[leaf].at[index].add(sign * step)
                return float(loss(jax.tree.unflatten(tree, leaves)))

            want = (moved(1) - moved(-1)) / (2 * step)
            assert abs(float(slope[index]) - want) <= 1e-5 * abs(want) + 1e-9
    assert all(float(jnp.abs(g).min()) > 0 for g in jax.tree.leaves(grads))


@pytest.mark.slow
def test_a_layer_is_its_formula(x64):
    y = np.asarray(draw(jr.key(0), 16, 2)[1], np.float64)
    layers = recovery.geometric_layers(2, first=jnp.float64(0.05), decay=0.5, rate=0.4)
    observe = lambda state: state.params.materialize()
    fit = recovery.learned_robust_pca(jnp.asarray(y), layers, 2, observe=observe)
    u, s, vt = np.linalg.svd(np.asarray(fit.observed[0]))
    left, right = u[:, :2] * s[:2], vt[:2].T
    for zeta in (0.05, 0.025):
        error = np.clip(y - left @ right.T, -zeta, zeta)
        left, right = (
            left + 0.4 * error @ right @ np.linalg.inv(right.T @ right),
            right + 0.4 * error.T @ left @ np.linalg.inv(left.T @ left),
        )
    assert_close(fit.low_rank.materialize(), left @ right.T, condition=1e3)
    rest = y - left @ right.T
    assert_close(fit.sparse, rest - np.clip(rest, -0.025, 0.025), condition=1e3)


@pytest.mark.slow
def test_missing_entries_and_a_sweep_over_layers():
    truth, y = draw(jr.key(0), SIZE, 1, 0.02)
    mask = jr.bernoulli(jr.key(1), 0.9, y.shape)
    sweep = jax.vmap(
        lambda r: recovery.geometric_layers(40, first=1 / SIZE, decay=0.8, rate=r)
    )
    fit = jax.jit(
        jax.vmap(lambda layers: recovery.learned_robust_pca(y, layers, 1, mask=mask))
    )
    result = fit(sweep(jnp.array([0.0, 0.5])))
    low_rank = jnp.einsum("kmr,knr->kmn", result.low_rank.left, result.low_rank.right)
    stuck, good = (relative_error(x, truth) for x in low_rank)
    assert good < 1e-3 < stuck
    assert float(jnp.abs(result.sparse * ~mask[None]).max()) == 0


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="depth"):
        recovery.geometric_layers(0, first=1.0)
    with pytest.raises(ValueError, match="rank must be between 1 and 5"):
        recovery.learned_robust_pca(jnp.ones((6, 5)), untrained(), 6)

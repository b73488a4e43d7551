"""Shrink, prune and freeze against the published methods, and the bound on sparsity."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from tests.helpers import assert_close, random_low_rank
from tests.reference import rank_adaptive as reference


STEPS, RATE = 24, 0.1


def test_shrink_is_the_proximal_map(getkey):
    x = 3 * jr.normal(getkey(), (200,))
    tx, code = lrjax.shrink(0.5), lrjax.shrink(0.5, twice=True)
    zeros = jnp.zeros_like(x)
    for shrink, want in ((tx, reference.soft_threshold), (code, reference.sora_code)):
        updates, _ = shrink.update(zeros, shrink.init(x), x)
        got = optax.apply_updates(x, updates)
        want = want(np.asarray(x, np.float64), 0.5)
        np.testing.assert_array_equal(got == 0, want == 0)
        assert_close(got, want.astype(np.float32), condition=10)
    # The code's variant is zero below two thresholds.
    np.testing.assert_array_equal(got == 0, np.abs(x) < 1)


def test_shrink_takes_a_schedule_and_finds_a_sparse_least_squares_solution(getkey):
    """Proximal gradient descent on ``½‖x − y‖² + λ‖x‖₁`` ends at the soft threshold."""
    y = 3 * jr.normal(getkey(), (50,))
    schedule = optax.piecewise_constant_schedule(0.0, {1: 1.0})
    tx = optax.chain(optax.sgd(0.5), lrjax.shrink(lambda t: schedule(t) + 0.5 * 0.7))

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(x - y, state, x)
        return (optax.apply_updates(x, updates), state), None

    (x, _), _ = jax.lax.scan(step, (jnp.zeros(50), tx.init(y)), length=60)
    want = reference.soft_threshold(np.asarray(y, np.float64), 0.7)
    assert_close(x, want.astype(np.float32), condition=10)


def noise(like, key):
    leaves, tree = jax.tree.flatten(like)
    keys = jr.split(key, len(leaves))
    draws = [jr.normal(k, (STEPS, *x.shape)) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, draws)


def run(make, observe, params, gradients):
    """Parameters, or what is observed, after each step."""
    tx = make()

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), observe(params, state)

    return jax.lax.scan(step, (params, tx.init(params)), gradients)[1]


def share_of(t, last=0.3):
    return last + (1 - last) * (1 - np.clip((t - 4) / 14, 0, 1)) ** 3


def sparse():
    schedule = lrjax.transforms.cubic_schedule(1.0, 0.3, begin=4, end=18)
    return lrjax.prune_entries(optax.sgd(RATE), schedule)


def test_pruned_entries_are_those_of_roselora(getkey):
    """Step by step; and the share of zeros in the product is bounded as published."""
    x = random_low_rank(getkey(), 9, 7, 3)
    gradients = noise(x, getkey())
    path = jax.jit(lambda x, g: run(sparse, lambda p, s: p, x, g))(x, gradients)
    for side in ("left", "right"):
        p = np.array(getattr(x, side), np.float64)
        slopes = np.asarray(getattr(gradients, side), np.float64)
        score = np.zeros_like(p)
        for t in range(STEPS):
            score = 0.8 * score + 0.2 * np.abs(p * slopes[t])
            keep = reference.roselora_keep(score, round(share_of(t), 9))
            p = np.where(keep, p - RATE * slopes[t], 0)
            got = np.asarray(getattr(path, side)[t])
            np.testing.assert_array_equal(got == 0, p == 0, err_msg=f"{side}, {t}")
            assert_close(got, p.astype(np.float32), condition=100)
    for left, right in zip(path.left, path.right, strict=True):
        zeros = [np.mean(np.asarray(f) == 0, axis=0) for f in (right, left)]
        a, b = zeros
        bound = 1 + np.sum(a + b - a * b) - 3
        product = np.asarray(left, np.float64) @ np.asarray(right, np.float64).T
        assert np.mean(product == 0) >= bound - 1e-12
    assert bound > 0, "nothing was claimed"


def freezing():
    schedule = lrjax.transforms.cubic_schedule(1.0, 0.0, begin=4, end=18)
    return lrjax.freeze_factors(optax.sgd(RATE), schedule, window=3)


@pytest.mark.slow
def test_frozen_factors_are_those_of_aflora(getkey):
    pairs = {
        "one": random_low_rank(getkey(), 6, 5, 2),
        "stack": random_low_rank(getkey(), 4, 3, 2, batch=(2,)),
        "vector": jnp.ones(3),
    }
    gradients = noise(pairs, getkey())
    # The loss hangs more on some factors than on others.
    sizes = [1.0, 0.4, 2.0, 0.7, 1.0]
    leaves, tree = jax.tree.flatten(gradients)
    scaled = [size * x for size, x in zip(sizes, leaves, strict=True)]
    gradients = jax.tree.unflatten(tree, scaled)
    observe = lambda p, state: (p, state.frozen)
    path, frozen = jax.jit(lambda x, g: run(freezing, observe, x, g))(pairs, gradients)

    def tensors(tree, t=None):
        cut = lambda x: np.array(x if t is None else x[t], np.float64)
        one = [cut(tree["one"].left), cut(tree["one"].right)]
        left, right = cut(tree["stack"].left), cut(tree["stack"].right)
        return [*one, *left, *right]

    theirs, pruner = tensors(pairs), reference.AFLoRA(6, window=3)
    for t in range(STEPS):
        slopes = tensors(gradients, t)
        for i, slope in enumerate(slopes):
            if not pruner.frozen[i]:
                theirs[i] = theirs[i] - RATE * slope
        pruner.step(t, theirs, slopes, share_of(t, last=0))
        flags = np.concatenate([np.ravel(f[t]) for f in jax.tree.leaves(frozen)])
        assert flags.tolist() == pruner.frozen, t
        for got, want in zip(tensors(path, t), theirs, strict=True):
            assert_close(got, want, rtol=1e-4)
    assert all(pruner.frozen)
    moved = path["vector"][1:] != path["vector"][:-1]
    assert np.all(moved), "what is no factor stands still"


@pytest.mark.slow
def test_aflora_leaves_the_vectors_of_tied_pairs_to_move(getkey):
    """``diag(b) B diag(d) A`` with a pair for each layer: at the end b and d learn."""
    model = eqx.nn.MLP(6, 4, 8, 1, key=getkey())
    kind = lambda path, site: lrjax.TiedLoRA(2, group=path)
    params, frozen = lrjax.partition(lrjax.adapt(model, kind, key=getkey()))
    x, y = jr.normal(getkey(), (16, 6)), jr.normal(getkey(), (16, 4))
    tx = lrjax.aflora(0.01, begin=4, end=12, window=2)

    def loss(params):
        bound = lrjax.bind(model, eqx.combine(params, frozen))
        return jnp.mean((jax.vmap(bound)(x) - y) ** 2)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), (value, updates)

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=20)[1])
    values, updates = run(params)
    moves = lambda tree, t: [bool(np.any(u[t] != 0)) for u in jax.tree.leaves(tree)]
    assert all(moves(updates.pools, 3))
    assert not any(moves(updates.pools, -1))
    assert all(moves(updates.layers, -1))
    assert values[-1] < values[13] < values[0]


def test_a_window_of_no_step_is_refused():
    with pytest.raises(ValueError, match="window of at least 1"):
        lrjax.freeze_factors(optax.sgd(0.1), 0.5, window=0)

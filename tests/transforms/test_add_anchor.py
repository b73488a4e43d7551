"""Pulls to an anchor, by importance, of factors and of products."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax

from ..helpers import assert_close, random_low_rank
from ..registry import pair_params


TASKS, SIZE = 3, 6


@pytest.fixture
def trees(x64, getkey):
    """Parameters, gradients, anchors and importances of one structure."""
    make = jax.jit(lambda key: pair_params(key, jnp.float64))
    x, g, x0, f = (make(getkey()) for _ in range(4))
    return x, g, x0, jax.tree.map(lambda a: a**2, f)


def updated(tx, g, x):
    return jax.jit(lambda g, x: tx.update(g, tx.init(x), x)[0])(g, x)


@pytest.mark.slow
def test_the_pull_is_the_gradient_of_the_penalty(trees):
    x, g, x0, f = trees

    def penalty(x):
        squares = jax.tree.map(lambda a, b, c: jnp.sum(c * (a - b) ** 2), x, x0, f)
        return 0.35 * sum(jax.tree.leaves(squares))

    want = jax.tree.map(jnp.add, g, jax.jit(jax.grad(penalty))(x))
    assert_close(updated(lrjax.add_anchor(0.7, x0, f), g, x), want)


@pytest.mark.slow
def test_the_pull_of_products_is_that_of_dense_matrices(trees, getkey):
    """With an anchor of another width; the dense matrices are formed here alone."""
    x, g, x0, _ = trees
    x0 = {**x0, "pair": random_low_rank(getkey(), 8, 5, 3, dtype=jnp.float64)}

    def penalty(x):
        away = lambda node: node.materialize()
        pairs = [jnp.sum((away(x[k]) - away(x0[k])) ** 2) for k in ("pair", "stack")]
        return 0.35 * (sum(pairs) + jnp.sum((x["bias"] - x0["bias"]) ** 2))

    want = jax.tree.map(jnp.add, g, jax.jit(jax.grad(penalty))(x))
    tx = lrjax.add_anchor(0.7, x0, of="product")
    assert_close(updated(tx, g, x), want, condition=100)


@pytest.mark.slow
def test_products_are_pulled_alike_however_they_are_split(x64, getkey):
    """The moved product to first order, for any change of gauge of the anchor as well."""
    x, x0 = (random_low_rank(getkey(), 7, 6, 2, dtype=jnp.float64) for _ in range(2))
    q = np.linalg.qr(jr.normal(getkey(), (2, 2), jnp.float64))[0]
    c = jr.normal(getkey(), (2, 2), jnp.float64) + 3 * jnp.eye(2)
    turned = lrjax.LowRank(x.left @ q, x.right @ q)
    split = lrjax.LowRank(x0.left @ c, x0.right @ jnp.linalg.inv(c).T)

    @functools.partial(jax.jit, static_argnames="of")
    def move(x, x0, of):
        zero = jax.tree.map(jnp.zeros_like, x)
        pull = updated(lrjax.add_anchor(0.7, x0, of=of), zero, x)
        return pull.left @ x.right.T + x.left @ pull.right.T

    assert_close(move(turned, split, "product"), move(x, x0, "product"), condition=1e3)
    apart = move(turned, split, "factors") - move(x, x0, "factors")
    assert jnp.linalg.norm(apart) > 1e-3


@pytest.mark.slow
def test_zeros_for_an_anchor_are_the_decays_that_are_there(trees):
    x, g, _, _ = trees
    zeros = jax.tree.map(jnp.zeros_like, x)
    want = updated(optax.add_decayed_weights(0.7), g, x)
    assert_close(updated(lrjax.add_anchor(0.7, zeros), g, x), want)
    pairs = lambda tree: {name: tree[name] for name in ("pair", "stack")}
    want = updated(lrjax.add_frobenius_decay(0.7), pairs(g), pairs(x))
    tx = lrjax.add_anchor(0.7, zeros, of="product")
    assert_close(pairs(updated(tx, g, x)), want, condition=100)


@pytest.mark.slow
def test_the_place_in_the_chain_couples_or_decouples(trees):
    """Behind Adam it is AdamW; before it, Adam of the loss with the penalty."""
    x, g, x0, f = trees
    rate = optax.scale_by_learning_rate(0.1)
    zeros = jax.tree.map(jnp.zeros_like, x)
    tx = optax.chain(optax.scale_by_adam(), lrjax.add_anchor(0.7, zeros), rate)
    assert_close(updated(tx, g, x), updated(optax.adamw(0.1, weight_decay=0.7), g, x))
    pull = lrjax.add_anchor(0.7, x0, f)
    coupled = updated(optax.chain(pull, optax.scale_by_adam(), rate), g, x)
    assert_close(coupled, updated(optax.adam(0.1), updated(pull, g, x), x))
    decoupled = updated(optax.chain(optax.scale_by_adam(), pull, rate), g, x)
    step = updated(optax.adam(0.1), g, x)
    add = lambda s, a, b, c: s - 0.1 * 0.7 * c * (a - b)
    assert_close(decoupled, jax.tree.map(add, step, x, x0, f), condition=10)


@pytest.fixture
def tasks(x64, getkey):
    """Quadratic losses with diagonal Hessians, and the minimum of all of them together."""
    h = jr.uniform(getkey(), (TASKS, SIZE), jnp.float64, 0.5, 2.0)
    best = jr.normal(getkey(), (TASKS, SIZE), jnp.float64)
    return h, best, jnp.sum(h * best, 0) / jnp.sum(h, 0)


def test_online_consolidation_of_diagonal_tasks_forgets_nothing(tasks):
    """With the true Hessians as importances each task ends at the joint minimum so far."""
    h, best, joint = tasks
    tx = lrjax.add_anchor(1.0, jnp.zeros(SIZE), jnp.zeros(SIZE))
    tx = optax.chain(tx, optax.scale_by_learning_rate(0.25))

    def train(x, state, h, best):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(h * (x - best), state, x)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(step, (x, state), length=300)[0]

    train = jax.jit(train)
    x = jnp.zeros(SIZE)
    state = tx.init(x)
    for task in range(TASKS):
        x, state = train(x, state, h[task], best[task])
        total = optax.tree.get(state, "importance") + h[task]
        state = optax.tree.set(state, anchor=x, importance=total)
    assert_close(x, joint, condition=100)
    alone, _ = train(jnp.zeros(SIZE), tx.init(x), h[-1], best[-1])
    assert jnp.linalg.norm(alone - joint) > 1e-3  # what there was to forget


@pytest.mark.slow
def test_by_default_the_start_is_the_anchor(trees):
    x, g, _, _ = trees
    tx = lrjax.add_anchor(0.7)
    state = tx.init(x)
    moved = jax.tree.map(lambda a: a + 1, x)
    want = jax.tree.map(lambda a: a + 0.7, g)
    assert_close(tx.update(g, state, moved)[0], want)


def test_masked_leaves_need_no_anchor(trees):
    x, g, x0, _ = trees
    some = {name: name == "pair" for name in x if name != "none"} | {"none": None}
    tx = optax.masked(lrjax.add_anchor(0.7, {"pair": x0["pair"]}), some)
    got = updated(tx, g, x)
    assert_close(got["stack"], g["stack"])
    want = jax.tree.map(lambda a, b, c: a + 0.7 * (b - c), g["pair"], x["pair"], x0["pair"])
    assert_close(got["pair"], want)


def test_half_of_a_frozen_pair_is_anchored(getkey):
    """What lrjax.partition leaves in the trained half, by its numbers."""
    half = lambda: jax.tree.map(lambda x: x, random_low_rank(getkey(), 6, 5, 2))
    x, g = half(), half()
    for node in (x, g):
        object.__setattr__(node, "right", None)
    got = updated(lrjax.add_anchor(0.5), g, x)
    assert got.right is None
    assert_close(got.left, g.left)


def test_a_frozen_factor_belongs_to_the_anchor_too(x64, getkey):
    """The pull of the trained one is that of the whole pair with one frozen factor."""
    x, g, x0 = (random_low_rank(getkey(), 6, 5, 2, dtype=jnp.float64) for _ in range(3))
    x0 = lrjax.LowRank(x0.left, x.right)
    split = lambda node: eqx.partition(node, jax.tree.map(lambda a: a is node.left, node))
    whole = updated(lrjax.add_anchor(0.7, x0, of="product"), g, x)
    (half, frozen), (slope, _), (start, _) = map(split, (x, g, x0))
    tx = lrjax.add_anchor(0.7, start, of="product")
    got, _ = tx.update(slope, tx.init(half), half, frozen=frozen)
    assert got.right is None
    assert_close(got.left, whole.left)
    with pytest.raises(ValueError, match=r"frozen=frozen"):
        tx.update(slope, tx.init(half), half)


def test_narrow_numbers_stay_narrow(getkey):
    x = random_low_rank(getkey(), 6, 5, 2, dtype=jnp.bfloat16)
    for of in ("factors", "product"):
        got = updated(lrjax.add_anchor(0.5, of=of), x, x)
        assert got.left.dtype == jnp.bfloat16
        assert jnp.array_equal(got.left, x.left)  # at the anchor there is no pull


def test_what_does_not_fit_is_refused(trees):
    x, _, x0, f = trees
    with pytest.raises(ValueError, match=r"weight >= 0, got -1"):
        lrjax.add_anchor(-1.0)
    with pytest.raises(ValueError, match="takes no importances"):
        lrjax.add_anchor(1.0, x0, f, of="product")
    with pytest.raises(ValueError, match=r"for bias of shape \(5,\) it has nothing"):
        lrjax.add_anchor(1.0, {**x0, "bias": None}).init(x)
    with pytest.raises(ValueError, match=r"importance .* it has an array of shape \(4,\)"):
        lrjax.add_anchor(1.0, x0, {**f, "bias": jnp.ones(4)}).init(x)
    with pytest.raises(ValueError, match=r"no lrjax\.LowRank node"):
        lrjax.add_anchor(1.0, of="product").init(jnp.ones(3))
    tx = lrjax.add_anchor(1.0)
    with pytest.raises(ValueError, match="params"):
        tx.update(x, tx.init(x))

"""Factors at a given ratio of their sizes: the penalty, the projection, the row norms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrjax
from tests.helpers import all_finite, assert_close, random_low_rank


@pytest.mark.slow_but("1.0", "0.3")
@pytest.mark.parametrize("ratio", [None, 1.0, 0.3])
def test_the_penalty_is_the_gradient_of_its_square(ratio, getkey, x64):
    """``‖A Aᵀ − ρ BᵀB‖²`` for ``B = left (m, r)``, ``A = rightᵀ``, and ``ρ = r/m``."""
    x = random_low_rank(getkey(), 6, 9, 2, batch=(3,), dtype=jnp.float64)
    u = random_low_rank(getkey(), 6, 9, 2, batch=(3,), dtype=jnp.float64)
    rho = 2 / 6 if ratio is None else ratio

    def penalty(x):
        b, a = x.left, x.right.mT
        return 1e-3 * jnp.sum((a @ a.mT - rho * b.mT @ b) ** 2)

    tx = lrjax.add_imbalance_penalty(1e-3, ratio=ratio)
    got, _ = tx.update(u, tx.init(x), x)
    assert_close(got, jax.tree.map(jnp.add, u, jax.grad(penalty)(x)), condition=100)


@pytest.mark.slow_but("3.0")
@pytest.mark.parametrize("ratio", [0.5, 3.0])
def test_no_factor_is_pulled_by_more_than_itself(ratio, getkey):
    """Factors a thousand times too large come down as by weight decay, in one direction."""
    x = random_low_rank(getkey(), 6, 9, 2)
    x = lrjax.LowRank(1e3 * x.left, x.right)
    still = jax.tree.map(jnp.zeros_like, x)
    for node in (x, x.T):
        tx = lrjax.add_imbalance_penalty(1.0, ratio=ratio)
        step, _ = tx.update(still if node is x else still.T, tx.init(node), node)
        for moved, factor in ((step.left, node.left), (step.right, node.right)):
            assert jnp.linalg.norm(moved) <= jnp.linalg.norm(factor) * (1 + 1e-5)
        off = node.right.T @ node.right - ratio * node.left.T @ node.left
        bare = max(1, ratio) * jnp.linalg.norm(off)
        assert_close(step.right, node.right @ off / bare, condition=100)


def test_at_a_ratio_of_one_the_product_does_not_move_to_first_order(getkey, x64):
    x = random_low_rank(getkey(), 6, 5, 2, dtype=jnp.float64)
    still = jax.tree.map(jnp.zeros_like, x)
    for ratio, moves in ((1.0, False), (0.5, True)):
        tx = lrjax.add_imbalance_penalty(1.0, ratio=ratio)
        d, _ = tx.update(still, tx.init(x), x)
        moved = jnp.linalg.norm(d.left @ x.right.T + x.left @ d.right.T)
        size = jnp.linalg.norm(d.left @ x.right.T)
        assert (moved > 1e-6 * size) == moves


@pytest.mark.slow_but("None")
@pytest.mark.parametrize("ratio", [None, 1.0])
def test_the_pull_ends_at_the_ratio(ratio, getkey):
    """Of a loss that is constant, with Adam's moments at rest."""
    x = random_low_rank(getkey(), 16, 9, 2)
    rho = 2 / 16 if ratio is None else ratio
    tx = lrjax.ilora(0.01, 0.1, ratio=ratio)
    zeros = jax.tree.map(jnp.zeros_like, x)

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(zeros, state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), lrjax.metrics.relative_imbalance(x, ratio=rho)

    _, path = jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), length=4000))(x)
    assert path[-1] < 0.1 * lrjax.metrics.relative_imbalance(x, ratio=rho)
    assert jnp.all(jnp.diff(path) < 1e-4)


@pytest.mark.slow
def test_relative_imbalance_knows_its_extremes(getkey):
    x = random_low_rank(getkey(), 6, 5, 2, batch=(2,))
    even, measure = lrjax.balance(x), lrjax.metrics.relative_imbalance
    assert jnp.all(measure(even) < 1e-5)
    scaled = lrjax.LowRank(2 * even.left, even.right)
    assert_close(measure(scaled), jnp.full(2, 3 / 5), condition=100)
    assert_close(measure(scaled, ratio=0.25), jnp.zeros(2) + measure(even), rtol=10.0)
    assert_close(measure(lrjax.LowRank(0 * x.left, x.right)), jnp.ones(2))
    assert not measure(jax.tree.map(jnp.zeros_like, x)).any()
    off = jnp.linalg.norm(lrjax.metrics.imbalance(x), axis=(-2, -1))
    sizes = sum(jnp.linalg.norm(f.mT @ f, axis=(-2, -1)) for f in (x.left, x.right))
    assert_close(measure(x), off / sizes, condition=10)


@pytest.mark.slow
def test_nearest_factors_are_balanced_and_no_other_balanced_ones_are_nearer(getkey, x64):
    x = random_low_rank(getkey(), 6, 5, 3, batch=(2,), dtype=jnp.float64)
    near = lrjax.refactor(x, "nearest")
    assert_close(near.materialize(), x.materialize(), condition=1e4)
    assert_close(near.left.mT @ near.left, near.right.mT @ near.right, condition=1e4)

    def distance(y):
        return jnp.sum((y.left - x.left) ** 2) + jnp.sum((y.right - x.right) ** 2)

    for _ in range(5):
        q = jnp.linalg.qr(jax.random.normal(getkey(), (2, 3, 3), jnp.float64))[0]
        for turn in (q, jnp.linalg.qr(jnp.eye(3)[None] + 0.1 * q)[0]):
            other = lrjax.LowRank(near.left @ turn, near.right @ turn)
            assert distance(other) > distance(near)
    even = lrjax.balance(x)
    q = jnp.linalg.qr(jax.random.normal(getkey(), (2, 3, 3), jnp.float64))[0]
    turned = lrjax.LowRank(even.left @ q, even.right @ q)
    assert_close(lrjax.refactor(turned, "nearest"), turned, condition=1e6)


def test_rows_of_the_stored_tensors_get_their_own_rates(getkey):
    """``B (m, r)`` and ``A (r, n)`` row by row; at a row of zero the largest factor."""
    x = random_low_rank(getkey(), 5, 4, 2)
    x = lrjax.LowRank(x.left.at[0].set(0.0), 1e4 * x.right)
    u = random_low_rank(getkey(), 5, 4, 2)
    tx = lrjax.scale_by_row_norms(3.0)
    got, _ = tx.update(u, tx.init(x), x)
    b, a = np.asarray(x.left), np.asarray(x.right).T
    rates = lambda rows: 1 / np.sqrt(np.linalg.norm(rows, axis=1) + 1 / 9)[:, None]
    assert_close(got.left, u.left * rates(b), condition=10)
    assert_close(got.right.T, np.asarray(u.right).T * rates(a), condition=10)
    assert_close(got.left[0], 3 * u.left[0])
    none, _ = lrjax.scale_by_row_norms(0.0).update(u, tx.init(x), x)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(none))


RECIPES = {
    "ilora": lambda: lrjax.ilora(0.1),
    "ilora(preconditioned)": lambda: lrjax.ilora(0.1, damping=0.0),
    "balora": lambda: lrjax.balora(0.1),
    "allora": lambda: lrjax.allora(0.1),
    "aflora": lambda: lrjax.aflora(0.1, begin=0, end=2, window=1),
    "muon": lambda: lrjax.muon(0.1),
}


@pytest.mark.slow_but("ilora-float32", "allora-float32")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("make", RECIPES.values(), ids=RECIPES)
def test_a_left_factor_of_zero_moves_and_gives_finite_numbers(make, dtype, getkey):
    x = random_low_rank(getkey(), 12, 9, 2, dtype=dtype)
    x = lrjax.LowRank(0 * x.left, x.right / 3)  # as LoRA starts: rows of about one
    target = random_low_rank(getkey(), 12, 9, 2, dtype=dtype).materialize()
    tx = make()

    def step(carry, _):
        x, state = carry
        loss = lambda x: jnp.sum((x.materialize() - target).astype(jnp.float32) ** 2)
        updates, state = tx.update(jax.grad(loss)(x), state, x)
        return (optax.apply_updates(x, updates), state), updates

    end, path = jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), length=4))(x)
    assert all_finite((end, path))
    assert jnp.any(path.left[0] != 0)


@pytest.mark.parametrize("strength", [-1.0, jnp.array([0.1, -0.1])])
def test_negative_numbers_are_refused(strength):
    with pytest.raises(ValueError, match="add_imbalance_penalty needs strength >= 0"):
        lrjax.add_imbalance_penalty(strength)
    with pytest.raises(ValueError, match="add_imbalance_penalty needs ratio >= 0"):
        lrjax.add_imbalance_penalty(0.1, ratio=strength)
    with pytest.raises(ValueError, match="scale_by_row_norms needs most >= 0"):
        lrjax.scale_by_row_norms(strength)
    with pytest.raises(ValueError, match="perturb_along_momentum needs radius >= 0"):
        lrjax.perturb_along_momentum(optax.adam(0.1), strength)

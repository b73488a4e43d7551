"""Gauss-Newton directions, steps that search their level, damping, and other factors."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax

from ..helpers import assert_close, random_low_rank


M, N, R = 7, 6, 3


@pytest.fixture
def pair(x64):
    """A pair of factors, and the gradients of a loss of their product."""
    x = random_low_rank(jr.key(0), M, N, R, dtype=jnp.float64)
    slope = jr.normal(jr.key(1), (M, N), jnp.float64)
    return x, lrjax.LowRank(slope @ x.right, slope.T @ x.left)


def dense_gauss_newton(x, g, damping):
    """Solve with the (m + n) r square matrix JᵀJ + λI, column by column."""
    left, right = np.asarray(x.left), np.asarray(x.right)

    def product(v):
        dl, dr = v[: M * R].reshape(M, R), v[M * R :].reshape(N, R)
        move = dl @ right.T + left @ dr.T
        return np.concatenate([(move @ right).ravel(), (move.T @ left).ravel()])

    size = (M + N) * R
    matrix = np.stack([product(e) for e in np.eye(size)], axis=1) + damping * np.eye(size)
    flat = np.concatenate([np.ravel(g.left), np.ravel(g.right)])
    solved = np.linalg.solve(matrix, flat)
    return lrjax.LowRank(
        jnp.array(solved[: M * R].reshape(M, R)), jnp.array(solved[M * R :].reshape(N, R))
    )


@pytest.mark.slow
@pytest.mark.parametrize("damping", [1e-2, 3.0])
def test_the_closed_form_solves_the_whole_system(pair, damping):
    x, g = pair
    tx = lrjax.scale_by_gauss_newton(damping, relative=False)
    step, _ = tx.update(g, tx.init(x), x)
    assert_close(step, dense_gauss_newton(x, g, damping), condition=1e6)


def test_relative_damping_is_in_units_of_the_mean_diagonal(pair):
    """Of the diagonals of both Gram matrices together."""
    x, g = pair
    x = lrjax.LowRank(5 * x.left, x.right)
    mean = (jnp.sum(x.left**2) + jnp.sum(x.right**2)) / (2 * R)
    step = lambda tx: tx.update(g, tx.init(x), x)[0]
    relative = step(lrjax.scale_by_gauss_newton(0.3))
    absolute = step(lrjax.scale_by_gauss_newton(0.3 * mean, relative=False))
    assert_close(relative, absolute, condition=100)


def test_without_damping_the_product_moves_along_the_tangent(pair):
    x, g = pair
    moves = []
    for tx in (lrjax.scale_by_gauss_newton(), lrjax.scale_by_tangent()):
        step, _ = tx.update(g, tx.init(x), x)
        moves.append(step.left @ x.right.T + x.left @ step.right.T)
    assert_close(*moves, condition=1e6)


def test_normalized_directions_have_length_one_in_their_metric(pair):
    x, g = pair
    tx = lrjax.scale_by_gauss_newton(0.1, normalize=True)
    step, _ = tx.update(g, tx.init(x), x)
    scaled, _ = tx.update(jax.tree.map(lambda a: 1e3 * a, g), tx.init(x), x)
    assert_close(step, scaled, condition=100)
    plain = lrjax.scale_by_gauss_newton(0.1)
    long, _ = plain.update(g, plain.init(x), x)
    dual = jnp.sum(g.left * long.left) + jnp.sum(g.right * long.right)
    assert_close(step, jax.tree.map(lambda a: a / jnp.sqrt(dual), long), condition=100)


POLICIES = {
    "constant": ({"damping": 0.3}, lambda value, t: 0.3),
    "root": ({"damping": 0.3, "loss_power": 0.5}, lambda value, t: 0.3 * value**0.5),
    "gap": (
        {"damping": 0.3, "loss_power": 1.0, "f_min": 0.5},
        lambda value, t: 0.3 * (value - 0.5),
    ),
    "geometric": (
        {"damping": optax.exponential_decay(0.3, 1, 0.5)},
        lambda value, t: 0.3 * 0.5**t,
    ),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("scale_by", [lrjax.scale_by_gram, lrjax.scale_by_gauss_newton])
def test_every_damping_policy_is_one_setting(pair, name, scale_by):
    x, g = pair
    arguments, policy = POLICIES[name]
    tx = scale_by(relative=False, **arguments)
    state = tx.init(x)
    for t, value in enumerate((4.0, 0.9)):
        step, state = tx.update(g, state, x, value=jnp.array(value))
        fixed = scale_by(policy(value, t), relative=False)
        assert_close(step, fixed.update(g, fixed.init(x), x)[0], rtol=1e-6)


def test_aiming_at_the_true_minimum_is_polyak(pair):
    x, g = pair
    value, f_min = jnp.array(5.0), 2.0
    level = lrjax.scale_by_target_level(fraction=(5.0 - f_min) / 5.0)
    polyak = lrjax.scale_by_polyak(f_min)
    got, _ = level.update(g, level.init(x), x, value=value, grad=g)
    want, _ = polyak.update(g, polyak.init(x), x, value=value, grad=g)
    assert_close(got, want)


def follow(values, **arguments):
    """The gaps and bases of the search along given losses."""
    tx = lrjax.scale_by_target_level(**arguments)
    x = jnp.ones(())
    state, seen = tx.init(x), []
    for value in values:
        _, state = tx.update(x, state, x, value=jnp.array(value), grad=x)
        seen.append((float(state.base), float(state.gap)))
    return seen


def test_levels_that_are_reached_move_on_and_missed_ones_come_nearer():
    # Level 10 − 4: 8 is below 10 − 0.3 · 4, so the next is 8 − 4.
    assert follow([10.0, 9.0, 8.0], fraction=0.4, grow=1.0) == [(10, 4), (10, 4), (8, 4)]
    # Three gaps of path without such a descent: halve the gap, from the best loss.
    losses = [10.0, 9.5, 10.0, 10.0, 10.0]
    assert follow(losses, fraction=0.4)[3:] == [(10, 4), (9.5, 2)]


def test_a_level_given_up_too_soon_makes_more_patient_and_more_ambitious():
    """Half of a gap of 4 below 10 was given up: 7.9 shows that it was there."""
    tx = lrjax.scale_by_target_level(0.4, patience=3.0)
    x = jnp.ones(())
    state, seen = tx.init(x), []
    for value in (10.0, 9.5, 10.0, 10.0, 10.0, 7.9):
        _, state = tx.update(x, state, x, value=jnp.array(value), grad=x)
        seen.append((float(state.patience), float(state.gap)))
    assert seen[4] == (3.0, 2.0)
    assert seen[5] == (9.0, 2.0 * 1.5 * 4)


@pytest.mark.slow
def test_the_search_ends_where_the_loss_is_rounding():
    """Gaps that no float can show shrink to nothing, and the steps with them."""
    gaps = [gap for _, gap in follow([1000.0] * 400)]
    assert gaps[-1] < 1e-20


def test_the_search_does_not_depend_on_the_unit_of_the_loss():
    values = [10.0, 9.0, 11.0, 8.0, 8.5, 9.0, 9.0, 7.9]
    plain, scaled = follow(values), follow([1e3 * v for v in values])
    np.testing.assert_allclose(1e3 * np.array(plain), scaled, rtol=1e-5)


@pytest.mark.slow_but("left", "right")
@pytest.mark.parametrize("mode", ["balanced", "left", "right"])
def test_refactor_keeps_the_product_and_shapes_the_factors(x64, mode):
    x = random_low_rank(jr.key(0), 8, 9, 3, batch=(2,), dtype=jnp.float64)
    x = lrjax.LowRank(x.left.at[..., 2].set(x.left[..., 1]), x.right)  # rank deficient
    y = lrjax.refactor(x, mode, scale=0.7)
    assert_close(y.materialize(), x.materialize(), condition=100)
    eye = jnp.broadcast_to(jnp.eye(3), (2, 3, 3))
    if mode == "balanced":
        assert_close(
            y.left.mT @ y.left / 0.7**2, y.right.mT @ y.right * 0.7**2, condition=1e4
        )
    else:
        side = getattr(y, mode)
        assert_close(side.mT @ side, 0.49 * eye, condition=100)
    with pytest.raises(ValueError, match="no more columns"):
        lrjax.refactor(random_low_rank(jr.key(0), 2, 9, 3), "left")


@pytest.mark.slow
def test_rebalancing_once_happens_once_and_in_every_member_by_itself(x64):
    x = random_low_rank(jr.key(0), 8, 5, 2, dtype=jnp.float64)
    still = jax.tree.map(jnp.zeros_like, x)
    tx = lrjax.rebalance("left", scale=2.0, once_below=1.0)

    def run(values):
        def step(carry, value):
            x, state = carry
            updates, state = tx.update(still, state, x, value=value)
            x = optax.apply_updates(x, updates)
            return (lrjax.LowRank(3 * x.left, x.right / 3), state), state.done

        return jax.lax.scan(step, (x, tx.init(x)), values)

    values = jnp.array([[5.0, 0.5, 0.1], [5.0, 4.0, 3.0]])
    (end, _), done = jax.jit(jax.vmap(run))(values)
    assert done.tolist() == [[False, True, True], [False, False, False]]
    grams = end.left.mT @ end.left
    assert_close(grams[0], (2.0 * 3**2) ** 2 * jnp.eye(2), condition=100)
    assert_close(end.left[1], 27 * x.left, condition=100)
    assert_close(end.materialize()[0], x.materialize(), condition=100)


def test_damping_by_the_gap_needs_the_minimum():
    with pytest.raises(ValueError, match="loss_power"):
        lrjax.levenberg_marquardt(loss_power=1.0)


def test_levenberg_marquardt_takes_steps_of_the_scheduled_length(pair):
    """Without f_min: the schedule times the direction of length one in its metric."""
    x, g = pair
    schedule = optax.exponential_decay(0.5, 1, 0.8)
    tx = lrjax.levenberg_marquardt(schedule, damping=0.3, relative=False)
    state = tx.init(x)
    direction = dense_gauss_newton(x, g, 0.3)
    dual = jnp.sum(g.left * direction.left) + jnp.sum(g.right * direction.right)
    for t in range(3):
        step, state = tx.update(g, state, x)
        unit = jax.tree.map(lambda a: a / jnp.sqrt(dual), direction)
        want = optax.tree.scale(-0.5 * 0.8**t, unit)
        assert_close(step, want, rtol=1e-6)


@pytest.mark.parametrize("recipe", [lrjax.opsa, lrjax.levenberg_marquardt])
def test_a_searched_level_is_the_minimum_that_the_damping_is_told(pair, recipe):
    """The first level is a tenth of the loss below it."""
    x, g = pair
    value = jnp.array(5.0)
    options = {"damping": 0.3, "loss_power": 1.0, "relative": False}
    searched, known = recipe(f_min="search", **options), recipe(f_min=4.5, **options)
    got, _ = searched.update(g, searched.init(x), x, value=value, grad=g)
    want, _ = known.update(g, known.init(x), x, value=value, grad=g)
    assert_close(got, want)

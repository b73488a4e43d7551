import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax import recovery

from ..helpers import all_finite, assert_close


@functools.partial(jax.jit, static_argnames=("rank", "steps", "tol"))
def polyak(problem, key, rank, steps, tol=None):
    start = lrjax.spectral_init(problem, rank, key=key)
    tx = lrjax.scaled_subgradient(f_min=problem.loss(problem.truth))
    return lrjax.solve(problem, tx, start, steps=steps, tol=tol)


@functools.partial(jax.jit, static_argnames=("rank", "n", "factor", "dtype"))
def sensing(key, *, condition=1.0, rank=2, n=20, factor=12, dtype=jnp.float32):
    return lrjax.matrix_sensing(
        key,
        (n, n),
        rank,
        factor * n * rank,
        outlier_fraction=0.1,
        condition=condition,
        dtype=dtype,
    )


@pytest.mark.slow
def test_rate_is_free_of_the_condition_number(x64):
    """Within ±15 % of 95-125 steps to 1e-8: seeds and both conditions (tests: one size)."""
    for seed in range(5):
        steps = []
        for condition in (1.0, 20.0):
            problem = lrjax.matrix_sensing(
                jr.key(seed),
                (40, 40),
                4,
                8 * 40 * 4,
                outlier_fraction=0.1,
                condition=condition,
                dtype=jnp.float64,
            )
            errors = polyak(problem, jr.key(seed), 4, 150).history.relative_error
            steps.append(int(np.argmax(np.asarray(errors) <= 1e-8)))
        assert 95 * 0.85 <= min(steps) <= max(steps) <= 125 * 1.15


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [False, True])
def test_local_rate_of_scaled_gd(symmetric, x64):
    """max(|1 − η|, |1 − 2η|) on an exact factorization."""
    keys = jr.split(jr.key(0), 4)
    left = jnp.linalg.qr(jr.normal(keys[0], (15, 3)))[0]
    right = left if symmetric else jnp.linalg.qr(jr.normal(keys[1], (15, 3)))[0]
    truth = lrjax.LowRank(left * jnp.array([[100.0, 10.0, 1.0]]), right)
    truth = lrjax.balance(truth)
    problem = recovery.Problem(
        recovery.Identity((15, 15)), truth.materialize(), recovery.Squared(), truth
    )
    start = lrjax.LowRank(
        truth.left + 1e-3 * jr.normal(keys[2], (15, 3)),
        truth.right + 1e-3 * jr.normal(keys[3], (15, 3)),
    )
    etas = jnp.array([0.2, 0.5, 0.6, 2 / 3, 0.7, 0.8, 0.9])
    run = lambda eta: lrjax.solve(problem, lrjax.scaled_gd(eta), start, steps=50)
    errors = np.asarray(jax.jit(jax.vmap(run))(etas).history.relative_error)
    for eta, error in zip(etas, errors, strict=True):
        last = np.flatnonzero(error > 1e-12)[-1]
        rate = (error[last] / error[last // 2]) ** (1 / (last - last // 2))
        assert abs(rate - max(abs(1 - eta), abs(1 - 2 * eta))) < 1e-2


@pytest.mark.slow
def test_undamped_at_twice_the_rank_stays_finite_in_float32():
    problem = sensing(jr.key(0), condition=20.0, rank=3, factor=24)
    solution = polyak(problem, jr.key(0), 6, 2000)
    assert bool(solution.history.finite.all())
    assert float(problem.relative_error(solution.x)) <= 1e-5


@pytest.mark.slow
def test_early_stop_keeps_the_result_and_repeats_the_record():
    problem = sensing(jr.key(1))
    stopped = polyak(problem, jr.key(1), 2, 300, tol=1e-5)
    taken = int(stopped.steps)
    assert 10 < taken < 299
    full = polyak(problem, jr.key(1), 2, taken)
    assert_close(stopped.x, full.x, rtol=1e-5)
    history = stopped.history
    assert float(history.relative_step[taken - 1]) <= 1e-5
    assert float(history.relative_step[taken - 2]) > 1e-5
    assert bool(jnp.all(history.loss[taken:] == history.loss[taken - 1]))


@pytest.mark.slow
def test_members_of_a_batch_stop_by_themselves():
    keys = jr.split(jr.key(2), 3)
    conditions = jnp.array([1.0, 3.0, 30.0])
    problems = jax.vmap(lambda k, c: sensing(k, condition=c))(keys, conditions)
    run = lambda p, k: polyak(p, k, 2, 150, tol=1e-5)
    batch = jax.jit(jax.vmap(run))(problems, keys)
    assert len({int(s) for s in batch.steps}) > 1
    for k in range(3):
        alone = run(jax.tree.map(lambda leaf, k=k: leaf[k], problems), keys[k])
        assert int(batch.steps[k]) == pytest.approx(int(alone.steps), abs=3)
        assert_close(jax.tree.map(lambda a, k=k: a[k], batch.x), alone.x, rtol=1e-3)


@pytest.mark.slow
def test_a_member_that_diverges_leaves_the_others_alone():
    problem = sensing(jr.key(3))
    problem = recovery.Problem(
        problem.operator, problem.targets, recovery.Squared(), problem.truth
    )
    start = lrjax.spectral_init(problem, 2, key=jr.key(0))
    run = lambda eta: lrjax.solve(problem, optax.sgd(eta), start, steps=60)
    batch = jax.jit(jax.vmap(run))(jnp.array([0.02, 1e6]))
    assert not bool(batch.history.finite[1, -1])
    assert float(batch.history.relative_error[1, -1]) == jnp.inf
    assert bool(batch.history.finite[0].all())
    alone = jax.jit(run)(0.02)
    assert_close(alone.x, jax.tree.map(lambda a: a[0], batch.x), rtol=1e-4)
    stopped = lrjax.solve(problem, optax.sgd(1e6), start, steps=60, tol=1e-9)
    assert int(stopped.steps) < 60


@pytest.mark.slow
def test_relative_step_is_the_first_order_move():
    problem = sensing(jr.key(4))
    start = lrjax.spectral_init(problem, 2, key=jr.key(0))
    history = lrjax.solve(problem, optax.sgd(1e-5), start, steps=2).history
    after = lrjax.solve(problem, optax.sgd(1e-5), start, steps=1).x
    move = jnp.linalg.norm(after.materialize() - start.materialize())
    want = move / jnp.linalg.norm(start.materialize())
    assert_close(history.relative_step[0], want, rtol=1e-2)


@pytest.mark.slow
def test_observe_and_callback_and_plot():
    problem = sensing(jr.key(5), n=10)
    start = lrjax.spectral_init(problem, 2, key=jr.key(0))
    seen = []
    solution = lrjax.solve(
        problem,
        lrjax.scaled_subgradient(f_min=problem.loss(problem.truth)),
        start,
        steps=5,
        observe=lambda state: jnp.diag(lrjax.svd(state.params).core),
        callback=lambda step, loss: seen.append((int(step), float(loss))),
        progress=True,
    )
    jax.effects_barrier()
    assert solution.history.observed.shape == (5, 2)
    assert sorted(seen) == [(k, float(solution.history.loss[k])) for k in range(5)]
    assert len(solution.plot().lines) == 3


@pytest.mark.slow
def test_a_bar_begins_with_every_run_and_ends_with_it(capsys):
    """One for all members of a batch, with the largest loss; free where it is off."""
    problem = sensing(jr.key(5), n=10)
    start = lrjax.spectral_init(problem, 2, key=jr.key(0))

    def run(eta, progress=True):
        tx = optax.sgd(eta)
        return lrjax.solve(problem, tx, start, steps=7, tol=0.1, progress=progress)

    assert "callback" not in str(jax.make_jaxpr(lambda e: run(e, False))(1e-5))
    batch = jax.jit(jax.vmap(run))
    for _ in range(2):
        # The second member keeps moving, the first stops at once.
        solution = batch(jnp.array([0.0, 2e-2]))
        jax.effects_barrier()
        shown = capsys.readouterr().err
        taken = int(solution.steps.max())
        assert shown.count(f"0/{7}") == 1
        assert f"| {taken}/7" in shown.split("\r")[-1]
        losses = solution.history.loss[:, :taken].max(axis=0)
        assert f"loss={float(losses[-1]):.3e}" in shown


@pytest.mark.slow
def test_a_bar_does_no_harm_to_gradients():
    problem = sensing(jr.key(6), n=10)
    start = lrjax.spectral_init(problem, 2, key=jr.key(0))

    def final(eta, progress):
        tx = optax.sgd(eta)
        return problem.loss(lrjax.solve(problem, tx, start, steps=3, progress=progress).x)

    slope = jax.grad(final)
    assert_close(slope(1e-3, True), slope(1e-3, False), rtol=1e-5)


@pytest.mark.slow
def test_gradients_pass_through_all_steps():
    problem = sensing(jr.key(6), n=10)
    start = lrjax.spectral_init(problem, 2, key=jr.key(0))
    final = lambda eta: problem.loss(lrjax.solve(problem, optax.sgd(eta), start, steps=3).x)
    slope = jax.grad(final)(1e-3)
    assert_close(slope, (final(1.01e-3) - final(0.99e-3)) / 2e-5, rtol=0.1)


@pytest.fixture(scope="module")
def falling():
    """Steps that fall by the given factor, in one program."""
    problem = sensing(jr.key(8), condition=20.0)
    start = lrjax.spectral_init(problem, 4, key=jr.key(0))

    def run(problem, start, factor, tol):
        rate = lambda count: lrjax.norm(start) / 6 * factor**count
        tx = lrjax.opsa(rate)
        return lrjax.solve(problem, tx, start, steps=250, tol=tol, keep="best")

    jitted = jax.jit(run)
    return problem, lambda factor, tol=0.0: jitted(problem, start, factor, tol)


@pytest.mark.slow
def test_a_run_that_froze_is_stalled_and_not_converged(falling):
    problem, run = falling
    frozen, good = run(0.6, 1e-6), run(0.93, 1e-6)
    assert float(problem.relative_error(frozen.x)) > 1e-2
    assert float(frozen.history.relative_step[-1]) <= 1e-6
    assert bool(frozen.stalled)
    assert not bool(frozen.converged)
    assert float(problem.relative_error(good.x)) < 1e-4
    assert bool(good.converged)
    assert not bool(good.stalled)


def test_a_run_at_the_end_of_its_precision_is_not_stalled(falling):
    """Nor is one whose steps stay long."""
    _, run = falling
    assert not bool(run(0.9).stalled)
    assert not bool(run(1.0).stalled)


def test_the_best_iterate_is_kept_when_asked(falling):
    problem, run = falling
    hovering = run(1.0)
    losses = np.append(hovering.history.loss, problem.loss(hovering.x))
    assert_close(problem.loss(hovering.x), losses.min(), rtol=1e-5)
    assert float(hovering.history.loss[-1]) > losses.min()


@pytest.mark.slow
def test_the_best_iterate_may_be_the_last_or_the_first():
    problem = sensing(jr.key(9), n=10)
    start = lrjax.spectral_init(problem, 2, key=jr.key(0))
    run = lambda eta: lrjax.solve(problem, optax.sgd(eta), start, steps=1, keep="best").x
    assert_close(run(1e6), start, rtol=0)
    last = lrjax.solve(problem, optax.sgd(1e-4), start, steps=1).x
    assert_close(run(1e-4), last, rtol=1e-6)


def test_bad_arguments_are_refused():
    problem = sensing(jr.key(7), n=10)
    start = lrjax.spectral_init(problem, 2, key=jr.key(0))
    with pytest.raises(ValueError, match="steps"):
        lrjax.solve(problem, optax.sgd(1.0), start, steps=0)
    with pytest.raises(ValueError, match="shape"):
        lrjax.solve(
            problem,
            optax.sgd(1.0),
            lrjax.LowRank(jnp.ones((3, 1)), start.left[:, :1]),
            steps=1,
        )
    assert all_finite(start)

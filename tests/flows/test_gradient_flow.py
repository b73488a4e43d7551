import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import scipy.special

import lrjax
from lrjax import LowRank, flows, gradient_flow

from ..helpers import assert_close, random_low_rank
from .conftest import Aligned, approximation


def half_square(x, target):
    return 0.5 * jnp.sum((x - target) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tolerance", "bound"), [(1e-6, 8e-6), (1e-8, 3e-8), (1e-10, 4e-10), (1e-12, 3e-12)]
)
def test_error_follows_the_tolerance(aligned, tolerance, bound):
    times = jnp.linspace(0.2, 4, 20)

    def end(t1):
        solution = gradient_flow(
            approximation,
            aligned.start,
            aligned.target,
            t1=t1,
            rtol=tolerance,
            atol=tolerance,
        )
        return solution.params

    ends = jax.vmap(end)(times)
    b, a = flows.aligned_modes(times, aligned.left, aligned.right, aligned.sigma)
    error = jnp.max(jnp.abs(ends.materialize() - aligned.matrix(b * a)))
    assert error <= bound
    # The conserved matrix leftᵀleft − rightᵀright tells the error without the solution.
    drift = lrjax.metrics.balance_drift(ends, aligned.start)
    assert jnp.max(drift) <= 10 * tolerance


@pytest.mark.slow_but("0.5")
@pytest.mark.parametrize("time", [0.5, 2.0])
def test_unaligned_balanced_start_follows_the_riccati_solution(time):
    target = jr.normal(jr.key(0), (6, 5))
    target = 2 * target / jnp.linalg.norm(target, 2)
    start = lrjax.balance(
        LowRank(0.3 * jr.normal(jr.key(1), (6, 3)), 0.3 * jr.normal(jr.key(2), (5, 3)))
    )
    solution = gradient_flow(approximation, start, target, t1=time, rtol=1e-12, atol=1e-12)
    exact = flows.riccati(jnp.array(time), start, target)
    x = solution.params
    for got, want in [
        (x.materialize(), exact.product),
        (x.left @ x.left.T, exact.left_gram),
        (x.right @ x.right.T, exact.right_gram),
    ]:
        assert jnp.max(jnp.abs(got - want)) <= 1e-11


def network_loss(adapters, base, inputs, outputs):
    hidden = jnp.tanh((base[0] + 0.5 * adapters[0].materialize()) @ inputs)
    prediction = (base[1] + 2.0 * adapters[1].materialize()) @ hidden
    return jnp.mean((prediction - outputs) ** 2)


@pytest.mark.slow
def test_each_adapter_of_a_nonlinear_network_keeps_its_balance():
    keys = jr.split(jr.key(3), 6)
    base = (jr.normal(keys[0], (8, 4)), jr.normal(keys[1], (3, 8)))
    adapters = (
        random_low_rank(keys[2], 8, 4, 2, dtype=jnp.float64),
        random_low_rank(keys[3], 3, 8, 2, dtype=jnp.float64),
    )
    inputs, outputs = jr.normal(keys[4], (4, 20)), jr.normal(keys[5], (3, 20))
    solution = gradient_flow(
        network_loss, adapters, base, inputs, outputs, t1=1.0, rtol=1e-8, atol=1e-8
    )
    assert network_loss(solution.params, base, inputs, outputs) < 0.5 * network_loss(
        adapters, base, inputs, outputs
    )
    for end, start in zip(solution.params, adapters, strict=True):
        size = jnp.sum(start.left**2) + jnp.sum(start.right**2)
        assert lrjax.metrics.balance_drift(end, start) <= 1e-8 * size


@pytest.mark.slow
def test_two_learning_rates_conserve_the_weighted_balance(aligned):
    ratio = 4.0
    solution = gradient_flow(
        approximation,
        aligned.start,
        aligned.target,
        t1=2.0,
        rtol=1e-8,
        atol=1e-8,
        precondition=lrjax.scale_factors(left=ratio),
    )

    def weighted(x):
        return x.left.T @ x.left - ratio * x.right.T @ x.right

    drift = weighted(solution.params) - weighted(aligned.start)
    assert jnp.linalg.norm(drift) <= 1e-7
    plain = lrjax.metrics.balance_drift(solution.params, aligned.start)
    assert plain > 1e-2


@pytest.mark.slow
def test_weight_decay_is_a_transform(aligned):
    decay = 0.3
    solution = gradient_flow(
        half_square,
        jnp.ones(3),
        jnp.zeros(3),
        t1=2.0,
        rtol=1e-10,
        precondition=optax.add_decayed_weights(decay),
    )
    assert_close(solution.params, jnp.exp(-2 * (1 + decay)) * jnp.ones(3), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("friction", [5.0, lambda t: 0.5 + 0 * t])
def test_friction_is_the_damped_oscillator(friction):
    gamma = 0.5 if callable(friction) else friction
    solution = gradient_flow(
        half_square, jnp.ones(2), jnp.zeros(2), t1=3.0, friction=friction, rtol=1e-10
    )
    root = np.sqrt(complex(gamma**2 / 4 - 1))
    fast, slow = -gamma / 2 - root, -gamma / 2 + root
    exact = (slow * np.exp(3 * fast) - fast * np.exp(3 * slow)) / (slow - fast)
    assert_close(solution.params, exact.real * jnp.ones(2), rtol=1e-8)


@pytest.mark.slow
def test_heavy_ball_steps_converge_to_the_flow_with_friction():
    gamma, t1 = 1.0, 2.0
    target = jnp.array([1.0, -2.0])
    flow = gradient_flow(
        half_square, jnp.zeros(2), target, t1=t1, friction=gamma, rtol=1e-10
    ).params

    def descent(h):
        tx = optax.sgd(h * h, momentum=1 - gamma * h)

        def step(carry, _):
            x, state = carry
            updates, state = tx.update(jax.grad(half_square)(x, target), state)
            return (optax.apply_updates(x, updates), state), None

        start = jnp.zeros(2)
        return jax.lax.scan(step, (start, tx.init(start)), length=round(t1 / h))[0][0]

    errors = [float(jnp.linalg.norm(descent(h) - flow)) for h in (1e-2, 1e-3)]
    assert 8 < errors[0] / errors[1] < 12  # first order
    assert errors[1] < 5e-3


@pytest.mark.slow
def test_saving(aligned):
    ts = jnp.array([0.0, 0.5, 1.5])
    run = eqx.Partial(
        gradient_flow, approximation, aligned.start, aligned.target, t1=2.0, rtol=1e-10
    )
    whole, grid = run(), run(ts=ts, dense=True, max_steps=256)
    assert whole.ts == 2.0
    assert whole.params.left.shape == (7, 3)
    assert_close(grid.ts, ts)
    assert_close(jax.tree.map(lambda x: x[0], grid.params), aligned.start)
    assert_close(grid.evaluate(0.5), jax.tree.map(lambda x: x[1], grid.params), rtol=1e-12)
    seen = run(ts=ts, observe=lambda m: (m.t, m.loss, m.gradient_norm, m.start_loss))
    t, loss, gradient, start = seen.observed
    assert_close(t, ts)
    assert_close(loss, jax.vmap(approximation, (0, None))(grid.params, aligned.target))
    norms = jax.vmap(jax.grad(approximation), (0, None))(grid.params, aligned.target)
    want = jnp.sqrt(jnp.sum(norms.left**2, (1, 2)) + jnp.sum(norms.right**2, (1, 2)))
    assert_close(gradient, want)
    assert_close(start, jnp.full(3, loss[0]))
    assert_close(seen.params, whole.params, rtol=1e-9)  # the end, not the grid
    with pytest.raises(ValueError, match="dense=True"):
        whole.evaluate(1.0)


@pytest.mark.slow
def test_everything_but_floating_arrays_stays():
    model = {"w": jnp.ones(2), "count": jnp.arange(3), "f": jnp.tanh, "none": None}
    solution = gradient_flow(
        lambda m, target: half_square(m["f"](m["w"]), target), model, jnp.zeros(2), t1=1.0
    )
    assert solution.params["f"] is jnp.tanh
    assert solution.params["none"] is None
    assert_close(solution.params["count"], model["count"])
    assert jnp.all(solution.params["w"] < 0.8)


@pytest.mark.slow
def test_float32_stays_float32():
    x = jnp.ones(2, jnp.float32)
    solution = gradient_flow(half_square, x, 0 * x, t1=1.0, ts=jnp.array([0.5, 1.0]))
    assert solution.params.dtype == jnp.float32
    want = jnp.exp(-jnp.array([[0.5, 0.5], [1.0, 1.0]]))
    assert_close(solution.params, want.astype(jnp.float32), rtol=1e-4)


@pytest.mark.slow
def test_a_second_call_with_other_numbers_does_not_compile(aligned):
    traces = []

    def counted(x, target):
        traces.append(1)
        return approximation(x, target)

    rule = flows.loss_below(1e-3)
    observe = lambda m: m.loss
    for k in range(3):
        before = len(traces)
        gradient_flow(
            counted,
            jax.tree.map(lambda x: (1 + k) * x, aligned.start),  # noqa: B023
            aligned.target + k,
            t1=2.0 + k,
            ts=jnp.linspace(0, 1 + k, 5),
            rtol=10.0 ** -(6 + k),
            until=rule,
            observe=observe,
        )
        during = len(traces) - before
        # Eagerly once for what the stopping rules compare with; the rest is compiled.
        assert during == 1 if k else during > 1


@pytest.mark.slow
def test_running_out_of_steps_is_reported(aligned):
    def run(t1):
        return gradient_flow(
            approximation, aligned.start, aligned.target, t1=t1, max_steps=20
        ).stats

    stats = jax.vmap(run)(jnp.array([0.1, 100.0]))
    assert stats.success.tolist() == [True, False]
    assert stats.steps[1] == 20
    assert stats.time[0] == pytest.approx(0.1)
    assert stats.time[1] < 100


@pytest.mark.slow
def test_members_of_a_batch_are_those_of_a_loop(aligned):
    def run(alpha):
        start = jax.tree.map(lambda x: alpha * x, aligned.start)
        return gradient_flow(approximation, start, aligned.target, t1=2.0)

    alphas = jnp.array([1.0, 1e-2, 1e-4])
    batch = jax.jit(jax.vmap(run))(alphas)
    for k, alpha in enumerate(alphas):
        alone = run(alpha)
        assert_close(jax.tree.map(lambda x: x[k], batch.params), alone.params, rtol=1e-9)  # noqa: B023
        assert batch.stats.steps[k] == alone.stats.steps


@pytest.mark.parametrize(
    "precondition", [optax.scale_by_adam(), lrjax.scale_by_gram(order="alternating")]
)
def test_a_precondition_with_a_state_is_refused(aligned, precondition):
    with pytest.raises(ValueError, match="stateless"):
        gradient_flow(
            approximation, aligned.start, aligned.target, t1=1.0, precondition=precondition
        )


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="float32 or wider"):
        gradient_flow(half_square, jnp.ones(2, jnp.bfloat16), 0.0, t1=1.0)
    with pytest.raises(TypeError, match="nothing flows"):
        gradient_flow(half_square, jnp.arange(2), 0.0, t1=1.0)
    with pytest.raises(ValueError, match="'stiff'"):
        gradient_flow(half_square, jnp.ones(2), 0.0, t1=1.0, solver="fast")


@pytest.mark.slow
def test_progress_is_shown(capsys):
    solution = gradient_flow(half_square, jnp.ones(2), jnp.zeros(2), t1=1.0, progress=True)
    jax.block_until_ready(solution)
    jax.effects_barrier()
    assert "100" in capsys.readouterr().err
    assert_close(solution.params, jnp.exp(-jnp.ones(2)), rtol=1e-7)


@pytest.mark.slow
def test_any_diffrax_solver(aligned):
    b, a = flows.aligned_modes(jnp.array(2.0), aligned.left, aligned.right, aligned.sigma)
    solution = gradient_flow(
        approximation,
        aligned.start,
        aligned.target,
        t1=2.0,
        rtol=1e-10,
        solver=diffrax.Dopri8(),
    )
    assert_close(solution.params.materialize(), aligned.matrix(b * a), rtol=1e-9)


@pytest.mark.slow
def test_default_tolerances_follow_the_size_of_the_start():
    """From 1e-9: the time of the escape, to which every digit of the start counts."""
    aligned = Aligned(left=(1e-9, 3e-9), right=(2e-9, 1e-9), sigma=(1.0, 0.9))
    ts = jnp.array([10.0, 20.0, 22.0])
    solution = gradient_flow(approximation, aligned.start, aligned.target, t1=ts[-1], ts=ts)
    b, a = flows.aligned_modes(ts, aligned.left, aligned.right, aligned.sigma)
    exact = aligned.matrix(b * a)
    error = jnp.linalg.norm(solution.params.materialize() - exact, axis=(-2, -1))
    size = jnp.linalg.norm(exact, axis=(-2, -1))
    assert size[0] < 1e-8  # still at the saddle
    assert size[2] > 0.1  # away from it
    assert jnp.all(error < 1e-5 * size)


@pytest.mark.slow
def test_friction_that_falls_with_the_time_is_nesterovs():
    """``x'' + 3/(1 + t) x' + x = 0`` is Bessel's equation for ``(1 + t) x``."""
    ts = jnp.linspace(0, 12, 7)
    solution = gradient_flow(
        half_square,
        jnp.ones(1),
        jnp.zeros(1),
        t1=12.0,
        ts=ts,
        friction=lambda t: 3 / (1 + t),
    )
    s = 1 + np.asarray(ts)
    basis = lambda k, s: np.array([scipy.special.jv(k, s), scipy.special.yv(k, s)])
    # x = (A J₁(s) + B Y₁(s))/s has x' = −(A J₂(s) + B Y₂(s))/s.
    weights = np.linalg.solve(np.stack([basis(1, 1.0), basis(2, 1.0)]), [1.0, 0.0])
    assert_close(solution.params[:, 0], weights @ basis(1, s) / s, rtol=1e-6)


@pytest.mark.slow
def test_one_observer_watches_a_flow_and_a_recovery():
    key = jr.key(0)
    problem = lrjax.matrix_sensing(key, (6, 5), 1, 90, objective=lrjax.recovery.Squared())
    start = lrjax.spectral_init(problem, 2, key=key)
    loss = lambda x, problem: problem.loss(x)
    watch = lambda state: (lrjax.recovery.spectrum(state), state.loss, state.t)
    flow = gradient_flow(loss, start, problem, t1=1.0, ts=jnp.zeros(1), observe=watch)
    steps = lrjax.solve(problem, optax.sgd(0.1), start, steps=1, observe=watch)
    assert_close(flow.observed, steps.history.observed, rtol=1e-6)

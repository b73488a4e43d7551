import jax
import jax.numpy as jnp
import pytest

from lrjax import LowRank, flows, gradient_flow

from ..helpers import assert_close
from .conftest import approximation


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "smallest"),
    [
        (flows.loss_below(1e-6), 1e-7),
        (flows.gradient_below(1e-2), 1e-3),  # below 1e-5 the integrator's error is larger
        (flows.stationary(after=3.0), 1e-7),
        (lambda m: flows.loss_below(1e-7, relative=True)(m) & (m.speed < m.size), 1e-7),
    ],
    ids=["loss", "gradient", "stationary", "own"],
)
def test_rules_wait_for_the_escape_from_the_saddle(aligned, rule, smallest):
    def end(alpha):
        start = LowRank(alpha * aligned.u, alpha * aligned.v)
        return gradient_flow(approximation, start, aligned.target, t1=200.0, until=rule)

    alphas = jnp.array([1e-1, 1e-2, smallest])
    solution = jax.vmap(end)(alphas)
    times = solution.stats.time
    assert jnp.all(solution.stats.stopped)
    assert jnp.all(solution.stats.success)
    assert jnp.all(times < 60)
    # All of the modes are learnt, however small the start.
    slowest = aligned.sigma[-1]
    learnt = jnp.log(slowest / alphas**2 - 1) / (2 * slowest)  # half of the last mode
    assert jnp.all(times > learnt)
    gaps = jax.vmap(approximation, (0, None))(solution.params, aligned.target)
    assert jnp.all(gaps < 1e-2)
    assert_close(solution.ts, times)


@pytest.mark.slow
def test_nothing_is_saved_after_the_end(aligned):
    ts = jnp.linspace(0, 50, 6)
    solution = gradient_flow(
        approximation,
        aligned.start,
        aligned.target,
        t1=50.0,
        ts=ts,
        until=flows.loss_below(1e-2),
        observe=lambda m: m.loss,
    )
    inside = ts <= solution.stats.time
    assert 1 <= int(inside.sum()) < 6
    assert jnp.array_equal(jnp.isfinite(solution.ts), inside)
    assert jnp.all(jnp.isfinite(solution.params.left))
    assert approximation(solution.params, aligned.target) <= 1e-2


@pytest.mark.slow
def test_a_rule_that_never_fires_does_not_stop(aligned):
    stats = gradient_flow(
        approximation, aligned.start, aligned.target, t1=1.0, until=flows.loss_below(-1.0)
    ).stats
    assert not stats.stopped
    assert stats.success
    assert stats.time == 1


def half_square(x):
    return 0.5 * jnp.sum(x**2)


@jax.jit
def ended(start, rate):
    flow = gradient_flow(half_square, start, t1=30.0, until=flows.stationary(rate))
    return flow.stats


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_stationary_is_relative_to_the_parameters(size):
    """``x' = −x`` has the relative rate one at every size, and never more."""
    start = jnp.full(1, size)
    assert not ended(start, 0.99).stopped
    early = ended(start, 1.01)
    assert early.stopped
    assert early.time < 5


@pytest.mark.slow
def test_a_rule_may_wait_longer_than_it_needs():
    run = lambda after: (
        gradient_flow(
            half_square, jnp.ones(1), t1=99.0, until=flows.gradient_below(1e-2, after=after)
        ).stats
    )
    natural = run(0.0)
    assert jnp.log(100.0) <= natural.time < 8
    late = run(20.0)
    assert late.stopped
    assert 20 <= late.time < 40

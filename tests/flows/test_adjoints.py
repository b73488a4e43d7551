import diffrax
import jax
import jax.numpy as jnp
import pytest

from lrjax import LowRank, flows, gradient_flow

from ..helpers import assert_close
from .conftest import approximation


def final_loss(log_alpha, aligned, adjoint):
    alpha = jnp.exp(log_alpha)
    x = LowRank(alpha * aligned.u, alpha * aligned.v)
    x = gradient_flow(
        approximation, x, aligned.target, t1=1.5, rtol=1e-11, atol=1e-13, adjoint=adjoint
    ).params
    return approximation(x, aligned.target)


def exact_loss(log_alpha, aligned):
    same = jnp.exp(log_alpha) * jnp.ones(3)
    b, a = flows.aligned_modes(jnp.array(1.5), same, same, aligned.sigma)
    return 0.5 * jnp.sum((aligned.sigma - b * a) ** 2)


@pytest.mark.slow_but("reverse")
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_derivative_of_the_final_loss_by_the_size_of_the_start(aligned, mode):
    at = jnp.log(jnp.array(0.05))
    want = jax.grad(exact_loss)(at, aligned)
    if mode == "reverse":
        got = jax.grad(final_loss)(at, aligned, None)
    else:
        got = jax.jacfwd(final_loss)(at, aligned, diffrax.ForwardMode())
    assert jnp.abs(got - want) <= 1e-9 * jnp.abs(want)


@pytest.mark.slow
def test_derivative_by_the_data_reaches_the_loss(aligned):
    def end(scale):
        return gradient_flow(
            flows.approximation_loss, aligned.start, aligned.target, scale, t1=0.7
        ).params.materialize()

    def exact(scale):
        b, a = flows.aligned_modes(
            jnp.array(0.7), aligned.left, aligned.right, aligned.sigma, scale
        )
        return aligned.matrix(b * a)

    at = jnp.array(1.3)
    got = jax.grad(lambda s: jnp.sum(end(s) * aligned.target))(at)
    want = jax.grad(lambda s: jnp.sum(exact(s) * aligned.target))(at)
    assert_close(got, want, rtol=1e-6)


@pytest.mark.slow
def test_stiff_solver_takes_fewer_steps_on_an_ill_conditioned_problem():
    sigma = jnp.array([1.0, 1e-4])
    # Both modes start balanced and off their limits; the slow one sets the time scale.
    start = LowRank(jnp.diag(jnp.sqrt(2 * sigma)), jnp.diag(jnp.sqrt(2 * sigma)))
    t1 = 3 / sigma[-1]
    b, a = flows.aligned_modes(t1, jnp.sqrt(2 * sigma), jnp.sqrt(2 * sigma), sigma)
    steps = {}
    for solver in ("explicit", "stiff"):
        solution = gradient_flow(
            approximation,
            start,
            jnp.diag(sigma),
            t1=t1,
            rtol=1e-7,
            atol=1e-10,
            solver=solver,
        )
        assert_close(jnp.diagonal(solution.params.materialize()), b * a, rtol=1e-6)
        steps[solver] = int(solution.stats.steps)
    assert steps["stiff"] < steps["explicit"] / 20

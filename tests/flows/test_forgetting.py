import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax import flows, gradient_flow, lowrank

from ..helpers import assert_close, with_spectrum


M, N = 6, 5


def tasks(getkey):
    """A change and the inputs of two tasks, with gaps in the spectrum that LoRA cuts."""
    roots = [
        with_spectrum(getkey(), N, N, jnp.linspace(1.3, 0.7, N), jnp.float64)
        for _ in range(2)
    ]
    new, old = (root @ root.T for root in roots)
    values, vectors = np.linalg.eigh(new)
    u, v = (jnp.linalg.qr(jr.normal(getkey(), (k, N)))[0] for k in (M, N))
    seen = (u * jnp.array([2.0, 1.4, 1.0, 0.7, 0.5])[None, :]) @ v.T
    return seen @ vectors @ np.diag(values**-0.5) @ vectors.T, new, old


@pytest.mark.slow_but("2")
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_lora_ends_on_the_curve(rank, getkey):
    change, new, old = tasks(getkey)
    curve = flows.forgetting_by_rank(change, new, old)
    start = lowrank.gaussian_init((M, N), rank, 0.1, key=getkey())
    end = gradient_flow(flows.student_loss, start, change, new, t1=300.0, rtol=1e-8).params
    assert_close(flows.student_loss(end, change, new), curve.target[rank], rtol=1e-6)
    forgotten = flows.student_loss(end, jnp.zeros((M, N)), old)
    assert_close(forgotten, curve.source[rank], rtol=1e-6)


@pytest.mark.slow
def test_full_fine_tuning_follows_its_curve(getkey):
    change, new, old = tasks(getkey)
    times = jnp.array([0.0, 0.5, 2.0, 60.0])
    curve = flows.forgetting_in_time(times, change, new, old)
    flow = gradient_flow(
        flows.student_loss, jnp.zeros((M, N)), change, new, t1=60.0, ts=times, rtol=1e-10
    ).params
    loss = jax.vmap(flows.student_loss, (0, None, None))
    np.testing.assert_allclose(loss(flow, change, new), curve.target, atol=1e-8)
    np.testing.assert_allclose(loss(flow, 0 * change, old), curve.source, atol=1e-8)
    whole = flows.forgetting_by_rank(change, new, old)
    assert_close(curve.source[-1], whole.source[-1], rtol=1e-9)
    assert whole.target[-1] == 0


def test_a_lower_rank_learns_less_and_forgets_less(getkey):
    """For any two tasks: the increments are positive."""
    for _ in range(5):
        change = jr.normal(getkey(), (M, N))
        new, old = (x @ x.T for x in jr.normal(getkey(), (2, N, N)))
        curve = flows.forgetting_by_rank(change, new, old)
        assert jnp.all(jnp.diff(curve.target) < 0)
        assert jnp.all(jnp.diff(curve.source) > 0)
        before = flows.student_loss(0 * change, change, new)
        assert_close(curve.target[0], before, condition=100)


def test_stopping_early_forgets_less_than_any_rank_between_white_tasks(getkey):
    """At the same loss on the new task: ``(1 − √f)² <= 1 − f``."""
    change, white = jr.normal(getkey(), (M, N)), jnp.eye(N)
    ranks = flows.forgetting_by_rank(change, white, white)
    left = ranks.target[:-1] / ranks.target[0]
    stopped = flows.forgetting_in_time(-jnp.log(left) / 2, change, white, white)
    np.testing.assert_allclose(stopped.target, ranks.target[:-1], rtol=1e-10)
    want = (1 - jnp.sqrt(left)) ** 2 * ranks.target[0]
    np.testing.assert_allclose(stopped.source, want, rtol=1e-10, atol=1e-14)
    assert jnp.all(stopped.source[1:] < ranks.source[1:-1])
    total = ranks.target + ranks.source
    np.testing.assert_allclose(total, total[0], rtol=1e-10)

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax import LowRank, flows, gradient_flow, lowrank, metrics

from ..helpers import assert_close


D = 3
DIAGONAL = flows.Attention(
    LowRank(jnp.array([0.4, 0.0, 0.0])[:, None, None], jnp.ones((D, 1, 1))),
    LowRank(jnp.array([1.0, -0.4, 0.0])[:, None, None], jnp.ones((D, 1, 1))),
)


def diagonal_loss(w, sequences, targets):
    one = jnp.ones((D, 1, 1))
    pairs = [LowRank(x[:, None, None], one) for x in jnp.split(w, 2)]
    return flows.attention_loss(flows.Attention(*pairs), sequences, targets)


def test_attention_is_what_it_says(getkey):
    x = jr.normal(getkey(), (2, 5, 4))
    node = lambda *shape: LowRank(*jr.normal(getkey(), (2, *shape)))
    full = flows.Attention(node(4, 2), node(4, 3))
    got = flows.attention(full, x)
    for sequence, out in zip(np.asarray(x), got, strict=True):
        scores = sequence @ np.asarray(full.key_query.materialize()) @ sequence.T
        look = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        want = look @ sequence @ np.asarray(full.value_output.materialize())
        assert_close(out, want, condition=10)
    # A stack is its block diagonal.
    stacked = flows.Attention(node(2, 2, 1), node(4, 1, 1))
    dense = [jax.scipy.linalg.block_diag(*p.materialize()) for p in stacked]
    same = flows.Attention(*(LowRank(p, jnp.eye(4)) for p in dense))
    assert_close(flows.attention(stacked, x), flows.attention(same, x), condition=10)


@pytest.mark.slow
def test_separate_weights_wake_when_their_growth_says():
    """``L = ½ Σ h_i (w_i − m_i)²``: the i-th at ``1/(h_i |m_i|)``, to ``m_i``."""
    h, m = jnp.array([1.0, 3.0, 0.5, 1.0]), jnp.array([-2.0, 1.0, 1.0, 0.0])
    loss = lambda w, h, m: 0.5 * jnp.sum(h * (w - m) ** 2)
    found = jax.jit(lambda: flows.gradual_stages(loss, 4, h, m, stages=4))()
    np.testing.assert_allclose(found.times, [1 / 3, 1 / 2, 2, np.inf])
    weights = np.diag(m)[[1, 0, 2]].cumsum(axis=0)
    np.testing.assert_allclose(found.weights[:3], weights, atol=1e-7)
    np.testing.assert_allclose(found.losses, [2.25, 0.25, 0, 0], atol=1e-12)


@pytest.mark.slow
def test_what_is_learnt_changes_when_the_next_wakes():
    """Two that overlap: the second wakes by its push before and after the first."""
    gram, m = jnp.array([[1.0, 0.6], [0.6, 1.0]]), jnp.array([1.0, 0.9])
    loss = lambda w, gram, m: 0.5 * (w - m) @ gram @ (w - m)
    found = flows.gradual_stages(loss, 2, gram, m, stages=2)
    push = gram @ m  # at zero
    first = 1 / push[0]
    after = push[1] - 0.6 * push[0]  # with the first at its own minimum
    second = first + (1 - first * push[1]) / after
    np.testing.assert_allclose(found.times, [first, second], rtol=1e-7)
    np.testing.assert_allclose(found.weights[0], [push[0], 0], rtol=1e-7)
    np.testing.assert_allclose(found.weights[1], m, rtol=1e-7)


def first_times(ts, sizes, levels):
    """When sizes that grow exponentially first come to a level."""
    cross = jax.vmap(metrics.crossing_time, (None, 1, 0))
    return cross(ts, 1 / sizes, 1 / levels)


@pytest.mark.slow
def test_a_diagonal_layer_of_attention_learns_in_the_stages_of_the_limit():
    """The time of a stage is ``τ ln(1/α)`` and a constant: its slope is τ."""
    task = flows.attention_task(DIAGONAL, examples=48, length=4, key=jr.key(3))
    limit = flows.gradual_stages(diagonal_loss, 2 * D, *task, stages=3)
    assert limit.losses[-1] < 1e-12  # the teacher has three weights
    ends = limit.weights[-1]
    order = jnp.argsort(-jnp.abs(ends))[:3]
    ones = jnp.array([1.0, -0.3, 0.7, 0.5, 0.9, 0.6])
    logs = jnp.array([30.0, 60.0])

    @jax.jit
    def wakes(log):
        pair = lambda x, y: LowRank(*(z[:, None, None] * jnp.exp(-log) for z in (x, y)))
        us, vs = jnp.split(ones, 2), jnp.split(ones[::-1], 2)
        start = flows.Attention(pair(us[0], vs[0]), pair(us[1], vs[1]))
        ts = jnp.linspace(0, 1, 4000) * (limit.times[-1] * log + 60)

        def weights(state):
            return jnp.concatenate([x.materialize().ravel() for x in state.params])

        w = gradient_flow(
            flows.attention_loss, start, *task, t1=ts[-1], ts=ts, observe=weights
        ).observed
        return first_times(ts, jnp.abs(w[:, order]), 0.01 * jnp.abs(ends[order])), w[-1]

    found = [wakes(log) for log in logs]
    slopes = (found[1][0] - found[0][0]) / (logs[1] - logs[0])
    np.testing.assert_allclose(jnp.sort(slopes), limit.times, rtol=1e-5)
    assert_close(found[1][1], ends, rtol=1e-3)


@pytest.mark.slow
def test_a_layer_of_attention_gains_a_rank_at_a_time():
    """Full factors; the first stage at ``ln(1/α)/σ₁`` of the gradient at zero."""
    key, d = jr.key(5), 4
    u, v = (jnp.linalg.qr(jr.normal(jr.fold_in(key, k), (d, d)))[0] for k in (0, 1))
    teacher = flows.Attention(
        LowRank(1.5 * u[:, :1], v[:, :1]),
        LowRank(v[:, :2] * jnp.array([[2.0, 1.0]]), u[:, 2:]),
    )
    task = flows.attention_task(teacher, examples=64, length=4, key=key)
    none = jax.tree.map(jnp.zeros_like, teacher)
    slope = jax.grad(
        lambda w: flows.attention_loss(
            flows.Attention(none.key_query, LowRank(w, jnp.eye(d))), *task
        )
    )(jnp.zeros((d, d)))
    growth = metrics.singular_values(slope)[0]

    @jax.jit
    def run(log):
        start = flows.Attention(
            *(lowrank.gaussian_init((d, d), d, 1.0, key=jr.fold_in(key, k)) for k in (2, 3))
        )
        start = jax.tree.map(lambda x: x * jnp.exp(-log), start)
        ts = jnp.linspace(0, 1, 3000) * 6 * log / growth

        def values(state):
            both = [metrics.singular_values(x) for x in state.params]
            return jnp.concatenate(both)

        return ts, gradient_flow(
            flows.attention_loss, start, *task, t1=ts[-1], ts=ts, observe=values
        ).observed

    ts, few = run(jnp.array(12.0))
    more_ts, many = run(jnp.array(18.0))
    wake = lambda ts, values: first_times(ts, values, jnp.full(2 * d, 0.1))
    early, late = wake(ts, few), wake(more_ts, many)
    np.testing.assert_allclose((jnp.min(late) - jnp.min(early)) / 6, 1 / growth, rtol=1e-3)
    stages = jnp.sort(late[jnp.isfinite(late)]) / 18
    assert len(stages) >= 3
    assert jnp.min(jnp.diff(stages)) > 0.1 / growth  # no two at once

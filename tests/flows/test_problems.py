import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import LowRank, flows, gradient_flow, lowrank, metrics

from ..helpers import assert_close, random_low_rank


@pytest.mark.slow
@pytest.mark.parametrize("aligned", [True, False])
def test_task_is_what_it_says(aligned):
    values, change = jnp.array([3.0, 2.0, 1.0]), jnp.array([0.5, 0.25])
    task = flows.lora_task(values, change, shape=(6, 5), aligned=aligned, key=jr.key(0))
    before = task.base.second @ task.base.first
    assert_close(metrics.singular_values(before)[:3], values)
    assert_close(metrics.singular_values(task.change)[:2], change, condition=10)
    assert_close(task.target, before + task.change)
    gram = task.base.second.T @ task.base.second
    assert_close(gram, task.base.first @ task.base.first.T)  # balanced
    u = jnp.linalg.svd(before)[0][:, :2]
    top = jnp.linalg.svd(task.change)[0][:, :2]
    distance = metrics.misalignment(u, top)
    assert distance < 1e-20 if aligned else distance > 0.1
    with pytest.raises(ValueError, match="both sides"):
        flows.lora_task(values, change, shape=(2, 5), aligned=aligned, key=jr.key(0))


@pytest.mark.slow
def test_two_layer_gradients_are_those_of_the_derivation():
    sizes, key = {"shape": (6, 5), "aligned": False}, jr.key(1)
    task = flows.lora_task(jnp.ones(3), jnp.ones(1), **sizes, key=key)
    first = random_low_rank(jr.key(2), 3, 5, 2, dtype=jnp.float64)
    second = random_low_rank(jr.key(3), 6, 3, 2, dtype=jnp.float64)
    adapters = flows.TwoLayers(first, second)
    w1 = task.base.first + first.materialize()
    w2 = task.base.second + second.materialize()
    e = task.target - w2 @ w1
    got = jax.grad(flows.two_layer_loss)(adapters, task.base, task.target)
    assert_close(-got.first.left, w2.T @ e @ first.right)
    assert_close(-got.first.right, e.T @ w2 @ first.left)
    assert_close(-got.second.left, e @ w1.T @ second.right)
    assert_close(-got.second.right, w1 @ e.T @ second.left)
    one = flows.TwoLayers(first, None)
    got = jax.grad(flows.two_layer_loss)(one, task.base, task.target)
    e = task.target - task.base.second @ w1
    assert_close(-got.first.left, task.base.second.T @ e @ first.right)


@pytest.mark.slow
def test_adapters_of_two_layers_reach_the_tail_of_the_spectrum_and_no_more():
    # Zeng and Lee: with rank r on both of two layers the best error is the tail from 2r.
    change = jnp.array([2.0, 1.5, 1.0])
    task = flows.lora_task(jnp.ones(5), change, shape=(5, 5), aligned=True, key=jr.key(0))
    start = flows.TwoLayers(
        lowrank.gaussian_init((5, 5), 1, 0.3, key=jr.key(1)),
        lowrank.gaussian_init((5, 5), 1, 0.3, key=jr.key(2)),
    )
    end = gradient_flow(
        flows.two_layer_loss, start, task.base, task.target, t1=60.0, rtol=1e-7
    ).params
    floor = 0.5 * jnp.sum(jnp.linalg.svd(task.change)[1][2:] ** 2)
    final = flows.two_layer_loss(end, task.base, task.target)
    assert final >= floor - 1e-9
    assert final <= floor + 1e-2


@pytest.mark.slow
def test_every_start_reaches_the_same_loss_in_the_kernel_regime():
    # r(r + 1)/2 = 6 > 4 numbers to fit: no spurious local minimum.
    m, n, r, k = 5, 4, 3, 4
    jacobian = jr.normal(jr.key(0), (k, m, n))
    residual = jr.normal(jr.key(1), (k,))
    weight = 0.5

    def end(key):
        start = lowrank.gaussian_init((m, n), r, 0.5, key=key)
        x = gradient_flow(
            flows.linearized_loss, start, jacobian, residual, weight, t1=300.0, rtol=1e-7
        ).params
        # Weight decay removes the imbalance, and the loss is then the nuclear norm problem.
        nuclear = jnp.sum(metrics.singular_values(x))
        return flows.linearized_loss(x, jacobian, residual, weight), nuclear, x

    losses, nuclear, x = jax.jit(jax.vmap(end))(jr.split(jr.key(2), 6))
    assert jnp.min(nuclear) > 0.1  # not the trivial solution
    assert jnp.ptp(losses) <= 1e-4 * losses[0]
    squares = jnp.sum(x.left**2, (1, 2)) + jnp.sum(x.right**2, (1, 2))
    assert_close(squares / 2, nuclear, rtol=1e-5)


def test_deep_loss_of_two_layers_is_the_approximation_loss():
    x = random_low_rank(jr.key(0), 6, 5, 2, dtype=jnp.float64)
    target = jr.normal(jr.key(1), (6, 5))
    assert_close(
        flows.deep_linear_loss([x.right.T, x.left], target),
        flows.approximation_loss(x, target),
    )


@pytest.mark.slow
def test_inits():
    key, shape = jr.key(0), (6, 5)
    standard = lowrank.lora_init(shape, 2, key=key)
    assert jnp.all(standard.left == 0)
    assert jnp.max(jnp.abs(standard.right)) <= 5**-0.5
    orthogonal = lowrank.orthogonal_init(shape, 4, key=key)
    assert jnp.max(jnp.abs(orthogonal.materialize())) < 1e-15
    assert jnp.min(jnp.linalg.norm(orthogonal.left, axis=0)) > 0
    with pytest.raises(ValueError, match="even"):
        lowrank.orthogonal_init(shape, 3, key=key)
    balanced = lowrank.balanced_init(shape, jnp.array([2.0, 0.5]), key=key)
    assert_close(metrics.singular_values(balanced), jnp.array([2.0, 0.5]))
    assert jnp.max(jnp.abs(metrics.imbalance(balanced))) < 1e-14
    assert jnp.abs((balanced.left.T @ balanced.left)[0, 1]) > 1e-3
    matrix = jr.normal(key, shape)
    best = lowrank.svd_init(matrix, 2)
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    assert_close(best.materialize(), (u[:, :2] * s[None, :2]) @ vt[:2], condition=10)
    directions = lowrank.svd_init(matrix, 2, scale=1e-3, power=0.0)
    assert_close(directions.left.T @ directions.left, 1e-6 * jnp.eye(2), condition=10)
    small = lowrank.gaussian_init((300, 200), 4, 1e-2, key=key)
    assert np.std(small.left) == pytest.approx(1e-2, rel=0.1)


@pytest.mark.slow
def test_a_spectral_start_at_the_best_approximation_does_not_move():
    matrix = jr.normal(jr.key(4), (6, 5))
    start = lowrank.svd_init(matrix, 2)
    end = gradient_flow(flows.approximation_loss, start, matrix, t1=1.0).params
    assert_close(end, start, rtol=1e-9)


@pytest.mark.slow
def test_a_lora_left_factor_stays_in_the_space_of_the_first_gradient():
    # With left = 0 and a target of rank 2 the left factor never leaves its range.
    u = jnp.linalg.qr(jr.normal(jr.key(5), (7, 2)))[0]
    target = u @ jr.normal(jr.key(6), (2, 6))
    start = lowrank.lora_init((7, 6), 3, key=jr.key(7))
    end = gradient_flow(flows.approximation_loss, start, target, t1=3.0).params
    outside = end.left - u @ (u.T @ end.left)
    assert jnp.linalg.norm(outside) <= 1e-14
    assert jnp.linalg.norm(end.left) > 0.1


@pytest.mark.slow
def test_gauge_of_scale_and_learning_rates():
    # The run with (s, cA·A, cB·B) is the one with scale s·cA·cB and rates cA², cB².
    target = jr.normal(jr.key(8), (6, 5))
    x = LowRank(jr.normal(jr.key(9), (6, 2)), jr.normal(jr.key(10), (5, 2)))
    left, right, scale = 3.0, 0.5, 0.7
    plain = gradient_flow(
        flows.approximation_loss, x, target, scale * left * right, t1=1.0, rtol=1e-10
    ).params
    gauged = gradient_flow(
        flows.approximation_loss,
        LowRank(left * x.left, right * x.right),
        target,
        scale,
        t1=1.0,
        rtol=1e-10,
        precondition=lrjax.scale_factors(left=left**2, right=right**2),
    ).params
    assert_close(gauged.materialize(), left * right * plain.materialize(), rtol=1e-8)

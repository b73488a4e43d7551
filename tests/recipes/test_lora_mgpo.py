"""Gradients from ahead along the momentum, against dense matrices and through adapters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax.transforms import perturbed_params
from tests.helpers import all_finite, assert_close, random_low_rank, split_factors
from tests.reference.dense import Adam
from tests.reference.factor_pairs import MomentumAhead


def target_loss(node, target):
    """Of a weight that bends, so that the gradient depends on where it is taken."""
    return jnp.sum(jnp.cosh(node.materialize() - target))


@jax.jit
def trained(x, targets, rate, radius, smoothing, scale):
    """The factors after every step, each with its own target."""
    tx = lrjax.lora_mgpo(rate, radius, smoothing=smoothing, scale=scale)

    def step(carry, target):
        x, state = carry

        def loss(x):
            node = perturbed_params(x, state)
            return target_loss(lrjax.LowRank(scale * node.left, node.right), target)

        updates, state = tx.update(jax.grad(loss)(x), state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    return jax.lax.scan(step, (x, tx.init(x)), targets)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("radius", "smoothing", "scale"), [(0.05, 0.9, 1.0), (0.4, 0.5, 2.0), (3.0, 0.5, 0.5)]
)
def test_equals_the_dense_formula(radius, smoothing, scale, getkey, x64):
    x = random_low_rank(getkey(), 7, 5, 2, dtype=jnp.float64)
    x = lrjax.LowRank(0.3 * x.left, 0.3 * x.right)
    # Gradients that become small on the way: κ meets its largest value.
    sizes = jnp.where(jnp.arange(12) < 6, 1.0, 1e-3)[:, None, None]
    around = (scale * x.materialize())[None]
    targets = around + sizes * jr.normal(getkey(), (12, 7, 5), jnp.float64)
    path = trained(x, targets, 1e-2, radius, smoothing, scale)

    b, a = np.asarray(x.left), np.asarray(x.right.T)
    ahead = MomentumAhead(radius, smoothing, 10.0, scale)
    adam_b, adam_a = (Adam(0.9, 0.999, 1e-8) for _ in "ba")
    for t, target in enumerate(np.asarray(targets)):
        m_b, m_a = adam_b.m + np.zeros_like(b), adam_a.m + np.zeros_like(a)
        point = scale * b @ a + ahead.perturbation(b, a, m_b, m_a)
        full = np.sinh(point - target)
        g_b, g_a = scale * full @ a.T, scale * b.T @ full
        ahead.see(b, a, g_b, g_a)
        b, a = b - 1e-2 * adam_b.step(g_b), a - 1e-2 * adam_a.step(g_a)
        assert_close(path.left[t], b, rtol=1e-9)
        assert_close(path.right[t], a.T, rtol=1e-9)


def test_the_point_is_ahead_and_not_back(getkey):
    """The loss is taken where the next step leads: after a step along the gradient."""
    x, target = random_low_rank(getkey(), 6, 5, 2), jr.normal(getkey(), (6, 5))
    loss = lambda x: jnp.sum((x.materialize() - target) ** 2)
    tx = lrjax.lora_mgpo(1e-3, 1e-2)
    _, state = tx.update(jax.grad(loss)(x), tx.init(x), x)
    assert loss(perturbed_params(x, state)) < loss(x)


def test_without_a_radius_it_is_adam_and_the_first_step_always_is(getkey):
    x, g = random_low_rank(getkey(), 6, 5, 2), random_low_rank(getkey(), 6, 5, 2)
    for radius in (0.0, 0.05):
        tx = lrjax.lora_mgpo(0.1, radius)
        state = tx.init(x)
        assert_close(perturbed_params(x, state).materialize(), x.materialize(), rtol=1e-6)
        step, state = tx.update(g, state, x)
        assert_close(step, optax.adam(0.1).update(g, optax.adam(0.1).init(x))[0])
        moved = perturbed_params(x, state).materialize() - x.materialize()
        assert (jnp.linalg.norm(moved) > 1e-3) == (radius > 0)


@pytest.mark.slow
def test_the_perturbation_has_the_size_that_is_asked_for(getkey):
    """Each matrix of a stack by itself; at large gradients ``κ = 1/ḡ``, never above 10."""
    x, g = (random_low_rank(getkey(), 6, 5, 2, batch=(2,)) for _ in range(2))
    tx = lrjax.perturb_along_momentum(optax.sgd(0.0, momentum=0.9), 0.5, scale=2.0)
    small = lrjax.LowRank(g.left.at[1].multiply(1e-6), g.right.at[1].multiply(1e-6))
    _, state = tx.update(small, tx.init(x), x)
    moved = perturbed_params(x, state).materialize() - x.materialize()
    full = 2 * (g.left @ x.right.mT + x.left @ g.right.mT)
    kappa = jnp.minimum(10, 1 / jnp.linalg.norm(full[0]))
    want = jnp.stack([0.5 * kappa, jnp.array(5.0)]) / 2
    assert_close(jnp.linalg.norm(moved, axis=(-2, -1)), want, condition=100)
    assert perturbed_params(x, state).rank == 6


@pytest.mark.slow
def test_it_is_bound_through_adapters(getkey):
    """The gradient of the bound model is that at the perturbed weight, by the pair."""
    model = eqx.nn.Linear(5, 4, use_bias=False, key=getkey())
    adapters = lrjax.adapt(
        model, lrjax.LoRA(rank=2, alpha=6.0, init="orthogonal"), key=getkey()
    )
    params, frozen = lrjax.partition(adapters)
    tx = lrjax.lora_mgpo(0.0, 0.5, scale=3.0)
    x, y = jr.normal(getkey(), (8, 5)), jr.normal(getkey(), (8, 4))

    @jax.jit
    def grads_at(params, state):
        def loss(params):
            ahead = eqx.combine(perturbed_params(params, state), frozen)
            bound = lrjax.bind(model, ahead)
            return jnp.mean((jax.vmap(bound)(x) - y) ** 2)

        return jax.grad(loss)(params)

    _, state = tx.update(grads_at(params, tx.init(params)), tx.init(params), params)
    (path,) = params.layers
    got, pair = grads_at(params, state)[path].pair, params[path].pair

    def dense(pair):
        shift = perturbed_params(params, state)[path].pair.materialize()
        weight = model.weight + 3 * pair.materialize()
        weight += jax.lax.stop_gradient(3 * (shift - params[path].pair.materialize()))
        return jnp.mean((x @ weight.T - y) ** 2)

    assert_close(got, jax.grad(dense)(pair), condition=1e3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_with_a_frozen_factor_the_other_one_is_moved(side, getkey):
    """Along ``M_l rightᵀ``, or ``left M_rᵀ``, by the same length."""
    x, g = random_low_rank(getkey(), 6, 5, 2), random_low_rank(getkey(), 6, 5, 2)
    (params, frozen), (half, _) = split_factors(x, side), split_factors(g, side)
    tx = lrjax.lora_mgpo(0.1, 0.5)
    _, state = tx.update(half, tx.init(params), params, frozen=frozen)
    ahead = perturbed_params(params, state, frozen=frozen)
    assert jax.tree.structure(ahead) == jax.tree.structure(params)
    moved = eqx.combine(ahead, frozen).materialize() - x.materialize()
    one_sided = g.left @ x.right.T if side == "left" else x.left @ g.right.T
    size = jnp.linalg.norm(one_sided)
    assert_close(moved, -0.5 * min(10, 1 / size) * one_sided / size, condition=1e3)
    slope = jax.grad(lambda p: jnp.sum(perturbed_params(p, state, frozen=frozen).left))
    if side == "left":
        assert_close(slope(params).left, jnp.ones_like(x.left))


@pytest.mark.slow_but("float32")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_left_factor_of_zero_gives_finite_numbers(dtype, getkey):
    x = random_low_rank(getkey(), 6, 5, 2, dtype=dtype)
    x = lrjax.LowRank(0 * x.left, x.right)
    g = lrjax.LowRank(jnp.ones_like(x.left), jnp.zeros_like(x.right))
    tx = lrjax.lora_mgpo(0.1)
    state = tx.init(x)
    for grad in (jax.tree.map(jnp.zeros_like, x), g, g):
        assert all_finite(perturbed_params(x, state))
        step, state = tx.update(grad, state, x)
        x = optax.apply_updates(x, step)
        assert all_finite((x, state))


def test_what_is_missing_is_said(getkey):
    x = random_low_rank(getkey(), 6, 5, 2)
    with pytest.raises(ValueError, match=r"keeps none of a LowRank node.*optax\.adam"):
        lrjax.perturb_along_momentum(optax.sgd(0.1)).init(x)
    with pytest.raises(ValueError, match="a state with 0 of them: ScaleByAdamState"):
        perturbed_params(x, optax.adam(0.1).init(x))

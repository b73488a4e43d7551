"""Optimizers of LoRA pairs: their special cases, and what they do to the product."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from tests.helpers import assert_close, random_low_rank, relative_error
from tests.reference import factor_pairs as ref


def losses(key):
    """A loss of a pair, and a generic start."""
    truth = random_low_rank(key, 7, 5, 2, dtype=jnp.float64).materialize()
    start = random_low_rank(jr.fold_in(key, 1), 7, 5, 2, dtype=jnp.float64)
    return (lambda x: jnp.sum((x.materialize() - truth) ** 2) / 2), start


def trained(tx, loss, x, steps=20):
    """The parameters after each step."""

    def body(carry, _):
        x, state = carry
        updates, state = tx.update(jax.grad(loss)(x), state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    return jax.jit(lambda x: jax.lax.scan(body, (x, tx.init(x)), length=steps)[1])(x)


def test_lora_plus_of_equal_rates_is_adam(getkey, x64):
    loss, x = losses(getkey())
    got = trained(lrjax.lora_plus(0.1, ratio=1.0), loss, x)
    assert_close(got, trained(optax.adam(0.1), loss, x), condition=1e3)


def test_the_ratio_of_lora_plus_is_a_scale_and_a_start(getkey, x64):
    """``s left rightᵀ`` from ``left = 0`` under Adam, whose steps know no scale.

    With ``right`` c times as large, ``s`` over ``c²`` and the rate times c both factors are
    c times what they were, and the weight is the same; so is it with left alone.
    """
    loss, x = losses(getkey())
    x = lrjax.LowRank(jnp.zeros_like(x.left), x.right)
    got = trained(lrjax.lora_plus(0.01, ratio=4.0, eps=0.0), loss, x)
    # Left is a quarter of what it was, and the product four times that.
    of_scale = lambda x: loss(lrjax.LowRank(4 * x.left, x.right))
    want = trained(lrjax.lora_plus(0.01, ratio=1.0, eps=0.0), of_scale, x)
    assert_close(got.left, 4 * want.left, condition=1e3)
    assert_close(got.right, want.right, condition=1e3)


def test_scaled_adamw_with_a_huge_damping_is_adamw(getkey, x64):
    """The preconditioner is then a number, which Adam without eps divides out."""
    loss, x = losses(getkey())
    numbers = {"b1": 0.7, "b2": 0.8, "eps": 0.0, "weight_decay": 0.1}
    got = trained(lrjax.scaled_adamw(0.1, damping=1e9, **numbers), loss, x)
    assert_close(got, trained(optax.adamw(0.1, **numbers), loss, x), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_adam_without_eps_leaves_what_never_had_a_gradient(dtype):
    """0/0 = 0, while all that had one moves by the rate; NaN stays NaN."""
    x = lrjax.LowRank(jnp.ones((2, 1), dtype), jnp.ones((2, 1), dtype))
    g = lrjax.LowRank(jnp.array([[0.0], [3.0]], dtype), jnp.array([[jnp.nan], [-2]], dtype))
    tx = lrjax.lora_plus(0.5, ratio=2.0, eps=0.0)
    step, _ = tx.update(g, tx.init(x), x)
    close = {"rtol": 4 * 2**-8 if dtype == jnp.bfloat16 else 1e-4}
    np.testing.assert_allclose(np.asarray(step.left, float), [[0.0], [-1.0]], **close)
    np.testing.assert_allclose(np.asarray(step.right, float), [[np.nan], [0.5]], **close)


@pytest.mark.slow
def test_lora_pro_moves_the_weight_along_the_projected_gradient(getkey, x64):
    """As its paper's factors do, which are the shortest that can."""
    scale = 1.5
    x = random_low_rank(getkey(), 7, 5, 2, dtype=jnp.float64)
    full = np.asarray(jr.normal(getkey(), (7, 5), jnp.float64))
    left, right = pair = np.asarray(x.left), np.asarray(x.right)
    slopes = scale * full @ right, scale * full.T @ left
    tx = lrjax.lora_pro(1.0, scale=scale, momentum=0.0)
    step, _ = tx.update(lrjax.LowRank(*map(jnp.asarray, slopes)), tx.init(x), x)
    onto_left, onto_right = ref.projections(left, right)
    want = onto_left @ full + full @ onto_right - onto_left @ full @ onto_right
    moved = lambda a, b: scale * (a @ right.T + left @ b.T)
    ours = -np.asarray(step.left), -np.asarray(step.right)
    published = ref.least_along_tangent(pair, slopes, scale)
    assert relative_error(moved(*ours), want) < 1e-10
    assert relative_error(moved(*published), want) < 1e-10
    length = lambda steps: sum(np.sum(p**2) for p in steps)
    assert length(published) <= length(ours) * (1 + 1e-9)


def test_lora_pro_is_the_published_adam_where_that_does_not_adapt(getkey, x64):
    """Momentum of a constant gradient at one place, and eps above all second moments."""
    x = random_low_rank(getkey(), 7, 5, 2, dtype=jnp.float64)
    full = np.asarray(jr.normal(getkey(), (7, 5), jnp.float64))
    left, right = pair = np.asarray(x.left), np.asarray(x.right)
    slopes = full @ right, full.T @ left
    eps = 1e12
    adam = ref.FullSizeAdam(0.9, 0.999, eps, scale=1.0)
    tx = lrjax.lora_pro(1.0, momentum=0.9)
    state, grads = tx.init(x), lrjax.LowRank(*map(jnp.asarray, slopes))
    moved = lambda a, b: a @ right.T + left @ b.T
    for t in range(3):
        step, state = tx.update(grads, state, x)
        # Ours is a sum over the steps, theirs a mean of which the bias is corrected.
        age = sum(0.9**k for k in range(t + 1))
        ours = -moved(np.asarray(step.left), np.asarray(step.right)) / age
        published = eps * moved(*adam.step(pair, slopes))
        assert relative_error(ours, published) < 1e-10


def test_alt_lora_without_momentum_is_alternating_scaled_descent(getkey, x64):
    loss, x = losses(getkey())
    got = trained(lrjax.alt_lora(0.7, b1=0.0), loss, x)
    assert_close(
        got, trained(lrjax.scaled_gd(0.7, order="alternating"), loss, x), rtol=1e-9
    )


def test_alt_lora_plus_with_an_eps_above_all_gradients_is_alt_lora(getkey, x64):
    loss, x = losses(getkey())
    got = trained(lrjax.alt_lora_plus(0.7e12, b1=0.0, eps=1e12), loss, x)
    assert_close(got, trained(lrjax.alt_lora(0.7, b1=0.0), loss, x), rtol=1e-6)


def test_the_first_step_of_lora_rite_is_a_long_one_of_lora_muon(getkey, x64):
    loss, x = losses(getkey())
    step = lambda tx: jax.jit(lambda x: tx.update(jax.grad(loss)(x), tx.init(x), x)[0])(x)
    got = step(lrjax.lora_rite(0.1, eps=0.0))
    half = step(lrjax.lora_muon(0.1, damping=0.0, momentum=0.0))
    assert_close(got.left, 2 * 7**0.5 * half.left, rtol=1e-6)
    assert_close(got.right, 2 * 5**0.5 * half.right, rtol=1e-6)


def test_a_factor_that_rests_keeps_its_moments_and_is_not_decayed(getkey, x64):
    loss, x = losses(getkey())
    tx = lrjax.scaled_adamw(0.1, order="alternating", weight_decay=0.5)
    path = trained(tx, loss, x, steps=4)
    assert_close(path.right[0], x.right)
    assert_close(path.left[1], path.left[0])
    assert_close(path.right[2], path.right[1])
    assert relative_error(path.left[2], path.left[1]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scaled_adamw", "alt_lora", "alt_lora_plus", "lora_rite"])
def test_a_mask_of_decay_reaches_into_pairs(name):
    """A tree of bools for all parameters holds for each part that is treated apart."""
    pair = lambda: lrjax.LowRank(jnp.ones((4, 2)), jnp.ones((3, 2)))
    params = {"on": pair(), "off": pair(), "kept": jnp.ones((3, 3)), "bias": jnp.ones(3)}
    chosen = lambda path, _: path[0].key in ("on", "bias")
    mask = jax.tree_util.tree_map_with_path(chosen, params)
    tx = getattr(lrjax, name)(0.1, weight_decay=0.5, mask=mask)
    state = tx.init(params)
    still = jax.tree.map(jnp.zeros_like, params)
    first, state = tx.update(still, state, params)
    second, _ = tx.update(still, state, params)
    for step in (first, second):
        assert not any(x.any() for x in jax.tree.leaves((step["off"], step["kept"])))
        assert_close(step["bias"], jnp.full(3, -0.05))
    # One factor after the other, or both.
    moved = jax.tree.map(lambda a, b: jnp.minimum(a, b), first["on"], second["on"])
    assert_close(moved, jax.tree.map(lambda x: -0.05 * x, params["on"]))

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax.lowrank import edit_weight
from tests.reference.least_squares import least_change


M, N = 5, 8


def problem(key, count, dtype=None):
    """A weight, keys and values, and the second moment of inputs of condition 100."""
    a, b, c, d = jr.split(key, 4)
    inputs = jr.normal(a, (50, N), dtype) * jnp.logspace(0, -1, N, dtype=dtype)[None]
    draw = lambda key, *shape: jr.normal(key, shape, dtype)
    return draw(b, M, N), draw(c, count, N), draw(d, count, M), inputs.T @ inputs / 50


@pytest.mark.slow
def test_one_key_has_the_closed_form(getkey, x64):
    weight, key, value, moment = problem(getkey(), 1)
    change = edit_weight(weight, key, value, moment)
    k, v = np.asarray(key)[0], np.asarray(value)[0]
    solved = np.linalg.solve(moment, k)
    want = np.outer(v - weight @ k, solved) / (k @ solved)
    np.testing.assert_allclose(change.materialize(), want, rtol=1e-9, atol=1e-11)
    assert change.rank == 1


@pytest.mark.slow_but("1", "3")
@pytest.mark.parametrize("count", [1, 3, N])
def test_keys_are_met_by_the_least_change(getkey, x64, count):
    """By the solution of the Lagrange equations."""
    weight, keys, values, moment = problem(getkey(), count)
    change = edit_weight(weight, keys, values, moment).materialize()
    scale = np.linalg.cond(keys) * 100  # of the whitened keys
    np.testing.assert_allclose(keys @ (weight + change).T, values, atol=1e-12 * scale)
    want = least_change(*map(np.asarray, (weight, keys, values, moment)))
    np.testing.assert_allclose(change, want, atol=1e-11 * scale * np.abs(want).max())


@pytest.mark.slow
def test_with_a_ridge_many_are_a_joint_least_squares(getkey, x64):
    """The gradient of ``λ tr(Δ C Δᵀ) + ‖(W + Δ) Kᵀ − Vᵀ‖²`` vanishes."""
    weight, keys, values, moment = problem(getkey(), 30)

    def objective(change, ridge):
        missed = keys @ (weight + change).T - values
        return ridge * jnp.sum(change @ moment * change) + jnp.sum(missed**2)

    for ridge in (0.1, 10.0):
        change = edit_weight(weight, keys, values, moment, ridge=ridge).materialize()
        slope = jax.grad(objective)(change, ridge)
        start = jax.grad(objective)(jnp.zeros_like(change), ridge)
        assert jnp.abs(slope).max() < 1e-10 * jnp.abs(start).max()
    plain = edit_weight(weight, keys, values, moment).materialize()
    want = jnp.linalg.lstsq(keys, values)[0].T - weight
    np.testing.assert_allclose(plain, want, atol=1e-10)


def test_a_key_that_is_said_twice_has_the_mean_of_its_values(getkey, x64):
    weight, keys, values, moment = problem(getkey(), 2)
    both = edit_weight(weight, jnp.stack([keys[0], keys[0]]), values, moment)
    once = edit_weight(weight, keys[:1], values.mean(0, keepdims=True), moment)
    np.testing.assert_allclose(both.materialize(), once.materialize(), atol=1e-9)


@pytest.mark.slow
def test_directions_that_no_input_has_are_free(getkey):
    """Outputs of the inputs so far stay, although the keys share directions with them."""
    weight, keys, values, _ = problem(getkey(), 2, jnp.float32)
    inputs = jr.normal(getkey(), (20, N)).at[:, 3:].set(0)
    change = edit_weight(weight, keys, values, inputs.T @ inputs).materialize()
    size = float(jnp.abs(change).max())
    np.testing.assert_allclose(keys @ (weight + change).T, values, atol=1e-3 * size)
    assert jnp.abs(inputs @ change.T).max() < 1e-2 * size


def test_without_statistics_it_is_the_least_change_of_the_weight(getkey):
    weight, keys, values, _ = problem(getkey(), 3, jnp.float32)
    change = edit_weight(weight, keys, values, jnp.zeros((N, N))).materialize()
    want = (np.linalg.pinv(keys) @ (values - keys @ weight.T)).T
    np.testing.assert_allclose(change, want, atol=1e-3 * np.abs(want).max())


def test_nothing_to_say_changes_nothing(getkey):
    weight, keys, values, moment = problem(getkey(), 2, jnp.float32)
    none = edit_weight(weight, jnp.zeros_like(keys), values, moment)
    assert np.all(none.materialize() == 0)


@pytest.mark.slow
def test_jit_and_vmap_over_weights_and_ridges(getkey):
    stack = [problem(getkey(), 2, jnp.float32) for _ in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *stack)
    ridges = jnp.array([0.0, 0.1, 1.0])
    edit = lambda ridge, *args: edit_weight(*args, ridge=ridge).materialize()
    found = jax.jit(jax.vmap(edit))(ridges, *stacked)
    for one, ridge, args in zip(found, ridges, stack, strict=True):
        want = edit(ridge, *args)
        np.testing.assert_allclose(one, want, atol=1e-3 * float(jnp.abs(want).max()))
    batch = edit_weight(*stacked).materialize()
    np.testing.assert_allclose(batch[0], found[0], atol=1e-3 * float(jnp.abs(batch).max()))


@pytest.mark.slow
def test_half_precision_is_computed_in_single(getkey):
    args = [x.astype(jnp.bfloat16) for x in problem(getkey(), 1, jnp.float32)]
    change = edit_weight(*args)
    assert change.dtype == jnp.float32
    weight, key, value, _ = (x.astype(jnp.float32) for x in args)
    met = key @ (weight + change.materialize()).T
    np.testing.assert_allclose(met, value, atol=1e-4 * float(1 + jnp.abs(value).max()))


def test_the_edit_is_an_adapter(getkey):
    model = eqx.nn.Linear(N, M, use_bias=False, key=getkey())
    _, keys, values, moment = problem(getkey(), 2, jnp.float32)
    change = edit_weight(model.weight, keys, values, moment)
    adapters = lrjax.adapt(model, lrjax.LoRA(2, alpha=2), key=getkey())
    adapters = eqx.tree_at(lambda a: a[""].pair, adapters, change)
    edited = lrjax.bind(model, adapters)
    size = float(jnp.abs(change.materialize()).max())
    np.testing.assert_allclose(jax.vmap(edited)(keys), values, atol=1e-3 * (1 + size))


def test_refuses():
    weight, keys, values, moment = (
        jnp.eye(2),
        jnp.ones((1, 2)),
        jnp.ones((1, 2)),
        jnp.eye(2),
    )
    with pytest.raises(ValueError, match=r"needs keys of shape \(1, 2\), got \(1, 3\)"):
        edit_weight(weight, jnp.ones((1, 3)), values, moment)
    with pytest.raises(ValueError, match=r"needs values of shape \(1, 2\), got \(2, 2\)"):
        edit_weight(weight, keys, jnp.ones((2, 2)), moment)
    with pytest.raises(ValueError, match=r"second_moment of shape \(2, 2\), got \(3, 3\)"):
        edit_weight(weight, keys, values, jnp.eye(3))

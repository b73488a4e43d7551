"""The transforms of a few lines: each against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrjax
from tests.helpers import assert_close, random_low_rank


def test_polyak_zeroes_the_linear_model(getkey, x64):
    x = random_low_rank(getkey(), 9, 7, 3, dtype=jnp.float64)
    g = random_low_rank(getkey(), 9, 7, 3, dtype=jnp.float64)
    tx = optax.chain(lrjax.scale_by_gram(0.1), lrjax.scale_by_polyak(2.0))
    value = jnp.array(5.0, jnp.float64)
    step, _ = tx.update(g, tx.init(x), x, value=value, grad=g)
    model = value - jnp.sum(g.left * step.left) - jnp.sum(g.right * step.right)
    np.testing.assert_allclose(model, 2.0, rtol=1e-12)
    step, _ = tx.update(g, tx.init(x), x, value=value, grad=g, f_min=4.0)
    model = value - jnp.sum(g.left * step.left) - jnp.sum(g.right * step.right)
    np.testing.assert_allclose(model, 4.0, rtol=1e-12)


def test_polyak_without_a_preconditioner_is_optax(getkey):
    grad = {"w": jnp.array([3.0, -4.0]), "b": jnp.array(1.0)}
    ours, theirs = (
        lrjax.scale_by_polyak(1.0),
        optax.scale_by_polyak(f_min=1.0, max_learning_rate=9.0),
    )
    value = jnp.array(6.0)
    got, _ = ours.update(grad, ours.init(grad), value=value, grad=grad)
    want, _ = theirs.update(grad, theirs.init(grad), grad, value=value)
    assert_close(got, want)


def test_polyak_makes_no_step_below_the_minimum_or_uphill():
    grad = jnp.array([1.0, 2.0])
    tx = lrjax.scale_by_polyak(3.0)
    for value, direction in ((2.0, grad), (5.0, -grad), (5.0, 0 * grad)):
        step, _ = tx.update(direction, tx.init(grad), value=jnp.array(value), grad=grad)
        assert not step.any()


@pytest.mark.slow
def test_nuclear_norm_is_the_gradient_of_the_squared_factors(getkey):
    x = random_low_rank(getkey(), 5, 4, 2)
    penalty = lambda x: 0.3 * 0.5 * (jnp.sum(x.left**2) + jnp.sum(x.right**2))
    tx = lrjax.add_nuclear_norm(0.3)
    zero = jax.tree.map(jnp.zeros_like, x)
    got, _ = tx.update(zero, tx.init(x), x)
    assert_close(got, jax.grad(penalty)(x))
    singular = np.linalg.svd(np.asarray(x.materialize()), compute_uv=False)
    assert penalty(x) >= 0.3 * singular.sum() - 1e-5
    np.testing.assert_allclose(penalty(lrjax.balance(x)), 0.3 * singular.sum(), rtol=1e-5)


def test_scale_factors_gives_each_factor_its_rate(getkey):
    g = {"w": random_low_rank(getkey(), 5, 4, 2), "b": jnp.ones(3)}
    tx = lrjax.scale_factors(left=16.0, right=0.0)
    got, _ = tx.update(g, tx.init(g))
    assert_close(got["w"].left, 16 * g["w"].left)
    assert not got["w"].right.any()
    assert_close(got["b"], g["b"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["balanced", "nearest"])
def test_a_product_of_zero_is_left_in_factors_that_learn(mode, getkey):
    """A rate that begins at zero must not take the gradient from LoRA's start for ever."""
    x = random_low_rank(getkey(), 8, 5, 2, batch=(2,))
    x = lrjax.LowRank(x.left.at[0].set(0), x.right)
    still = jax.tree.map(jnp.zeros_like, x)
    tx = lrjax.rebalance(mode)
    step, _ = tx.update(still, tx.init(x), x)
    assert not step.left[0].any()
    assert not step.right[0].any()
    moved = optax.apply_updates(x, step)
    left, right = moved.left[1], moved.right[1]
    assert_close(left.T @ left, right.T @ right, rtol=1e-4)


@pytest.mark.slow
def test_rebalance_keeps_the_product_and_balances(getkey):
    x = random_low_rank(getkey(), 5, 4, 2)
    u = random_low_rank(getkey(), 5, 4, 2)
    tx = lrjax.rebalance()
    got = optax.apply_updates(x, tx.update(u, tx.init(x), x)[0])
    plain = optax.apply_updates(x, u)
    assert_close(got.materialize(), plain.materialize(), condition=10)
    assert_close(got.left.T @ got.left, got.right.T @ got.right, condition=10)


def test_on_pairs_equals_the_node(getkey):
    """PEFT's names and layout in a dict give the step of the LowRank node."""
    x, g = random_low_rank(getkey(), 6, 4, 2), random_low_rank(getkey(), 6, 4, 2)
    tree = lambda n: {"layer": {"lora_A": n.right.T, "lora_B": n.left}, "bias": jnp.ones(3)}
    rule = lrjax.pairs_by_name(left="lora_B", right="lora_A")
    inner = optax.chain(
        lrjax.scale_by_gram(0.1), optax.scale_by_adam(), lrjax.scale_factors(4.0)
    )
    tx = lrjax.on_pairs(inner, rule)
    params, grads = tree(x), tree(g)
    state, node_state = tx.init(params), inner.init(x)
    for _ in range(3):
        got, state = tx.update(grads, state, params)
        want, node_state = inner.update(g, node_state, x)
        assert_close(got["layer"], tree(want)["layer"], condition=100)
        params, x = optax.apply_updates(params, got), optax.apply_updates(x, want)


def test_pairs_by_name_knows_several_words(getkey):
    """The factors of adapted embeddings go by other names, and are pairs as well."""
    nodes = [random_low_rank(getkey(), 6, 4, 2) for _ in range(2)]
    x, g = ({"a": node, "b": node} for node in nodes)
    names = {"a": ("lora_A", "lora_B"), "b": ("lora_embedding_A", "lora_embedding_B")}

    def tree(pairs):
        return {
            layer: {names[layer][0]: n.right.T, names[layer][1]: n.left}
            for layer, n in pairs.items()
        }

    rights, lefts = zip(*names.values(), strict=True)
    rule = lrjax.pairs_by_name(left=lefts, right=rights)
    tx = lrjax.on_pairs(lrjax.scale_by_gram(0.1), rule)
    got, _ = tx.update(tree(g), tx.init(tree(x)), tree(x))
    inner = lrjax.scale_by_gram(0.1)
    want, _ = inner.update(g, inner.init(x), x)
    assert_close(got, tree(want), condition=100)


def test_on_pairs_regroups_the_raw_gradient(getkey):
    x, g = random_low_rank(getkey(), 6, 4, 2), random_low_rank(getkey(), 6, 4, 2)
    tree = lambda n: {"a": n.left, "b": n.right}
    rule = lrjax.pairs_by_name("a", "b", transpose_right=False)
    inner = optax.chain(lrjax.scale_by_gram(0.1), lrjax.scale_by_polyak())
    tx = lrjax.on_pairs(inner, rule)
    value = jnp.array(2.0)
    got, _ = tx.update(tree(g), tx.init(tree(x)), tree(x), value=value, grad=tree(g))
    want, _ = inner.update(g, inner.init(x), x, value=value, grad=g)
    assert_close(got, tree(want))


def test_on_pairs_on_a_flax_model():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.LoRA(5, 2, 3, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.LoRAParam)
    rule = lrjax.pairs_by_name(left="lora_a", right="lora_b")
    tx = lrjax.on_pairs(lrjax.scaled_gd(0.1), rule)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    a = np.asarray(jax.tree.leaves(params)[0])
    gram = a.T @ a
    got = np.asarray(jax.tree.leaves(updates)[1])  # x A B: B is the right factor
    np.testing.assert_allclose(
        got, -0.1 * np.linalg.pinv(gram, rcond=1e-6) @ np.ones((2, 3)), rtol=1e-3
    )


def test_on_pairs_names_what_is_wrong():
    tx = lrjax.on_pairs(lrjax.scale_by_gram(), lrjax.pairs_by_name("lora_B", "lora_A"))
    with pytest.raises(ValueError, match=r"matches none of the leaves w"):
        tx.init({"w": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"has a left factor only"):
        tx.init({"lora_B": jnp.ones((2, 2))})
    rule = lambda path: lrjax.Pair("one", "left")
    with pytest.raises(ValueError, match=r"two left factors.*is b"):
        lrjax.on_pairs(lrjax.scale_by_gram(), rule).init(
            {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
        )

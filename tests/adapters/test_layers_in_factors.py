"""Adapters on layers whose weights are in factors: those of a compressed model."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import lrjax
from tests.helpers import assert_close


WHERE = [f"layers.{i}" for i in range(3)]


@pytest.fixture(params=["pair", "svd"])
def small(request, getkey):
    model = eqx.nn.MLP(12, 10, 16, 2, key=getkey())
    return lrjax.nn.factorize(model, rank=4, form=request.param)[0]


def adapted(model, key, kind=None):
    """Adapters that change something, and a batch."""
    kind = lrjax.LoRA(2) if kind is None else kind
    adapters = lrjax.adapt(model, kind, where=WHERE, key=key)
    params, frozen = lrjax.partition(adapters)
    keys = jr.split(key, len(jax.tree.leaves(params)))
    leaves, treedef = jax.tree.flatten(params)
    moved = [x + 0.1 * jr.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return treedef.unflatten(moved), frozen, jr.normal(key, (5, 12))


@pytest.mark.parametrize("kind", [lrjax.LoRA(2), lrjax.DoRA(2)], ids=["lora", "dora"])
def test_bound_is_merged_is_the_dense_model_adapted(small, getkey, kind):
    params, frozen, x = adapted(small, getkey(), kind)
    adapters, dense = eqx.combine(params, frozen), lrjax.nn.densify(small)
    bound = jax.vmap(lrjax.bind(small, adapters))(x)
    assert_close(bound, jax.vmap(lrjax.merge(small, adapters))(x), rtol=1e-5)
    assert_close(bound, jax.vmap(lrjax.bind(dense, adapters))(x), rtol=1e-5)
    assert not jnp.allclose(bound, jax.vmap(small)(x), atol=1e-3)


def test_gradients_are_those_on_the_dense_model_and_none_reaches_the_factors(small, getkey):
    params, frozen, x = adapted(small, getkey())

    def loss(params, numbers, rest):
        adapters = eqx.combine(params, frozen)
        bound = lrjax.bind(eqx.combine(numbers, rest), adapters)
        return jnp.sum(jax.vmap(bound)(x) ** 2)

    def gradients(model):
        numbers, rest = eqx.partition(model, eqx.is_inexact_array)
        return jax.grad(loss, (0, 1))(params, numbers, rest)

    own, through = gradients(small)
    plain, _ = gradients(lrjax.nn.densify(small))
    assert_close(own, plain, rtol=1e-4)
    for layer in through.layers:
        assert all(not jnp.any(g) for g in jax.tree.leaves(layer.weight))
        assert jnp.any(layer.bias)


def test_merged_layers_are_plain(small, getkey):
    params, frozen, _ = adapted(small, getkey())
    merged = lrjax.merge(small, eqx.combine(params, frozen))
    assert jax.tree.structure(merged) == jax.tree.structure(lrjax.nn.densify(small))


def test_a_layer_in_factors_is_not_factorized_nor_quantized_again(small):
    again, report = lrjax.nn.factorize(small, rank=2)
    assert eqx.tree_equal(again, small)
    assert {row.kept_dense for row in report.layers} == {"its weight is in factors already"}
    with pytest.raises(ValueError, match="in factors already"):
        lrjax.nn.factorize(small, rank=2, where=WHERE)
    head = eqx.nn.Linear(10, 8, key=jr.key(0))
    both = lrjax.adapters.quantize([small, head], lrjax.adapters.Int8())
    assert eqx.tree_equal(both[0], small)
    assert isinstance(both[1].weight, lrjax.adapters.QuantizedArray)


def test_inputs_of_layers_in_factors_are_seen(small, getkey):
    x = jr.normal(getkey(), (2, 7, 12))
    call = lambda model, batch: jax.vmap(model)(batch)
    found = lrjax.adapters.activation_statistics(call, small, x, where=["layers.0"])
    rows = x.reshape(-1, 12)
    assert_close(found["layers.0"].image, rows.T @ rows, rtol=1e-5)

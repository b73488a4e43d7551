"""Adapters on layers whose weights are in factors: those of a compressed model."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from tests.adapters.models import adapt, assert_same, merge, moved, normal_like
from tests.helpers import assert_close


WHERE = [f"layers.{i}" for i in range(3)]


@functools.cache
def made(form, seed):
    model = eqx.filter_jit(eqx.nn.MLP)(12, 10, 16, 2, key=jr.key(seed))
    return lrjax.nn.factorize(model, rank=4, form=form)[0]


@pytest.fixture(params=["pair", "svd"])
def small(request, getkey):
    """One draw for all tests of a run."""
    return made(request.param, getkey.seed)


densify = eqx.filter_jit(lrjax.nn.densify)


def normal(key, *shape):
    return normal_like(jax.ShapeDtypeStruct(shape, jnp.float32), key, 1.0)


def adapted(model, key, kind=None):
    """Adapters that change something, and a batch."""
    kind = lrjax.LoRA(2) if kind is None else kind
    params, frozen = lrjax.partition(adapt(model, kind, where=WHERE, key=key))
    return moved(params, key), frozen, normal(jr.fold_in(key, 1), 5, 12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [lrjax.LoRA(2), lrjax.DoRA(2)], ids=["lora", "dora"])
def test_bound_is_merged_is_the_dense_model_adapted(small, getkey, kind):
    params, frozen, x = adapted(small, getkey(), kind)

    @eqx.filter_jit
    def outputs(small, adapters, x):
        bound, merged = lrjax.bind(small, adapters), lrjax.merge(small, adapters)
        dense = lrjax.bind(lrjax.nn.densify(small), adapters)
        return [jax.vmap(model)(x) for model in (bound, merged, dense, small)]

    bound, merged, dense, plain = outputs(small, eqx.combine(params, frozen), x)
    assert_close(bound, merged, rtol=1e-5)
    assert_close(bound, dense, rtol=1e-5)
    assert not np.allclose(bound, plain, atol=1e-3)


@pytest.mark.slow_but("pair")
def test_gradients_are_those_on_the_dense_model_and_none_reaches_the_factors(small, getkey):
    params, frozen, x = adapted(small, getkey())

    def loss(params, numbers, rest):
        adapters = eqx.combine(params, frozen)
        bound = lrjax.bind(eqx.combine(numbers, rest), adapters)
        return jnp.sum(jax.vmap(bound)(x) ** 2)

    def gradients(model):
        numbers, rest = eqx.partition(model, eqx.is_inexact_array)
        return eqx.filter_jit(jax.grad(loss, (0, 1)))(params, numbers, rest)

    own, through = gradients(small)
    plain, _ = gradients(densify(small))
    assert_close(own, plain, rtol=1e-4)
    for layer in through.layers:
        assert all(not np.any(g) for g in jax.tree.leaves(layer.weight))
        assert np.any(layer.bias)


def test_merged_layers_are_plain(small, getkey):
    params, frozen, _ = adapted(small, getkey())
    merged = merge(small, eqx.combine(params, frozen))
    assert jax.tree.structure(merged) == jax.tree.structure(densify(small))


def test_a_layer_in_factors_is_not_factorized_nor_quantized_again(small):
    again, report = lrjax.nn.factorize(small, rank=2)
    assert_same(again, small)
    assert {row.kept_dense for row in report.layers} == {"its weight is in factors already"}
    with pytest.raises(ValueError, match="in factors already"):
        lrjax.nn.factorize(small, rank=2, where=WHERE)
    head = eqx.nn.Linear(10, 8, key=jr.key(0))
    both = lrjax.adapters.quantize([small, head], lrjax.adapters.Int8())
    assert_same(both[0], small)
    assert isinstance(both[1].weight, lrjax.adapters.QuantizedArray)


def test_inputs_of_layers_in_factors_are_seen(small, getkey):
    x = normal(getkey(), 2, 7, 12)
    call = lambda model, batch: jax.vmap(model)(batch)
    found = lrjax.adapters.activation_statistics(call, small, x, where=["layers.0"])
    rows = np.asarray(x).reshape(-1, 12)
    assert_close(found["layers.0"].image, rows.T @ rows, rtol=1e-5)


class Picture(eqx.Module):
    """A table, a convolution and a stack of convolutions, all in factors."""

    table: lrjax.nn.LowRankEmbedding
    conv: lrjax.nn.LowRankConv
    stack: lrjax.nn.LowRankConv

    def __init__(self, key, scheme, groups, form):
        kt, kc, ks, kb = jr.split(key, 4)
        table = lrjax.nn.LowRankEmbedding(9, 6, 3, form=form, key=kt)
        bias = jr.normal(kb, (6,))
        self.table = lrjax.nn.LowRankEmbedding.from_node(table.weight, bias)
        make = lambda key, **settings: lrjax.nn.LowRankConv(
            2, 4, 4, 3, 2, scheme=scheme, groups=groups, form=form, key=key, **settings
        )
        self.conv = make(kc, stride=2, padding=1)
        self.stack = eqx.filter_vmap(lambda key: make(key, padding=1))(jr.split(ks, 2))

    def __call__(self, x):
        h = self.conv(x)
        for i in range(2):
            cut = lambda leaf, i=i: leaf[i] if eqx.is_array(leaf) else leaf
            h = jnp.tanh(jax.tree.map(cut, self.stack)(h))
        return h, jax.vmap(self.table)(jnp.arange(5))


PICTURES = [("inputs", 1, "pair"), ("outputs", 2, "pair"), ("first", 1, "svd")]


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "groups", "form"), PICTURES)
def test_convolutions_and_tables_in_factors_are_adapted(getkey, scheme, groups, form):
    model = eqx.filter_jit(Picture)(getkey(), scheme, groups, form)
    x, where = normal(getkey(), 4, 7, 7), ["table", "conv", "stack"]
    start = adapt(model, lrjax.LoRA(2), where=where, key=getkey())
    params, frozen = lrjax.partition(start)
    adapters, dense = eqx.combine(moved(params, getkey()), frozen), densify(model)

    @eqx.filter_jit
    def outputs(model, dense, adapters):
        return [
            lrjax.bind(model, adapters)(x),
            lrjax.merge(model, adapters)(x),
            lrjax.bind(dense, adapters)(x),
            model(x),
        ]

    bound, merged, plain, unchanged = outputs(model, dense, adapters)
    assert_close(bound, merged, rtol=1e-4)
    assert_close(bound, plain, rtol=1e-4)
    assert not any(map(np.allclose, bound, unchanged))
    loss = lambda model: sum(jnp.sum(y**2) for y in lrjax.bind(model, adapters)(x))
    grads = eqx.filter_jit(eqx.filter_grad(loss))(model)
    for layer in (grads.table, grads.conv, grads.stack):
        assert all(not np.any(g) for g in jax.tree.leaves(layer.weight))
        assert np.any(layer.bias)
    merged = merge(model, adapters)
    assert type(merged.conv) is eqx.nn.Conv
    assert type(merged.table) is eqx.nn.Embedding

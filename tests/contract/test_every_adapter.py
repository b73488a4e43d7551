"""What every kind of adapter must do, on one model with every kind of layer."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import lrjax
from lrjax import adapters as room
from tests.helpers import all_finite, assert_close


KINDS = {"LoRA": lrjax.LoRA(rank=2)}
every = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
KEY = jr.key(0)


class Model(eqx.Module):
    embedding: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    convolution: eqx.nn.Conv1d
    blocks: eqx.nn.Linear  # two layers, stacked for scan
    out: eqx.nn.Linear

    def __init__(self, key):
        k = jr.split(key, 5)
        self.embedding = eqx.nn.Embedding(11, 8, key=k[0])
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=k[1])
        self.convolution = eqx.nn.Conv1d(8, 8, 3, padding=1, key=k[2])
        layer = lambda key: eqx.nn.Linear(8, 8, key=key)
        self.blocks = eqx.filter_vmap(layer)(jr.split(k[3], 2))
        self.out = eqx.nn.Linear(8, 3, key=k[4])

    def __call__(self, tokens):
        x = jax.vmap(self.embedding)(tokens)
        x = x + self.attention(x, x, x)
        x = x + self.convolution(x.T).T
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        body = lambda x, layer: (jnp.tanh(jax.vmap(eqx.combine(layer, static))(x)), None)
        x, _ = jax.lax.scan(body, x, arrays)
        return jax.vmap(self.out)(x)


MODEL, TOKENS = Model(jr.key(1)), jnp.array([1, 4, 9, 0, 3])


def setting(kind):
    adapters = lrjax.adapt(MODEL, kind, where=lambda path, layer: True, key=KEY)
    params, frozen = lrjax.partition(adapters)

    def loss(params):
        bound = lrjax.bind(MODEL, eqx.combine(params, frozen))
        return jnp.mean(bound(TOKENS) ** 2)

    return adapters, params, frozen, loss


def disturbed(params):
    return jax.tree.map(lambda x: x + 0.1, params)


def test_every_kind_is_here():
    public = {
        name
        for name, value in vars(room).items()
        if inspect.isclass(value)
        and issubclass(value, room.AdapterKind)
        and value is not room.AdapterKind
    }
    assert public == set(KINDS)


@every
def test_starts_as_the_model_and_merges_to_what_is_bound(kind):
    adapters, params, frozen, _ = setting(kind)
    assert_close(lrjax.bind(MODEL, adapters)(TOKENS), MODEL(TOKENS), condition=10)
    moved = eqx.combine(disturbed(params), frozen)
    bound, merged = lrjax.bind(MODEL, moved), lrjax.merge(MODEL, moved)
    assert_close(merged(TOKENS), bound(TOKENS), condition=100)
    assert jax.tree.structure(merged) == jax.tree.structure(MODEL)
    assert eqx.tree_equal(lrjax.detach(bound), (MODEL, moved))


@every
def test_jit_is_eager_and_gradients_reach_all_that_is_trained(kind):
    _, params, _, loss = setting(kind)
    params = disturbed(params)
    value, grads = jax.value_and_grad(loss)(params)
    jitted = jax.jit(jax.value_and_grad(loss))(params)
    assert_close(jitted, (value, grads), condition=1e3)
    assert all_finite(grads)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads))


@every
def test_vmap_over_adapters_is_a_loop(kind):
    _, params, _, loss = setting(kind)
    two = jax.tree.map(lambda a, b: jnp.stack([a, b]), params, disturbed(params))
    together = jax.vmap(loss)(two)
    assert_close(
        together, jnp.stack([loss(params), loss(disturbed(params))]), condition=100
    )


@every
def test_survives_a_checkpoint(kind, tmp_path):
    adapters, *_ = setting(kind)
    eqx.tree_serialise_leaves(tmp_path / "adapters.eqx", adapters)
    fresh = lrjax.adapt(MODEL, kind, where=lambda path, layer: True, key=jr.key(9))
    back = eqx.tree_deserialise_leaves(tmp_path / "adapters.eqx", fresh)
    assert eqx.tree_equal(back, adapters)

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from tests.adapters.models import adapt, block, everything, randomized, tower
from tests.helpers import assert_close


def bound_tower(getkey, **options):
    model = tower(getkey())
    adapters = adapt(model, lrjax.LoRA(2, **options), where=everything, key=getkey())
    return model, randomized(adapters, getkey()), jr.randint(getkey(), (4, 5), 0, 11)


def test_scanned_attention_tower_bound_equals_merged(getkey):
    model, adapters, tokens = bound_tower(getkey)
    bound = eqx.filter_jit(lambda m, a, t: jax.vmap(lrjax.bind(m, a))(t))
    plain = eqx.filter_jit(lambda m, t: jax.vmap(m)(t))
    merged = lrjax.merge(model, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    got = bound(model, adapters, tokens)
    assert_close(got, plain(merged, tokens), condition=100)
    assert np.linalg.norm(got - plain(model, tokens)) > 0.1
    # Every layer has a part in it: without its adapter the output differs.
    for path in adapters.layers:
        pair = lambda a, path=path: a.layers[path].pair
        zero = jax.tree.map(jnp.zeros_like, pair(adapters))
        less = bound(model, eqx.tree_at(pair, adapters, zero), tokens)
        assert np.linalg.norm(less - got) > 1e-4, path


def test_stacked_layers_equal_a_loop_over_them(getkey):
    model, adapters, _ = bound_tower(getkey)
    x = jr.normal(getkey(), (5, 8))
    at = lambda tree, i: jax.tree.map(lambda a: a[i] if eqx.is_array(a) else a, tree)
    stacked = lrjax.bind(model, adapters).blocks
    single = {
        path.removeprefix("blocks."): adapter
        for path, adapter in adapters.layers.items()
        if path.startswith("blocks.")
    }
    for i in range(3):
        own = lrjax.adapters.Adapters(at(single, i))
        want = lrjax.bind(at(model.blocks, i), own)(x)
        assert_close(at(stacked, i)(x), want, condition=10)


def test_base_gets_no_gradient_and_the_rest_does(getkey):
    model, adapters, tokens = bound_tower(getkey)
    del adapters.layers["head"], adapters.layers["embedding"]

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model, tokens):
        return jnp.sum(jax.vmap(lrjax.bind(model, adapters))(tokens) ** 2)

    got = gradient(model, tokens)
    assert not any(np.any(x) for x in jax.tree.leaves(got.blocks))
    assert np.any(got.head.weight)
    assert np.any(got.embedding.weight)


def test_many_adapters_share_one_base_under_vmap(getkey):
    model, adapters, tokens = bound_tower(getkey)
    members = [randomized(adapters, getkey()) for _ in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)

    @eqx.filter_jit
    def gradients(stacked):
        def loss(adapters):
            return jnp.sum(jax.vmap(lrjax.bind(model, adapters))(tokens) ** 2)

        return jax.vmap(jax.grad(loss))(stacked), jax.vmap(loss)(stacked)

    got, values = gradients(stacked)
    want = eqx.filter_jit(lambda a: jax.vmap(lrjax.merge(model, a))(tokens))
    for i, member in enumerate(members):
        assert_close(values[i], jnp.sum(want(member) ** 2), condition=100)
    assert got.layers["blocks.up"].pair.left.shape == (3, 3, 16, 2)
    with pytest.raises(ValueError, match=r"jax\.vmap must take off first"):
        lrjax.bind(model, stacked)


def test_nested_vmap_equals_loop(getkey):
    layer = eqx.nn.Linear(6, 5, key=getkey())
    adapters = randomized(lrjax.adapt(layer, lrjax.LoRA(2), key=getkey()), getkey())
    x = jr.normal(getkey(), (2, 3, 6))
    bound = lrjax.bind(layer, adapters)
    got = jax.vmap(jax.vmap(bound))(x)
    want = jnp.stack([jnp.stack([bound(v) for v in row]) for row in x])
    assert_close(got, want, condition=10)


def test_bound_layer_has_the_attributes_of_the_layer(getkey):
    layer = eqx.nn.Linear(6, 5, key=getkey())
    adapters = randomized(lrjax.adapt(layer, lrjax.LoRA(2), key=getkey()), getkey())
    bound = lrjax.bind(layer, adapters)
    assert bound.in_features == 6
    assert bound.bias is layer.bias
    assert_close(bound.weight, lrjax.merge(layer, adapters).weight)
    assert not hasattr(bound, "nothing")


def test_detach_is_the_inverse_of_bind(getkey):
    model, adapters, _ = bound_tower(getkey)
    bound = lrjax.bind(model, adapters, key=getkey())
    plain, same = lrjax.detach(bound)
    assert eqx.tree_equal(plain, model)
    assert eqx.tree_equal(same, adapters)
    bound = eqx.tree_at(lambda m: m.head.layer.bias, bound, jnp.ones(3))
    assert_close(lrjax.detach(bound)[0].head.bias, jnp.ones(3))
    with pytest.raises(ValueError, match="no bound layer"):
        lrjax.detach(model)


def test_adapters_of_another_model_are_refused(getkey):
    adapters = adapt(block(getkey()), lrjax.LoRA(2), key=getkey())
    with pytest.raises(ValueError, match=r"no layer at \['attention.key_proj'"):
        lrjax.bind(eqx.nn.MLP(4, 3, 16, 2, key=getkey()), adapters)
    with pytest.raises(ValueError, match=r"shape \(8, 8\), the layer has \(4, 4\)"):
        lrjax.merge(block(getkey(), 4), adapters)
    bound = lrjax.bind(block(getkey()), adapters)
    with pytest.raises(ValueError, match="already bound"):
        lrjax.bind(bound, adapters)


def test_half_of_a_partition_is_refused(getkey):
    model = block(getkey())
    params, frozen = lrjax.partition(adapt(model, lrjax.LoRA(2), key=getkey()))
    for half in (params, frozen):
        with pytest.raises(ValueError, match=r"eqx\.combine\(params, frozen\)"):
            lrjax.bind(model, half)


def test_dropout_reaches_layers_that_are_called_without_a_key(getkey):
    model, adapters, tokens = bound_tower(getkey, dropout=0.5)

    @eqx.filter_jit
    def run(key):
        return jax.vmap(lrjax.bind(model, adapters, key=key))(tokens)

    key = getkey()
    first = run(key)
    assert_close(run(key), first)
    assert np.linalg.norm(run(getkey()) - first) > 1e-3
    assert np.linalg.norm(run(None) - first) > 1e-3


def test_bound_path_never_forms_the_dense_change(getkey):
    layer = eqx.nn.Linear(512, 512, use_bias=False, key=getkey())
    params, frozen = lrjax.partition(lrjax.adapt(layer, lrjax.LoRA(4), key=getkey()))
    x = jr.normal(getkey(), (16, 16, 512))

    def flops(attach):
        def loss(params, layer, x):
            model = attach(layer, eqx.combine(params, frozen))
            return jnp.sum(jax.vmap(jax.vmap(model))(x) ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(params, layer, x).compile()
        return compiled.cost_analysis()["flops"]

    base = 2 * 256 * 512 * 512
    thin = 6 * 2 * 256 * 512 * 4
    assert flops(lrjax.bind) < 1.05 * (base + thin)
    assert flops(lrjax.merge) > 1.9 * base

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax.adapters import Adapter, AdapterKind, Ready
from tests.adapters.models import (
    Table,
    adapt,
    assert_same,
    block,
    everything,
    merge,
    randomized,
    tower,
)
from tests.helpers import assert_close


def bound_tower(getkey, **options):
    model = tower(getkey())
    adapters = adapt(model, lrjax.LoRA(2, **options), where=everything, key=getkey())
    return model, randomized(adapters, getkey()), jr.randint(getkey(), (4, 5), 0, 11)


@pytest.mark.slow
def test_scanned_attention_tower_bound_equals_merged(getkey):
    model, adapters, tokens = bound_tower(getkey)
    bound = eqx.filter_jit(lambda m, a, t: jax.vmap(lrjax.bind(m, a))(t))
    plain = eqx.filter_jit(lambda m, t: jax.vmap(m)(t))
    merged = merge(model, adapters)
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


@pytest.mark.slow
def test_stacked_layers_equal_a_loop_over_them(getkey):
    model, adapters, _ = bound_tower(getkey)
    x = jr.normal(getkey(), (5, 8))
    at = lambda tree, i: jax.tree.map(lambda a: a[i] if eqx.is_array(a) else a, tree)
    stacked = lrjax.bind(model, adapters).blocks
    call = eqx.filter_jit(lambda block, x: block(x))
    bind = eqx.filter_jit(lrjax.bind)
    single = {
        path.removeprefix("blocks."): adapter
        for path, adapter in adapters.layers.items()
        if path.startswith("blocks.")
    }
    for i in range(3):
        own = lrjax.adapters.Adapters(at(single, i))
        want = call(bind(at(model.blocks, i), own), x)
        assert_close(call(at(stacked, i), x), want, condition=10)


@pytest.mark.slow
def test_base_gets_no_gradient_and_the_rest_does(getkey):
    model, adapters, tokens = bound_tower(getkey)
    del adapters.layers["head"], adapters.layers["embedding"]

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model, tokens):
        return jnp.sum(jax.vmap(lrjax.bind(model, adapters))(tokens) ** 2)

    got = gradient(model, tokens)
    biases = lambda blocks: (blocks.up.bias, blocks.down.bias)
    assert all(np.any(bias) for bias in biases(got.blocks))
    weights = eqx.tree_at(biases, got.blocks, (None, None))
    assert not any(np.any(x) for x in jax.tree.leaves(weights))
    assert np.any(got.head.weight)
    assert np.any(got.embedding.weight)


@pytest.mark.slow
def test_many_adapters_share_one_base_under_vmap(getkey):
    model, adapters, tokens = bound_tower(getkey)
    members = [randomized(adapters, getkey()) for _ in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *members)

    @eqx.filter_jit
    def gradients(stacked):
        def loss(adapters):
            return jnp.sum(jax.vmap(lrjax.bind(model, adapters))(tokens) ** 2)

        return jax.vmap(jax.grad(loss))(stacked), jax.vmap(loss)(stacked)

    got, values = gradients(stacked)
    want = eqx.filter_jit(lambda a: jax.vmap(lrjax.merge(model, a))(tokens))
    for i, member in enumerate(members):
        assert_close(np.asarray(values)[i], np.sum(np.square(want(member))), condition=100)
    assert got.layers["blocks.up"].pair.left.shape == (3, 3, 16, 2)
    with pytest.raises(ValueError, match=r"jax\.vmap must take off first"):
        lrjax.bind(model, stacked)


def test_nested_vmap_equals_loop(getkey):
    layer = eqx.nn.Linear(6, 5, key=getkey())
    adapters = randomized(adapt(layer, lrjax.LoRA(2), key=getkey()), getkey())
    x = jr.normal(getkey(), (2, 3, 6))
    bound = lrjax.bind(layer, adapters)
    got = jax.jit(jax.vmap(jax.vmap(bound)))(x)
    one = jax.jit(lambda v: bound(v))
    want = np.stack([np.stack([one(v) for v in row]) for row in x])
    assert_close(got, want, condition=10)


def test_bound_layer_has_the_attributes_of_the_layer(getkey):
    layer = eqx.nn.Linear(6, 5, key=getkey())
    adapters = randomized(adapt(layer, lrjax.LoRA(2), key=getkey()), getkey())
    bound = lrjax.bind(layer, adapters)
    assert bound.in_features == 6
    assert bound.bias is layer.bias
    assert_close(bound.weight, merge(layer, adapters).weight)
    assert not hasattr(bound, "nothing")


def test_detach_is_the_inverse_of_bind(getkey):
    model, adapters, _ = bound_tower(getkey)
    bound = lrjax.bind(model, adapters, key=getkey())
    plain, same = lrjax.detach(bound)
    assert_same(plain, model)
    assert_same(same, adapters)
    bound = eqx.tree_at(lambda m: m.head.layer.bias, bound, jnp.ones(3))
    assert_close(lrjax.detach(bound)[0].head.bias, jnp.ones(3))
    with pytest.raises(ValueError, match="no bound layer"):
        lrjax.detach(model)


@pytest.mark.slow
def test_adapters_of_another_model_are_refused(getkey):
    adapters = adapt(block(getkey()), lrjax.LoRA(2), key=getkey())
    with pytest.raises(ValueError, match=r"no layer at \['attention.key_proj'"):
        lrjax.bind(eqx.nn.MLP(4, 3, 16, 2, key=getkey()), adapters)
    with pytest.raises(ValueError, match=r"shape \(8, 8\), the layer has \(4, 4\)"):
        lrjax.merge(block(getkey(), 4), adapters)


def test_half_of_a_partition_is_refused(getkey):
    model = block(getkey())
    params, frozen = lrjax.partition(adapt(model, lrjax.LoRA(2), key=getkey()))
    for half in (params, frozen):
        with pytest.raises(ValueError, match=r"eqx\.combine\(params, frozen\)"):
            lrjax.bind(model, half)


@pytest.mark.slow
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


def test_what_reads_the_weight_gets_the_adapted_one(getkey):
    """A method of the layer's own class, and a table tied by hand."""
    table = Table(7, 4, key=getkey())
    start = adapt(table, lrjax.LoRA(2), where=everything, key=getkey())
    adapters, x = randomized(start, getkey()), jr.normal(getkey(), (4,))

    def loss(both, attach):
        table, adapters = both
        return jnp.sum(attach(table, adapters).attend(x) ** 2)

    gradient = eqx.filter_jit(eqx.filter_grad(loss))
    bound = gradient((table, adapters), lrjax.bind)
    merged = gradient((table, adapters), lrjax.merge)
    assert_close(bound[1][""].pair, merged[1][""].pair, condition=10)
    assert not np.any(bound[0].weight)
    assert np.any(merged[0].weight)


def test_calls_and_properties_of_own_classes(getkey):
    class Own(eqx.nn.Linear):
        def __call__(self, x, gain):  # no key, one argument more
            return gain * (self.weight @ x)

        @property
        def size(self):
            return float(jnp.sum(self.weight**2))

    layer, x = Own(4, 3, key=getkey()), jr.normal(getkey(), (4,))
    adapters = randomized(adapt(layer, lrjax.LoRA(2), key=getkey()), getkey())
    bound, merged = lrjax.bind(layer, adapters), lrjax.merge(layer, adapters)
    call = eqx.filter_jit(lambda layer, x: layer(x, 2.0))
    assert_close(call(bound, x), call(merged, x), condition=10)
    assert bound.size == merged.size != layer.size


def test_layers_that_put_another_together_with_a_new_weight(getkey):
    for model, call in (
        (eqx.nn.WeightNorm(eqx.nn.Linear(4, 3, key=getkey())), lambda m, x: m(x)),
        (
            {"a": [eqx.nn.WeightNorm(eqx.nn.Linear(4, 3, key=getkey()))]},
            lambda m, x: m["a"][0](x),
        ),
    ):
        start = adapt(model, lrjax.LoRA(2, dropout=0.5), key=getkey())
        adapters, x = randomized(start, getkey()), jr.normal(getkey(), (4,))

        @eqx.filter_jit
        def outputs(x, model=model, adapters=adapters, call=call):
            both = lrjax.bind(model, adapters), lrjax.merge(model, adapters)
            return [call(one, x) for one in (*both, model)]

        bound, merged, plain = outputs(x)
        assert_close(bound, merged, condition=10)
        assert np.any(bound != plain)
        with pytest.raises(ValueError, match="inputs cannot be dropped"):
            lrjax.bind(model, adapters, key=getkey())


def test_replacing_the_weight_of_a_bound_layer_is_refused(getkey):
    class Standardized(eqx.Module):
        layer: eqx.nn.Linear

        def __call__(self, x):
            weight = self.layer.weight / jnp.std(self.layer.weight)
            return eqx.tree_at(lambda l: l.weight, self.layer, weight)(x)

    model = Standardized(eqx.nn.Linear(4, 3, key=getkey()))
    bound = lrjax.bind(model, lrjax.adapt(model, lrjax.LoRA(2), key=getkey()))
    with pytest.raises(
        ValueError, match=r"weight of the bound layer at 'layer' is computed"
    ):
        bound(jnp.ones(4))


@pytest.mark.slow
def test_nested_adapters_add_up_in_order(getkey):
    model, x = eqx.nn.MLP(4, 3, 8, 1, key=getkey()), jr.normal(getkey(), (4,))
    first, second = (
        randomized(adapt(model, kind, key=getkey()), getkey())
        for kind in (lrjax.LoRA(2), lrjax.DoRA(2))
    )
    bound = eqx.filter_jit(lrjax.bind)(model, first)

    @eqx.filter_jit
    def outputs(first, top, bound):
        both = lrjax.bind(bound, top)
        want = lrjax.merge(lrjax.merge(model, first), top)
        return both, want, lrjax.merge(bound, top), both(x), want(x)

    # Adapted as the plain model is, and started from what the first one gives.
    nested = randomized(adapt(bound, lrjax.DoRA(2), key=getkey()), getkey())
    assert set(nested.layers) == set(second.layers)
    for top in (second, nested):
        both, want, merged, *values = outputs(first, top, bound)
        assert_close(*values, condition=100)
        arrays = lambda tree: eqx.filter(tree, eqx.is_array)
        assert_close(arrays(merged), arrays(want), condition=100)
        assert_same(lrjax.detach(both)[1], top)
        assert_same(lrjax.detach(lrjax.detach(both)[0])[1], first)
    # The lower ones are the base of the upper: no gradient reaches them.
    loss = lambda low, top: jnp.sum(lrjax.bind(lrjax.bind(model, low), top)(x) ** 2)
    low, top = jax.jit(jax.grad(loss, (0, 1)))(first, second)
    assert not any(np.any(g) for g in jax.tree.leaves(low))
    assert np.any(top["layers.0"].magnitude)


@pytest.mark.slow
def test_a_pool_below_has_no_gradient_and_both_drop_by_their_keys(getkey):
    # So many inputs that dropout never takes them all.
    model, x = eqx.nn.Linear(40, 3, key=getkey()), jr.normal(getkey(), (40,))
    low, top = (
        randomized(adapt(model, kind, key=getkey()), getkey())
        for kind in (lrjax.TiedLoRA(2, dropout=0.5), lrjax.LoRA(2, dropout=0.5))
    )
    keys = [getkey(), getkey()]

    def both(low, top):
        return lrjax.bind(lrjax.bind(model, low, key=keys[0]), top, key=keys[1])(x)

    slopes = jax.jit(jax.grad(lambda *a: jnp.sum(both(*a) ** 2), (0, 1)))
    below, above = slopes(low, top)
    assert not any(np.any(g) for g in jax.tree.leaves(below))
    assert np.any(above[""].pair.left)

    @jax.jit
    def values(low, top):
        alone = lrjax.bind(model, low, key=keys[0])(x)
        change = lrjax.bind(model, top, key=keys[1])(x) - model(x)
        return both(low, top), alone + change

    assert_close(*values(low, top), condition=100)


@pytest.mark.slow
def test_nested_stacks_under_scan(getkey):
    model, adapters, tokens = bound_tower(getkey)
    bound = lrjax.bind(model, adapters)
    top = randomized(adapt(bound, lrjax.LoRA(2), key=getkey()), getkey())
    run = eqx.filter_jit(lambda m, a, t: jax.vmap(lrjax.bind(m, a))(t))
    merged = merge(merge(model, adapters), top)
    want = eqx.filter_jit(lambda m, t: jax.vmap(m)(t))(merged, tokens)
    assert_close(run(bound, top, tokens), want, condition=100)


def test_bias_of_an_adapted_layer_has_its_gradient(getkey):
    layer, x = eqx.nn.Linear(3, 3, key=getkey()), jr.normal(getkey(), (3,))
    adapters = randomized(adapt(layer, lrjax.LoRA(2), key=getkey()), getkey())
    loss = lambda layer, attach: jnp.sum(attach(layer, adapters)(x) ** 2)
    bound, merged = (
        eqx.filter_jit(eqx.filter_grad(loss))(layer, attach)
        for attach in (lrjax.bind, lrjax.merge)
    )
    assert_close(bound.bias, merged.bias, condition=10)
    assert not np.any(bound.weight)


@pytest.mark.slow
def test_frozen_numbers_have_no_gradient_without_a_partition(getkey):
    # So many inputs that dropout never takes them all.
    layer, x = eqx.nn.Linear(40, 3, key=getkey()), jr.normal(getkey(), (40,))
    for kind in (lrjax.LoRA(2, train="left", dropout=0.5), lrjax.LoRAXS(2), lrjax.VeRA(2)):
        adapters = randomized(adapt(layer, kind, key=getkey()), getkey())
        for attach in (lrjax.bind, lrjax.merge, lrjax.materialize):
            options = {"key": getkey()} if attach is lrjax.bind else {}
            loss = lambda a, f=attach, o=options: jnp.sum(f(layer, a, **o)(x) ** 2)
            trained, frozen = lrjax.partition(jax.jit(jax.grad(loss))(adapters))
            assert not any(np.any(g) for g in jax.tree.leaves(frozen))
            assert any(np.any(g) for g in jax.tree.leaves(trained))


def test_dropout_of_arrays_is_refused_and_silent_where_there_is_none(getkey):
    params, key = {"dense": {"kernel": jnp.ones((4, 3))}}, getkey()
    adapters = lrjax.adapt(params, lrjax.LoRA(2, dropout=0.5), key=key)
    with pytest.raises(ValueError, match=r"dense\.kernel' has dropout and bind was given"):
        lrjax.bind(params, adapters, key=key)
    adapters = randomized(adapt(params, lrjax.LoRA(2), key=key), key)
    assert_close(lrjax.bind(params, adapters, key=key), lrjax.bind(params, adapters))


def test_fields_that_may_be_none_are_no_missing_part(getkey):
    """A kind of one's own whose node has an optional field."""

    class Form(Adapter):
        form: lrjax.SVDForm  # its field ``active`` is None

        @property
        def shape(self):
            return self.form.shape

        def trainable(self):
            marks = jax.tree.map(lambda _: False, self)
            return eqx.tree_at(lambda a: a.form.core, marks, True)

        def prepare(self, site, pool):
            return Added(self.form)

    class Added(Ready):
        form: lrjax.SVDForm

        def weight(self, base):
            return base + self.form.materialize()

    class Kind(AdapterKind):
        def init(self, site, *, key, pool, data=None):
            u, _, vt = jnp.linalg.svd(site.read())
            return Form(lrjax.SVDForm(u[:, :2], jnp.zeros((2, 2)), vt[:2].T))

    # Only the weight is written: batches, stacks, dropout-free calls follow from it.
    layers = eqx.filter_vmap(lambda k: eqx.nn.Linear(4, 4, key=k))(jr.split(getkey(), 3))
    adapters = randomized(adapt(layers, Kind(), key=getkey()), getkey())
    x = jr.normal(getkey(), (4,))
    each = eqx.filter_vmap(lambda layer: layer(x))
    of = eqx.filter_jit(lambda attach: each(attach(layers, adapters)))
    got, want = of(lrjax.bind), of(lrjax.merge)
    assert_close(got, want, condition=10)
    for half in lrjax.partition(adapters):
        with pytest.raises(ValueError, match="only a part of one"):
            lrjax.bind(layers, half)


def test_detach_refuses_what_it_cannot_take_apart(getkey):
    model = {"a": eqx.nn.Linear(3, 3, key=getkey()), "w": jnp.ones((3, 3))}
    adapters = lrjax.adapt(model, lrjax.LoRA(2), where=everything, key=getkey())
    with pytest.raises(ValueError, match=r"weights at \['w'\] have no call of their own"):
        lrjax.detach(lrjax.bind(model, adapters))


@pytest.mark.slow
def test_joined_adapters(getkey):
    model, x = eqx.nn.MLP(4, 3, 8, 1, key=getkey()), jr.normal(getkey(), (4,))
    one = adapt(model, lrjax.LoRA(2), where=["layers.0"], key=getkey())
    two = adapt(model, lrjax.VeRA(2), where=["layers.1"], key=getkey())
    both = randomized(one | two, getkey())
    of = eqx.filter_jit(lambda attach: attach(model, both)(x))
    assert_close(of(lrjax.bind), of(lrjax.merge), condition=10)
    with pytest.raises(ValueError, match=r"Both have an adapter at \['layers\.0'\]"):
        one | one
    other = adapt(model, lrjax.VeRA(2), where=["layers.0"], key=getkey())
    with pytest.raises(ValueError, match="Both have a pool 'VeRA', and not the same"):
        two | other
    named = lrjax.VeRA(2, group="first")
    assert set((two | adapt(model, named, where=["layers.0"], key=getkey())).pools) == {
        "VeRA",
        "first",
    }


def test_layer_twice_in_the_tree_is_refused_at_bind_too(getkey):
    """Under jit the two are different tracers: there adapt cannot see it."""
    layer = eqx.nn.Linear(3, 3, key=getkey())
    adapters = adapt([layer, layer], lrjax.LoRA(2), key=getkey())
    for attach in (lrjax.bind, lrjax.merge):
        with pytest.raises(ValueError, match="in the tree 2 times"):
            attach([layer, layer], adapters)

"""What can be adapted, how it is picked, and what is refused by name."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lrjax
from lrjax.adapters import Full, LinearSite, map_adapters, register_layer
from tests.adapters.models import (
    Table,
    adapt,
    block,
    everything,
    moved,
    randomized,
    tower,
    zoo,
    zoo_axes,
    zoo_where,
)
from tests.helpers import assert_close, tol


@pytest.mark.slow
def test_arrays_stand_beside_layers(getkey):
    """One Equinox layer does not hide the other matrices; ``where`` picks them."""
    model = zoo(getkey())
    adapters = adapt(model, lrjax.LoRA(2), where=zoo_where, axes=zoo_axes, key=getkey())
    assert set(adapters.layers) == {
        "table",
        "query",
        "experts",
        "cell.weight_ih",
        "cell.weight_hh",
        "normed.layer",
        "blocks",
        "grouped",
        "shared.pytree.0",
    }
    assert adapters["experts"].pair.shape == (2, 4, 4)
    assert adapters["query"].pair.shape == (4, 4)
    by_default = adapt(model, lrjax.LoRA(2), key=getkey())
    assert set(by_default.layers) == {"normed.layer", "blocks"}


def test_a_field_called_value_keeps_its_name(getkey):
    """It is a name like another, but in the variables of Flax NNX."""

    class Attention(eqx.Module):
        query: eqx.nn.Linear
        value: eqx.nn.Linear

    class Gate(eqx.Module):
        value: jax.Array

    linear = lambda: eqx.nn.Linear(4, 4, key=getkey())
    model = {"layer": Attention(linear(), linear()), "gate": Gate(jnp.ones((4, 4)))}
    adapters = adapt(model, lrjax.LoRA(2), where=everything, key=getkey())
    assert set(adapters.layers) == {"layer.query", "layer.value", "gate.value"}
    only = adapt(model["layer"], lrjax.LoRA(2), where=["value"], key=getkey())
    bound = lrjax.bind(model["layer"], only)
    assert set(lrjax.detach(bound)[1].layers) == {"value"}


@pytest.mark.slow_but("query")
@pytest.mark.parametrize(
    ("shape", "spec", "as_matrices"),
    [
        # Flax attention: query (in, heads, size) and out (heads, size, out).
        ((6, 2, 5), lrjax.MatrixSpec((1, 2), (0,)), lambda x: x.reshape(6, 10).T),
        ((2, 5, 6), lrjax.MatrixSpec((2,), (0, 1)), lambda x: x.reshape(10, 6).T),
        # A convolution (height, width, in, out); nn.scan along axis 1.
        ((3, 2, 4, 5), lrjax.MatrixSpec((3,), (0, 1, 2)), lambda x: x.reshape(24, 5).T),
        ((6, 3, 5), lrjax.MatrixSpec((2,), (0,)), lambda x: x.transpose(1, 2, 0)),
        # Query, key and value in one: three matrices on rows of their own.
        ((12, 5), lrjax.MatrixSpec(blocks=3), lambda x: x.reshape(3, 4, 5)),
    ],
    ids=["query", "output", "convolution", "scan", "blocks"],
)
def test_axes_are_told_by_a_rule(shape, spec, as_matrices, getkey):
    params = {"kernel": jr.normal(getkey(), shape), "bias": jnp.zeros(5)}
    start = lrjax.adapt(params, lrjax.LoRA(2), axes=lambda p, x: spec, key=getkey())
    adapters = randomized(start, getkey())
    pair = adapters["kernel"].pair
    want = as_matrices(params["kernel"]) + pair.materialize()
    got = lrjax.materialize(params, adapters)["kernel"]
    assert got.shape == shape
    assert_close(as_matrices(got), want, condition=10)
    # The rule is remembered: nothing but the adapters is needed later.
    assert_close(lrjax.merge(params, adapters)["kernel"], got)


def test_axes_that_nobody_tells_are_not_guessed(getkey):
    params = {"query": {"kernel": jnp.ones((4, 2, 3))}}
    with pytest.raises(ValueError, match=r"query\.kernel of shape \(4, 2, 3\) has 3 axes"):
        lrjax.adapt(params, lrjax.LoRA(2), key=getkey())
    with pytest.raises(TypeError, match=r"lrjax\.MatrixSpec or None, got \(0, 1\)"):
        lrjax.adapt(params, lrjax.LoRA(2), axes=lambda p, x: (0, 1), key=getkey())
    bad = lrjax.MatrixSpec(rows=(0,), cols=(0,))
    with pytest.raises(ValueError, match="different axes"):
        lrjax.adapt(params, lrjax.LoRA(2), axes=lambda p, x: bad, key=getkey())


@pytest.mark.slow_but("head-found3")
@pytest.mark.parametrize(
    ("where", "found"),
    [
        (["query_proj", "up"], {"blocks.attention.query_proj", "blocks.up"}),
        (["blocks.down"], {"blocks.down"}),
        (
            r".*\.(key|value)_proj",
            {"blocks.attention.key_proj", "blocks.attention.value_proj"},
        ),
        ("head", {"head"}),
    ],
)
def test_where_is_a_regular_expression_or_a_list_of_names(where, found, getkey):
    assert (
        set(adapt(tower(getkey()), lrjax.LoRA(2), where=where, key=getkey()).layers)
        == found
    )


def test_names_match_whole_parts_of_a_path_and_none_is_dropped(getkey):
    model = tower(getkey())
    with pytest.raises(ValueError, match=r"names \['proj', 'q'\], and no layer"):
        lrjax.adapt(model, lrjax.LoRA(2), where=["proj", "up", "q"], key=getkey())
    with pytest.raises(ValueError, match="picked nothing"):
        lrjax.adapt(model, lrjax.LoRA(2), where="query_proj", key=getkey())
    params = {
        "a": {"up": {"kernel": jnp.ones((3, 2))}, "pup": {"kernel": jnp.ones((3, 2))}}
    }
    adapters = lrjax.adapt(params, lrjax.LoRA(2), where=["up"], key=getkey())
    assert set(adapters.layers) == {"a.up.kernel"}


def test_heads_of_attention_are_taken_and_routers_are_not(getkey):
    linear = lambda: eqx.nn.Linear(3, 3, key=getkey())
    model = {
        "heads": [{"q": linear(), "k": linear()}, {"q": linear(), "k": linear()}],
        "out_heads": [linear(), linear()],
        "moe": {"router": linear(), "up": linear()},
    }
    adapters = lrjax.adapt(model, lrjax.LoRA(2), key=getkey())
    heads = {f"heads.{i}.{name}" for i in (0, 1) for name in "qk"}
    assert set(adapters.layers) == heads | {"moe.up"}


def test_a_rule_gives_every_site_a_kind_of_its_own(getkey):
    model = tower(getkey())

    def rule(path, site):
        if path == "head":
            return Full()
        if site.kind == "linear":
            return lrjax.LoRA(max(site.shape) // 4)
        return None

    adapters = adapt(model, rule, key=getkey())
    assert "embedding" not in adapters.layers
    assert adapters["blocks.up"].pair.rank == 4
    assert adapters["blocks.attention.key_proj"].pair.rank == 2
    assert adapters["head"].matrix.shape == (3, 8)
    assert set(adapt(model, rule, where="head", key=getkey()).layers) == {"head"}
    with pytest.raises(TypeError, match="answer with a kind such as"):
        lrjax.adapt(model, lambda path, site: 8, key=getkey())
    with pytest.raises(ValueError, match="answered None for every site"):
        lrjax.adapt(model, lambda path, site: None, key=getkey())


def test_what_is_no_kind_and_no_key_is_refused_in_a_sentence(getkey):
    model = eqx.nn.Linear(3, 3, key=getkey())
    for kind in (lrjax.LoRA, lrjax.DoRA):
        with pytest.raises(TypeError, match=rf"got the class: write {kind.__name__}\(\)"):
            lrjax.adapt(model, kind, key=getkey())


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (jnp.ones((3, 4), jnp.int8), "is int8"),
        (jnp.ones((3, 4), jnp.complex64), "is complex64"),
        (jnp.ones((3, 4)).astype(jnp.float8_e4m3fn), "is float8_e4m3fn"),
        (("codes", "scale"), "is no array but a tuple: tell how it is read"),
    ],
)
def test_weights_that_are_no_real_numbers_are_refused_by_name(weight, message, getkey):
    model = {"a": eqx.nn.Linear(4, 3, key=getkey()), "b": eqx.nn.Linear(4, 3, key=getkey())}
    model["b"] = eqx.tree_at(lambda l: l.weight, model["b"], weight)
    with pytest.raises(ValueError, match=f"The weight of b {message}"):
        lrjax.adapt(model, lrjax.LoRA(2), where=["b"], key=getkey())
    assert set(lrjax.adapt(model, lrjax.LoRA(2), key=getkey()).layers) == {"a"}


class Int8(eqx.Module):
    codes: jax.Array
    scale: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return (self.codes * self.scale) @ x + self.bias


@register_layer(Int8)
class Int8Site(LinearSite):
    def matrix(self):
        return self.layer.codes * self.layer.scale

    def put(self, matrix, bias):
        layer = eqx.nn.Linear(*matrix.shape[::-1], key=jr.key(0))
        return eqx.tree_at(lambda l: (l.weight, l.bias), layer, (matrix, bias))


@pytest.mark.slow_but("DoRA")
@pytest.mark.parametrize(
    "kind", [lrjax.LoRA(2), lrjax.DoRA(2), lrjax.LoRAXS(2)], ids=lambda k: type(k).__name__
)
def test_a_registered_layer_is_adapted_like_a_linear_one(kind, getkey):
    codes = jr.randint(getkey(), (3, 4), -127, 127, jnp.int8)
    layer = Int8(codes, jr.uniform(getkey(), (3, 1)) / 127, jnp.ones(3))
    adapters = lrjax.adapt({"a": layer}, kind, key=getkey())
    adapters, x = randomized(adapters, getkey()), jr.normal(getkey(), (4,))
    bound, merged = lrjax.bind({"a": layer}, adapters), lrjax.merge({"a": layer}, adapters)
    assert isinstance(merged["a"], eqx.nn.Linear)
    assert_close(bound["a"](x), merged["a"](x), condition=10)
    plain = eqx.nn.Linear(4, 3, key=getkey())
    same = (layer.codes * layer.scale, layer.bias)
    plain = eqx.tree_at(lambda l: (l.weight, l.bias), plain, same)
    assert_close(bound["a"](x), lrjax.bind({"a": plain}, adapters)["a"](x), condition=10)


def test_adapt_reads_no_weight_that_the_kind_does_not_ask_for(getkey):
    """Kernels stored (in, out) are seen by their shapes, not transposed one by one."""
    read = []

    class Spy(eqx.nn.Linear):
        pass

    @register_layer(Spy)
    class SpySite(LinearSite):
        def matrix(self):
            read.append(type(self.layer.weight))
            return super().matrix()

    model = {"a": Spy(4, 3, key=getkey())}
    lrjax.adapt(model, lrjax.LoRA(2), key=getkey())
    assert not any(
        issubclass(kind, jax.Array) and not issubclass(kind, jax.core.Tracer)
        for kind in read
    )
    lrjax.adapt(model, lrjax.LoRAXS(2), key=getkey())
    assert any(not issubclass(kind, jax.core.Tracer) for kind in read)


@pytest.mark.slow_but("kernel")
@pytest.mark.parametrize("name", ["linear", "kernel", "stack"])
def test_factors_take_the_sharding_of_the_weight(name, getkey):
    mesh = jax.make_mesh((4, 2), ("rows", "cols"), axis_types=(AxisType.Explicit,) * 2)
    model, spec, path = {
        "linear": (eqx.nn.Linear(6, 8, key=getkey()), P("rows", "cols"), ""),
        "kernel": ({"kernel": jnp.ones((6, 8))}, P("cols", "rows"), "kernel"),
        "stack": (
            eqx.filter_vmap(lambda k: eqx.nn.Linear(6, 8, key=k))(jr.split(getkey(), 2)),
            P(None, "rows", "cols"),
            "",
        ),
    }[name]
    place = lambda x: jax.device_put(
        x, NamedSharding(mesh, spec if x.ndim == len(spec) else P())
    )
    model = jax.tree.map(place, model)
    with jax.set_mesh(mesh):
        for kind in (lrjax.LoRA(2), lrjax.LoRA(2, init="pissa")):
            pair = lrjax.adapt(model, kind, key=getkey())[path].pair
            lead = (None,) * (pair.left.ndim - 2)
            assert jax.typeof(pair.left).sharding.spec == P(*lead, "rows", None)
            assert jax.typeof(pair.right).sharding.spec == P(*lead, "cols", None)
        if name == "linear":
            adapters = lrjax.adapt(model, lrjax.LoRA(2), key=getkey())
            merged = jax.jit(lrjax.merge)(model, adapters)
            assert jax.typeof(merged.weight).sharding.spec == spec


@pytest.mark.slow_but("DoRA")
@pytest.mark.parametrize(
    "kind", [lrjax.LoRA(2), lrjax.DoRA(2), lrjax.VeRA(3)], ids=lambda k: type(k).__name__
)
def test_a_sharded_layer_gives_what_it_gives_on_one_device(kind, getkey):
    """Outputs over one axis of the mesh, the batch over the other."""
    layer, x = eqx.nn.Linear(6, 8, key=getkey()), jr.normal(getkey(), (4, 6))
    params, frozen = lrjax.partition(lrjax.adapt(layer, kind, key=getkey()))
    params = moved(params, getkey())

    def loss(params, frozen, layer, x):
        bound = lrjax.bind(layer, eqx.combine(params, frozen))
        return jnp.sum(jax.vmap(bound)(x) ** 2)

    want = jax.jit(jax.grad(loss))(params, frozen, layer, x)
    mesh = jax.make_mesh((2, 4), ("data", "rows"), axis_types=(AxisType.Explicit,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    layer = jax.tree.map(lambda a: put(a, "rows", *(None,) * (a.ndim - 1)), layer)
    with jax.set_mesh(mesh):
        start = lrjax.adapt(layer, kind, key=getkey())
        spec = lambda x: jax.typeof(x).sharding.spec
        place = lambda a, like: put(a, *spec(like))
        params, frozen = (
            jax.tree.map(place, mine, like)
            for mine, like in zip((params, frozen), lrjax.partition(start), strict=True)
        )
        got = jax.jit(jax.grad(loss))(params, frozen, layer, put(x, "data", None))
    assert_close(jax.device_get(got), want, condition=100)


@pytest.mark.slow
def test_map_adapters_goes_by_path(getkey):
    adapters = adapt(block(getkey()), lrjax.LoRA(2), key=getkey())
    double = map_adapters(
        lambda path, a, b: jax.tree.map(jnp.add, a, b), adapters, adapters
    )
    assert eqx.tree_equal(double["up"], jax.tree.map(lambda x: 2 * x, adapters["up"]))
    leaves = jax.tree.leaves(adapters, is_leaf=lrjax.adapters.is_adapter)
    assert len(leaves) == len(adapters.layers)


def test_stacked_normal_numbers_differ_from_layer_to_layer(getkey):
    right = adapt(tower(getkey()), lrjax.LoRA(2), key=getkey())["blocks.up"].pair.right
    assert np.linalg.norm(right[0] - right[1]) > tol(right)


def test_tables_with_methods_are_sites(getkey):
    table = Table(7, 4, key=getkey())
    adapters = lrjax.adapt(table, lrjax.LoRA(2), where=everything, key=getkey())
    assert adapters[""].pair.shape == (4, 7)

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from tests.adapters.models import adapt, block, everything, randomized, tower
from tests.helpers import assert_close, tol


BLOCK = {
    "attention.query_proj",
    "attention.key_proj",
    "attention.value_proj",
    "attention.output_proj",
    "up",
    "down",
}


@pytest.mark.slow
def test_default_takes_linear_layers_but_heads_and_embeddings(getkey):
    adapters = adapt(tower(getkey()), lrjax.LoRA(2), key=getkey())
    assert set(adapters.layers) == {f"blocks.{name}" for name in BLOCK}
    assert adapters["blocks.up"].pair.left.shape == (3, 16, 2)
    assert adapters["blocks.up"].scale.shape == (3,)


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("head", False),
        ("lm_head", False),
        ("classifier", False),
        ("unembed", False),
        ("patch_embedding", False),
        ("header", True),
        ("heading_proj", True),
        ("output_proj", True),
        ("rescore", True),
    ],
)
def test_names_of_heads_and_embeddings(name, taken, getkey):
    model = {"body": eqx.nn.Linear(2, 2, key=getkey()), "x": {name: None}}
    model["x"][name] = [eqx.nn.Linear(2, 2, key=getkey())]
    adapters = lrjax.adapt(model, lrjax.LoRA(1), key=getkey())
    assert (f"x.{name}.0" in adapters.layers) == taken


def test_where_is_asked_with_path_and_layer(getkey):
    model = tower(getkey())
    asked = {}

    def where(path, layer):
        asked[path] = type(layer)
        return isinstance(layer, eqx.nn.Embedding) or path == "head"

    adapters = adapt(model, lrjax.LoRA(2), where=where, key=getkey())
    assert set(adapters.layers) == {"embedding", "head"}
    assert set(asked) == {f"blocks.{name}" for name in BLOCK} | {"embedding", "head"}
    assert asked["blocks.up"] is eqx.nn.Linear


def test_where_that_picks_nothing_is_refused_with_what_there_is(getkey):
    with pytest.raises(ValueError, match=r"picked nothing(.|\n)*embedding: Embedding"):
        lrjax.adapt(tower(getkey()), lrjax.LoRA(2), where=lambda *_: False, key=getkey())
    with pytest.raises(ValueError, match="nothing to adapt"):
        lrjax.adapt({"bias": jnp.ones(3)}, lrjax.LoRA(2), key=getkey())


def test_summary_lists_what_was_picked(getkey):
    text = adapt(tower(getkey()), lrjax.LoRA(2), key=getkey()).summary()
    assert "blocks.attention.query_proj (3, 8, 8) 2 96" in " ".join(text.split())
    numbers = 3 * 2 * (4 * (8 + 8) + 2 * (8 + 16))
    assert text.splitlines()[-1].split() == ["6", "adapters", str(numbers)]


def test_transposed_convolution_is_refused(getkey):
    model = [eqx.nn.ConvTranspose2d(2, 3, 3, key=getkey())]
    with pytest.raises(ValueError, match="0 is a ConvTranspose2d"):
        lrjax.adapt(model, lrjax.LoRA(2), where=everything, key=getkey())


def test_layer_twice_in_the_tree_is_refused(getkey):
    layer = eqx.nn.Linear(3, 3, key=getkey())
    with pytest.raises(ValueError, match="in the tree 2 times"):
        lrjax.adapt([layer, layer], lrjax.LoRA(2), key=getkey())
    copy = jax.tree.map(jnp.copy, layer)
    assert len(lrjax.adapt([layer, copy], lrjax.LoRA(2), key=getkey()).layers) == 2


class Tied(eqx.Module):
    shared: eqx.nn.Shared

    def __init__(self, key):
        pair = (eqx.nn.Embedding(7, 4, key=key), eqx.nn.Linear(4, 7, key=key))
        self.shared = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)

    def __call__(self, token):
        embedding, linear = self.shared()
        return linear(jnp.tanh(embedding(token)))


@pytest.mark.slow
def test_tied_layer_is_refused_and_the_one_that_keeps_the_weight_leads(getkey):
    model = Tied(getkey())
    with pytest.raises(ValueError, match=r"tied to another layer by eqx\.nn\.Shared"):
        lrjax.adapt(model, lrjax.LoRA(2), where=everything, key=getkey())
    where = lambda path, layer: isinstance(layer, eqx.nn.Embedding)
    adapters = adapt(model, lrjax.LoRA(2), where=where, key=getkey())
    adapters = randomized(adapters, getkey())
    merged = lrjax.merge(model, adapters)
    embedding, linear = merged.shared()
    assert linear.weight is embedding.weight
    y = lrjax.bind(model, adapters)(jnp.int32(2))
    assert_close(y, merged(jnp.int32(2)), condition=10)
    assert np.any(y != model(jnp.int32(2)))


@pytest.mark.slow
def test_layers_start_the_same_whatever_else_is_adapted(getkey):
    model, key = block(getkey()), getkey()
    all_of_them = adapt(model, lrjax.LoRA(2), key=key)
    only = adapt(model, lrjax.LoRA(2), where=lambda p, _: p == "up", key=key)
    assert eqx.tree_equal(all_of_them["up"], only["up"])
    right = all_of_them["attention.query_proj"].pair.right
    assert np.any(right != all_of_them["attention.key_proj"].pair.right)


def test_unknown_path_names_the_known_ones(getkey):
    adapters = adapt(block(getkey()), lrjax.LoRA(2), key=getkey())
    with pytest.raises(KeyError, match=r"attention\.key_proj"):
        adapters["attention"]


@pytest.mark.slow
def test_params_hold_pairs_and_optimizer_state_covers_them_alone(getkey):
    model = tower(getkey())
    adapters = adapt(model, lrjax.LoRA(2, dropout=0.1), key=getkey())
    params, frozen = lrjax.partition(adapters)
    nodes = jax.tree.leaves(params, is_leaf=lrjax.is_low_rank)
    assert len(nodes) == 6
    assert all(lrjax.is_low_rank(node) for node in nodes)
    assert eqx.tree_equal(eqx.combine(params, frozen), adapters)

    numbers = 3 * 2 * (4 * (8 + 8) + 2 * (8 + 16))  # depth · rank · Σ(out + in)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    assert size(params) == 4 * numbers
    state = optax.adam(1e-3).init(params)
    assert size(state) == 2 * 4 * numbers + 4  # two moments and one counter


@pytest.mark.slow
def test_transforms_for_pairs_train_adapters(getkey):
    model, tokens = tower(getkey()), jnp.arange(5)
    params, frozen = lrjax.partition(adapt(model, lrjax.LoRA(2), key=getkey()))
    tx = optax.chain(lrjax.scale_by_gram(1e-2), optax.scale_by_learning_rate(1e-2))

    def loss(params):
        bound = lrjax.bind(model, eqx.combine(params, frozen))
        return jnp.sum((bound(tokens) - 1) ** 2)

    @jax.jit
    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    _, values = jax.lax.scan(step, (params, tx.init(params)), length=30)
    assert values[-1] < 0.5 * values[0]


@pytest.mark.slow
def test_saving_and_loading(getkey):
    model, key = tower(getkey()), getkey()
    adapters = randomized(adapt(model, lrjax.LoRA(2, alpha=7), key=key), getkey())
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, adapters)
    file.seek(0)
    like = adapt(model, lrjax.LoRA(2), key=getkey())
    assert eqx.tree_equal(eqx.tree_deserialise_leaves(file, like), adapters)


@pytest.mark.slow
def test_dict_of_kernels(getkey):
    """Arrays named kernel are (in, out); the node is (out, in) everywhere."""
    params = {
        "dense": {"kernel": jr.normal(getkey(), (6, 4)), "bias": jnp.zeros(4)},
        "layers": {"kernel": jr.normal(getkey(), (2, 4, 4)), "bias": jnp.zeros((2, 4))},
        "head": {"kernel": jr.normal(getkey(), (4, 3)), "bias": jnp.zeros(3)},
    }
    with pytest.raises(ValueError, match=r"layers\.kernel of shape \(2, 4, 4\) has 3 axes"):
        lrjax.adapt(params, lrjax.LoRA(2), key=getkey())
    spec = lrjax.MatrixSpec(rows=(2,), cols=(1,))
    axes = lambda path, x: spec if x.ndim == 3 else None
    start = lrjax.adapt(params, lrjax.LoRA(2, alpha=4.0), axes=axes, key=getkey())
    assert set(start.layers) == {"dense.kernel", "layers.kernel"}
    assert start["dense.kernel"].pair.shape == (4, 6)
    assert_close(lrjax.materialize(params, start), params)
    adapters = randomized(start, getkey())
    got = lrjax.materialize(params, adapters)
    for name in ("dense", "layers"):
        change = 2.0 * adapters[f"{name}.kernel"].pair.materialize().mT
        assert_close(got[name]["kernel"], params[name]["kernel"] + change, condition=10)
    assert got["head"]["kernel"] is params["head"]["kernel"]
    assert_close(lrjax.merge(params, adapters), got)
    assert_close(lrjax.bind(params, adapters), got)


def test_dict_of_weights_needs_a_where(getkey):
    params = {"a": {"weight": jr.normal(getkey(), (4, 6))}}
    with pytest.raises(ValueError, match=r"a\.weight: float32 array"):
        lrjax.adapt(params, lrjax.LoRA(2), key=getkey())
    adapters = lrjax.adapt(params, lrjax.LoRA(2), where=everything, key=getkey())
    assert adapters["a.weight"].pair.shape == (4, 6)


def test_flax_nnx_state(getkey):
    nnx = pytest.importorskip("flax.nnx")

    model = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    adapters = lrjax.adapt(state, lrjax.LoRA(2), key=getkey())
    (path,) = adapters.layers
    assert path == "kernel"
    assert adapters[path].pair.shape == (3, 5)
    adapters, x = randomized(adapters, getkey()), jr.normal(getkey(), (2, 5))
    got = nnx.merge(graph, lrjax.materialize(state, adapters))(x)
    pair, scale = adapters[path].factors()
    want = model(x) + scale * (x @ pair.right) @ pair.left.T
    assert_close(got, want, condition=10, rtol=10 * tol(x))

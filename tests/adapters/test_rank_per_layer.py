"""Layers of a stack with a rank each, as the layers by themselves have them."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import adapters as room
from lrjax.adapters._settings import checked_rank
from tests.adapters.models import moved
from tests.helpers import assert_close
from tests.reference import adapters as reference


N, ALPHA, PATH = 8, 6.0, "layers.proj"
RANKS = [1, 4, 0, 2]  # the third layer has no adapter
L, R = len(RANKS), max(RANKS)
LAWS = {"LoRA": (False, lambda r: ALPHA / r), "rsLoRA": (True, lambda r: ALPHA / r**0.5)}
laws = pytest.mark.parametrize("law", LAWS)


@pytest.fixture(scope="module")
def model():
    """A stack of four, of which PEFT's names are ``layers.0.proj`` and so on."""
    make = eqx.filter_jit(eqx.filter_vmap(lambda key: eqx.nn.Linear(N, N, key=key)))
    return {"layers": {"proj": make(jr.split(jr.key(0), L))}}


def run(model, x):
    arrays, static = eqx.partition(model["layers"]["proj"], eqx.is_array)
    step = lambda x, layer: (jnp.tanh(eqx.combine(layer, static)(x)), None)
    return jax.lax.scan(step, x, arrays)[0]


def each(make):
    """A rule that answers with a kind of its own rank for each layer."""
    return lambda path, site: [make(r) if r else None for r in RANKS]


@eqx.filter_jit
def made(model, kinds, key, data=None):
    return lrjax.adapt(model, kinds, key=key, data=data)


@eqx.filter_jit
def trained(model, kinds, key):
    """An adapter of which all trained numbers were moved, those of masked columns too."""
    params, frozen = lrjax.partition(lrjax.adapt(model, kinds, key=key))
    return eqx.combine(moved(params, key), frozen)


def lora(law):
    return each(lambda r: lrjax.LoRA(r, ALPHA, rank_stabilized=LAWS[law][0]))


merged = eqx.filter_jit(lambda model, a: lrjax.merge(model, a)["layers"]["proj"].weight)


@pytest.mark.slow
@laws
def test_is_its_dense_formula_with_the_scale_of_its_rank(law, model, getkey):
    adapters = trained(model, lora(law), getkey())
    np.testing.assert_array_equal(room.active_ranks(adapters)[PATH], RANKS)
    weights = np.asarray(model["layers"]["proj"].weight, np.float64)
    pair, scale = adapters[PATH].pair, LAWS[law][1]
    want = [
        reference.lora(w, b[:, :r], a[:, :r].T, scale(r)) if r else w
        for w, b, a, r in zip(
            weights,
            np.asarray(pair.left, np.float64),
            np.asarray(pair.right, np.float64),
            RANKS,
            strict=True,
        )
    ]
    got = merged(model, adapters)
    assert_close(got, np.stack(want).astype(np.float32), condition=10)
    # The widest factors under masks are of the same form.
    whole = made(model, lrjax.LoRA(R, ALPHA, rank_stabilized=LAWS[law][0]), getkey())
    masked = room.with_ranks(whole, {PATH: RANKS})
    assert jax.tree.structure(masked) == jax.tree.structure(adapters)
    np.testing.assert_array_equal(masked[PATH].mask, adapters[PATH].mask)
    there = np.array(RANKS) > 0
    assert_close(masked[PATH].scale[there], adapters[PATH].scale[there])
    # Numbers in use: two sides of a square matrix.
    assert adapters.summary().splitlines()[-1].split()[-1] == str(2 * N * sum(RANKS))
    assert " 0–4 " in adapters.summary()


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "lora_ga", "eva"])
def test_each_layer_starts_from_the_best_factors_of_its_rank(init, model, getkey):
    """As it does alone: prefixes of the widest start are others, in LoRA-GA say."""
    stack = model["layers"]["proj"]
    kind = lambda r: lrjax.LoRA(r, ALPHA, init=init)
    if init == "eva":
        batches = jr.normal(getkey(), (1, 20, N))
        call = lambda model, xs: jax.vmap(lambda x: run(model, x))(xs)
        data = room.activation_statistics(call, model, batches)
    else:
        data = {PATH: jr.normal(getkey(), (L, N, N))} if init == "lora_ga" else None
    adapters = made(model, each(kind), getkey(), data)
    pair, scale = lrjax.adapters.as_lora(adapters, model)[PATH].factors()
    assert_close(merged(model, adapters), stack.weight, condition=100)
    for i in (1, 3):
        cut = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        own = None if data is None else {"": cut(data[PATH])}
        alone = made(cut(stack), kind(RANKS[i]), getkey(), own)[""]
        for side in ("left", "right"):
            got = getattr(adapters[PATH].pair, side)[i]
            assert_close(got[:, : RANKS[i]], getattr(alone.pair, side), condition=100)
            assert not np.any(got[:, RANKS[i] :])
        assert_close(scale[i], alone.scale)
    assert pair.rank == (R if init == "eva" else 2 * R)


def test_equal_kinds_in_a_list_are_the_one_kind(model, getkey):
    key = getkey()
    listed = made(model, lambda path, site: [lrjax.DoRA(2) for _ in range(L)], key)
    assert_close(listed, made(model, lrjax.DoRA(2), key))


@pytest.mark.slow
def test_bound_is_merged_and_masked_columns_have_no_gradient(model, getkey):
    """In a scan, under vmap over adapters, for DoRA with missing layers as well."""
    x = jr.normal(getkey(), (N,))
    for kinds in (lora("LoRA"), each(lambda r: lrjax.DoRA(r, ALPHA))):
        params, frozen = lrjax.partition(made(model, kinds, getkey()))
        two = [moved(params, getkey()), moved(params, getkey())]
        two = jax.tree.map(lambda *xs: jnp.stack(xs), *two)

        def both(params, frozen=frozen):
            of = lambda attach: (
                lambda p: jnp.sum(run(attach(model, eqx.combine(p, frozen)), x) ** 2)
            )
            return [jax.value_and_grad(of(f))(params) for f in (lrjax.bind, lrjax.merge)]

        bound, plain = jax.jit(jax.vmap(both))(two)
        assert_close(bound, plain, condition=1e3)
        gradient = room.map_adapters(lambda _, a: getattr(a, "inner", a), bound[1])[PATH]
        unused = np.arange(R) >= np.array(RANKS)[:, None]
        for side in (gradient.pair.left, gradient.pair.right):
            nothing = np.all(np.asarray(side) == 0, axis=2)
            np.testing.assert_array_equal(nothing, np.broadcast_to(unused, (2, L, R)))


@pytest.mark.slow_but("rsLoRA")
@laws
def test_files_of_peft_have_the_rank_of_each_layer(law, model, getkey, tmp_path):
    adapters = trained(model, lora(law), getkey())
    lrjax.save_peft(tmp_path, model, adapters)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    named = {f"^layers\\.{i}\\.proj": r for i, r in enumerate(RANKS) if r}
    usual = config["r"]
    assert config["rank_pattern"] == {k: r for k, r in named.items() if r != usual}
    assert (config["lora_alpha"], config["alpha_pattern"]) == (ALPHA, {})
    assert config["use_rslora"] is LAWS[law][0]
    assert config["target_modules"] == [f"layers.{i}.proj" for i in (0, 1, 3)]
    again = lrjax.load_peft(tmp_path, model)
    np.testing.assert_array_equal(room.active_ranks(again)[PATH], RANKS)
    kept = room.with_ranks(adapters, {PATH: RANKS})[PATH]
    used = kept.mask[:, None, :]
    zeroed = lrjax.LowRank(kept.pair.left * used, kept.pair.right * used)
    want = eqx.tree_at(lambda a: a.layers[PATH].pair, adapters, zeroed)
    assert_close(again, want)
    # As the layers apart, too.
    stack = model["layers"]["proj"]
    cut = lambda i: jax.tree.map(lambda x: x[i], stack)
    apart = {"layers": [{"proj": cut(i)} for i in range(L)]}
    loaded = lrjax.load_peft(tmp_path, apart)
    assert loaded["layers.1.proj"].pair.rank == 4
    got = [one["proj"].weight for one in lrjax.merge(apart, loaded)["layers"]]
    assert_close(jnp.stack(got), merged(model, adapters), condition=10)


@pytest.mark.slow
def test_experts_of_other_ranks_share_one_alpha(getkey, tmp_path):
    """PEFT holds all experts of a layer in one pair: their scales go into it."""
    tree = {"layers": {"up": jr.normal(getkey(), (2, 3, N, N))}}
    spec = lrjax.MatrixSpec(rows=(2,), cols=(3,))
    axes = lambda path, x: spec
    ranks = [[1, 2, 3], [3, 1, 1]]
    kinds = lambda path, site: [[lrjax.LoRA(r, ALPHA) for r in own] for own in ranks]
    adapt = eqx.filter_jit(
        lambda key: lrjax.adapt(tree, kinds, where=["up"], axes=axes, key=key)
    )
    params, frozen = lrjax.partition(adapt(getkey()))
    adapters = eqx.combine(moved(params, getkey()), frozen)
    assert room.active_ranks(adapters)["layers.up"].tolist() == ranks
    lrjax.save_peft(tmp_path, tree, adapters)
    again = lrjax.load_peft(tmp_path, tree, axes=axes)
    got, want = (lrjax.merge(tree, a)["layers"]["up"] for a in (again, adapters))
    assert_close(got, want, condition=10)


@pytest.mark.slow_but("rsLoRA")
@laws
def test_plain_lora_and_fewer_columns_are_the_same(law, model, getkey):
    ranks = [1, 3, 0, 2]
    adapters = room.with_ranks(trained(model, lora(law), getkey()), {PATH: ranks})
    want = merged(model, adapters)
    plain, thin = room.as_lora(adapters, model), room.drop_ranks(adapters)
    assert thin[PATH].pair.rank == 3
    for other in (plain, thin, room.drop_ranks(plain)):
        np.testing.assert_array_equal(room.active_ranks(other)[PATH], ranks)
        assert_close(merged(model, other), want, condition=10)


@pytest.mark.slow
def test_what_is_refused(model, getkey):
    adapt = lambda rule: lrjax.adapt(model, rule, key=getkey())
    with pytest.raises(ValueError, match=r"one rank, got \[4, 8\].*list of kinds.*LoRA"):
        checked_rank("LoRA", [4, 8])
    with pytest.raises(ValueError, match=r"a list of 2 for layers\.proj, which has 4"):
        adapt(lambda path, site: [lrjax.LoRA(1), lrjax.LoRA(2)])
    layer = eqx.nn.Linear(N, N, key=getkey())
    with pytest.raises(ValueError, match="a list of 1 for the root, which is no stack"):
        lrjax.adapt(layer, lambda path, site: [lrjax.LoRA(1)], key=getkey())
    with pytest.raises(TypeError, match=r"such as lrjax\.LoRA\(8\) or None, got 3"):
        adapt(lambda path, site: [3, 4, 5, 6])
    with pytest.raises(ValueError, match="in more than the rank of a LoRA"):
        adapt(lambda path, site: [lrjax.LoRA(1), lrjax.DoRA(1)] * 2)
    with pytest.raises(ValueError, match="takes a Core for each"):
        adapt(lambda path, site: [lrjax.LoRAXS(1)] * 3 + [None])
    with pytest.raises(ValueError, match="takes a Kronecker for each"):
        adapt(lambda path, site: [room.LoKr(1)] * 3 + [None])
    with pytest.raises(ValueError, match="answered None for every site"):
        adapt(lambda path, site: [None] * L)
    adapters = made(model, lrjax.LoRA(R), getkey())
    with pytest.raises(ValueError, match=r"shape \(3,\) for 'layers.proj', which is a"):
        room.with_ranks(adapters, {PATH: [1, 2, 3]})
    with pytest.raises(ValueError, match="whole numbers from 0 to 4"):
        room.with_ranks(adapters, {PATH: [1.5, 2, 3, 4]})
    with pytest.raises(ValueError, match=r"shape \(2,\) for '', which is no stack"):
        room.with_ranks(lrjax.adapt(layer, lrjax.LoRA(R), key=getkey()), {"": [1, 2]})

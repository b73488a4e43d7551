"""Whole models in fewer numbers: what they give, what they hold, what is refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import nn
from lrjax.compression import (
    common_energy_ranks,
    compress,
    corrections,
    decompose,
    layer_statistics,
    uniform_ranks,
)
from tests.adapters.models import tower
from tests.helpers import assert_close, relative_error
from tests.reference import compression as reference


METHODS = ("svd", "inputs", "covariance", "sensitivity")


def numbers(tree):
    return sum(x.size for x in jax.tree.leaves(tree) if eqx.is_inexact_array(x))


@eqx.filter_jit
def run(model, batch):
    return jax.vmap(model)(batch)


@pytest.fixture(scope="module")
def scanned():
    """An embedding, three blocks of attention in a scan, a head; and its statistics."""
    model = tower(jr.key(0))
    tokens = jr.randint(jr.key(1), (3, 30, 6), 0, 11)
    return model, tokens, layer_statistics(model, iter(tokens))


@pytest.mark.slow_but("inputs")
@pytest.mark.parametrize("method", METHODS)
def test_a_budget_is_kept_and_all_of_it_is_the_model(method, scanned):
    """As many numbers as the report says, in a model that is called as before."""
    model, tokens, statistics = scanned
    parts = decompose(model, statistics, method=method)
    for budget in (0.6, 1200):
        small, report = parts.cut(budget=budget)
        assert report.before == numbers(model)
        assert report.after == numbers(small)
        assert report.after <= (0.6 * report.before if budget == 0.6 else budget)
        assert eqx.filter_eval_shape(run, small, tokens[0]).shape == (30, 3)
        assert sum(row.rank is not None for row in report.layers) > 0
        for row in report.layers:
            assert (row.rank is None) == (row.kept_dense is not None)
            assert (row.error == 0) == (row.output_error == 0) == (row.rank is None)
        assert "of outputs" in str(report)
    whole, report = parts.cut(budget=1.0)
    assert [row.rank for row in report.layers] == [None] * 8
    assert_close(run(whole, tokens[0]), run(model, tokens[0]), condition=1)


@pytest.mark.slow
def test_what_the_fit_weighs_is_what_it_keeps(scanned):
    """At the same ranks each error is least for the fit that weighs by it."""
    model, tokens, statistics = scanned
    ranks = {path: 2 for path in statistics if path != "head"}
    rows, outputs = {}, {}
    for method in METHODS:
        parts = decompose(model, statistics, method=method, damping=1e-6)
        small, report = parts.cut(budget=1.0, allocate=lambda *_: ranks)
        rows[method] = {row.path: row for row in report.layers if row.rank is not None}
        outputs[method] = relative_error(run(small, tokens[0]), run(model, tokens[0]))
    for path in rows["svd"]:
        of = lambda name, path=path: {m: getattr(r[path], name) for m, r in rows.items()}
        plain, weighed = of("error"), of("output_error")
        assert plain["svd"] <= min(plain.values()) * 1.0001
        assert weighed["inputs"] <= min(weighed[m] for m in ("svd", "sensitivity")) * 1.0001
        assert weighed["covariance"] <= weighed["inputs"] * 1.0001
    assert outputs["sensitivity"] < outputs["svd"]


@pytest.mark.slow
def test_the_bias_makes_good_what_inputs_share(x64, getkey):
    """Centred data in a subspace: exact, with the mean anywhere; and that of the paper."""
    keys = jr.split(getkey(), 4)
    layer = eqx.nn.Linear(8, 6, key=keys[0])
    thin = jr.normal(keys[1], (50, 2)) @ jr.normal(keys[2], (2, 8))
    inputs = thin + 3 * jr.normal(keys[3], (8,))[None]
    fixed = lambda rank: lambda *_: {"": rank}
    statistics = layer_statistics(layer, [inputs], where=[""])
    parts = decompose(layer, statistics, method="covariance", damping=0.0)
    small, report = parts.cut(budget=1.0, allocate=fixed(2))
    assert_close(run(small, inputs), run(layer, inputs), condition=1e4)
    assert report.layers[0].output_error < 1e-6
    without = decompose(layer, statistics, method="inputs", damping=0.0)
    alone, _ = without.cut(budget=1.0, allocate=fixed(2))
    assert relative_error(run(alone, inputs), run(layer, inputs)) > 1e-3
    small, _ = parts.cut(budget=1.0, allocate=fixed(1))
    weight, bias = (np.asarray(x) for x in (layer.weight, layer.bias))
    want = reference.mimicked_features(weight, bias, np.asarray(inputs), 1)
    assert relative_error(small.weight.materialize(), want[0]) < 1e-10
    assert relative_error(small.bias, want[1]) < 1e-10


@pytest.mark.slow
def test_a_table_of_entries_around_a_mean(x64, getkey):
    """Rows in a plane that does not go through zero, as often as they are asked for."""
    plane = jr.normal(getkey(), (20, 2)) @ jr.normal(getkey(), (2, 6))
    table = plane + 5 * jr.normal(getkey(), (6,))[None]
    embedding = eqx.nn.Embedding(weight=table)
    asked = jr.randint(getkey(), (40,), 0, 20)
    statistics = layer_statistics(embedding, [asked], where=[""])
    parts = decompose(embedding, statistics, method="covariance", damping=0.0)
    small, _ = parts.cut(budget=1.0, allocate=lambda *_: {"": 2})
    assert small.weight.shape == (20, 6)
    assert_close(run(small, asked), run(embedding, asked), condition=1e4)
    assert_close(small.to_dense().weight, nn.densify(small).weight, condition=10)
    # Those of one batch alone: the others are far away, and do not count.
    often = jnp.array([3, 3, 3, 7, 7, 12])
    alone = decompose(
        embedding, layer_statistics(embedding, [often]), method="inputs", damping=0.0
    )
    two, _ = alone.cut(budget=1.0, allocate=lambda *_: {"": 3})
    assert_close(run(two, often), run(embedding, often), condition=1e4)


@pytest.mark.slow
def test_convolutions_with_groups_fit_each_group(getkey):
    """Full rank is exact; one that its inputs allow is exact on them."""
    conv = eqx.nn.Conv2d(6, 8, 3, groups=2, padding=1, key=getkey())
    images = jr.normal(getkey(), (12, 2, 5, 5))
    turn = jr.normal(getkey(), (6, 2))
    images = jnp.einsum("cd,bdhw->bchw", turn, images)
    for method in ("covariance", "sensitivity"):
        parts = decompose(
            conv, layer_statistics(conv, [images]), method=method, damping=1e-5
        )
        assert parts.shapes == {"": (2, 4, 27)}
        small, report = parts.cut(budget=1.0, allocate=lambda *_: {"": 3})
        assert small.weight.shape == (2, 4, 27)
        assert report.layers[0].rank == 3
        assert eqx.filter_eval_shape(run, small, images).shape == (12, 8, 5, 5)
        errors = [
            relative_error(
                run(parts.cut(budget=1.0, allocate=lambda *_, r=r: {"": r})[0], images),
                run(conv, images),
            )
            for r in (1, 2, 3)
        ]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.slow
def test_a_stack_is_its_layers_and_batches_in_any_order(getkey):
    """One rank, factors for each; the sums are plain sums."""
    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(6, 6, key=key))(
        jr.split(getkey(), 3)
    )
    scan = lambda layers, x: jax.lax.scan(
        lambda x, layer: (jnp.tanh(jax.vmap(layer)(x)), None), x, layers
    )[0]
    batches = jr.normal(getkey(), (4, 20, 6))
    cut = lambda statistics: decompose(layers, statistics, method="inputs").cut(
        budget=1.0, allocate=lambda *_: {"": 2}
    )[0]
    statistics = layer_statistics(layers, batches, call=scan, sensitivity=False)
    stacked = cut(statistics)
    again = cut(layer_statistics(layers, batches[::-1], call=scan, sensitivity=False))
    assert stacked.weight.left.shape == (3, 6, 2)
    assert_close(again.weight.materialize(), stacked.weight.materialize(), condition=1e3)
    for i in range(3):
        pick = lambda x, i=i: x[i] if eqx.is_array(x) else x
        one = jax.tree.map(pick, layers)
        found = decompose(one, {"": jax.tree.map(pick, statistics[""])}, method="inputs")
        want = found.parts[""].factors.cut(2).materialize()
        assert_close(stacked.weight.materialize()[i], want, condition=1e3)


@pytest.mark.slow
def test_energy_is_kept_by_outputs_and_inputs(scanned):
    model, tokens, _ = scanned
    small, report = compress(model, tokens, energy=0.9, method="inputs")
    for row in report.layers:
        if row.rank is not None:
            assert row.output_error**2 <= 0.1 * 1.05
    both, narrow = compress(model, tokens, energy=0.9, method="projections")
    ranks = {row.path: row.rank for row in report.layers}
    # The narrower of the two: never wider than that of the outputs alone.
    for row in narrow.layers:
        if row.rank is not None and ranks[row.path] is not None:
            assert row.rank <= ranks[row.path]
    shape = lambda model: eqx.filter_eval_shape(run, model, tokens[0]).shape
    assert shape(both) == shape(small)


@pytest.mark.slow
def test_corrections_of_a_pruned_model_are_adapters(getkey):
    """Beside the weights they are nearer to the model, and at full rank they are it."""
    model = eqx.nn.MLP(12, 4, 16, 2, key=getkey())
    batches = jr.normal(getkey(), (2, 40, 12))
    prune = lambda x: jnp.where(jnp.abs(x) < 0.1, 0, x) if x.ndim == 2 else x
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    pruned = eqx.combine(jax.tree.map(prune, arrays), static)
    statistics = layer_statistics(model, batches)

    def corrected(rank, **settings):
        pairs = corrections(model, pruned, statistics, rank, **settings)
        put = lambda layer, pair: eqx.tree_at(
            lambda layer: layer.weight, layer, layer.weight + pair.materialize()
        )
        layers = [put(one, pairs[f"layers.{i}"]) for i, one in enumerate(pruned.layers)]
        return eqx.tree_at(lambda m: m.layers, pruned, tuple(layers))

    x = batches[0]
    error = lambda other: relative_error(run(other, x), run(model, x))
    assert error(corrected(3)) < error(pruned)
    assert error(corrected(3, sensitivity=True)) < error(pruned)
    assert_close(run(corrected(16), x), run(model, x), condition=1e3)
    with pytest.raises(ValueError, match=r"no layer 'layers\.7' in both"):
        corrections(model, pruned, {"layers.7": statistics["layers.0"]}, 2)


def test_even_ranks_keep_a_budget(scanned):
    model, _, statistics = scanned
    parts = decompose(model, statistics, method="inputs")
    spectra = {path: np.asarray(x) for path, x in parts.spectra.items()}
    weights = sum(map(np.prod, parts.shapes.values()))
    for allocate in (uniform_ranks, common_energy_ranks):
        for share in (0.4, 0.7):
            _, report = parts.cut(budget=share, allocate=allocate)
            assert report.ratio <= share
        with pytest.raises(ValueError, match="rank 1 in every layer takes"):
            allocate(spectra, parts.shapes, 100)
    # One number more and the next share of energy would fit: the bisection is at its end.
    ranks = common_energy_ranks(spectra, parts.shapes, int(0.7 * weights))
    kept = {
        path: np.sum(spectra[path][..., : ranks.get(path, 99)] ** 2)
        / np.sum(spectra[path] ** 2)
        for path in spectra
    }
    above = lrjax.lowrank.energy_ranks(spectra, float(min(kept.values())) + 1e-3)
    cost = sum(
        min(lrjax.lowrank.parameter_count(shape, above[path]), np.prod(shape))
        for path, shape in parts.shapes.items()
    )
    assert cost > int(0.7 * weights)


@pytest.mark.slow
def test_a_file_brings_back_the_model(scanned, tmp_path):
    """Into what factorize makes of the same ranks."""
    model, tokens, statistics = scanned
    small, report = decompose(model, statistics).cut(budget=0.6)
    eqx.tree_serialise_leaves(tmp_path / "small.eqx", small)
    ranks = {row.path: row.rank for row in report.layers if row.rank is not None}
    like, _ = nn.factorize(tower(jr.key(9)), rank=ranks)
    again = eqx.tree_deserialise_leaves(tmp_path / "small.eqx", like)
    assert eqx.tree_equal(again, small)
    np.testing.assert_array_equal(run(again, tokens[0]), run(small, tokens[0]))


@pytest.mark.slow
def test_half_precision_stays(getkey):
    cast = lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x
    model = jax.tree.map(cast, eqx.nn.MLP(8, 4, 16, 1, key=getkey()))
    batches = jr.normal(getkey(), (2, 20, 8), jnp.bfloat16)
    small, _ = compress(model, batches, budget=0.7)
    for leaf in jax.tree.leaves(eqx.filter(small, eqx.is_array)):
        assert leaf.dtype == jnp.bfloat16
    assert bool(jnp.all(jnp.isfinite(run(small, batches[0]))))


@pytest.mark.slow
def test_what_cannot_be_compressed_is_told(scanned, getkey):
    model, tokens, statistics = scanned
    pair = {
        "used": eqx.nn.Linear(3, 3, key=getkey()),
        "idle": eqx.nn.Linear(3, 3, key=getkey()),
    }
    call = lambda model, x: jax.vmap(model["used"])(x)
    x = jr.normal(getkey(), (2, 5, 3))
    _, report = compress(pair, x, budget=1.0, call=call)
    idle = {row.path: row.kept_dense for row in report.layers}["idle"]
    assert idle == "its inputs were not seen"
    with pytest.raises(ValueError, match=r"No inputs were seen at \['idle'\]"):
        compress(pair, x, budget=0.9, call=call, where=["idle"])
    with pytest.raises(ValueError, match="no batches"):
        compress(model, [], budget=0.5)
    with pytest.raises(ValueError, match="one of budget= and energy="):
        compress(model, tokens)
    with pytest.raises(ValueError, match=r"share of the model, in \(0, 1\]"):
        compress(model, tokens, budget=1.5)
    with pytest.raises(ValueError, match="finds ranks by energy="):
        decompose(model, statistics, method="projections").cut(budget=0.5)
    with pytest.raises(ValueError, match="budget"):
        decompose(model, statistics).cut(budget=0.01)
    bare = layer_statistics(model, tokens, sensitivity=False)
    with pytest.raises(ValueError, match="hold no sensitivity"):
        decompose(model, bare)
    with pytest.raises(ValueError, match="of no layer of this model"):
        decompose(model, {"head": statistics["blocks.down"]})

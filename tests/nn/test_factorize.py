"""A model in factors is the model with each weight replaced by its best approximation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

import lrjax
from lrjax import nn
from tests.helpers import assert_close, tol, with_spectrum


class Block(eqx.Module):
    """A convolution, attention and an MLP with an embedding before and a head behind."""

    embedding: eqx.nn.Embedding
    conv: eqx.nn.Conv1d
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key, 5)
        self.embedding = eqx.nn.Embedding(11, 8, key=keys[0])
        self.conv = eqx.nn.Conv1d(8, 8, 3, padding="SAME", groups=2, key=keys[1])
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=keys[2])
        self.up = eqx.nn.Linear(8, 12, key=keys[3])
        self.norm = eqx.nn.LayerNorm(12)
        self.head = eqx.nn.Linear(12, 11, key=keys[4])

    def __call__(self, tokens):
        x = jax.vmap(self.embedding)(tokens)
        x = x + self.conv(x.T).T
        x = x + self.attention(x, x, x)
        return jax.vmap(lambda v: self.head(self.norm(self.up(v))))(x)


def best(matrix, rank):
    """The best approximation of a rank, in float64."""
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def assert_best(got, matrix, rank):
    """It is the best approximation, as far as the gap behind its rank defines one."""
    s = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    condition = np.max(s[..., 0] / (s[..., rank - 1] - s[..., rank]))
    assert_close(got, best(matrix, rank), condition=condition)


INSIDE = ["conv", *(f"attention.{n}_proj" for n in ("query", "key", "value", "output"))]


@pytest.mark.slow_but("svd")
@pytest.mark.parametrize("form", ["pair", "svd"])
def test_every_chosen_weight_is_its_best_approximation(form, getkey):
    model = Block(getkey())
    small, report = nn.factorize(model, rank=2, form=form)
    assert [row.path for row in report.layers] == [*INSIDE, "up"]
    plain = nn.densify(small)
    assert jax.tree.structure(plain) == jax.tree.structure(model)
    for get in (
        lambda m: m.conv.weight.reshape(2, 4, 12),
        lambda m: m.attention.query_proj.weight,
        lambda m: m.attention.output_proj.weight,
        lambda m: m.up.weight,
    ):
        assert_best(get(plain), get(model), 2)
    rest = lambda m: (m.embedding, m.head, m.norm, m.up.bias, m.conv.bias)
    assert eqx.tree_equal(rest(plain), rest(model))
    tokens = jr.randint(getkey(), (5,), 0, 11)
    run = eqx.filter_jit(lambda model, tokens: model(tokens))
    assert_close(run(small, tokens), run(plain, tokens), condition=100)
    node = {"pair": lrjax.LowRank, "svd": lrjax.SVDForm}[form]
    assert isinstance(small.attention.query_proj.weight, node)


def test_the_report_counts_and_measures(getkey):
    model = Block(getkey())
    small, report = nn.factorize(model, rank=2)
    plain = nn.densify(small)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree) if eqx.is_array(x))
    assert (report.before, report.after) == (count(model), count(small))
    row = report.layers[-1]
    change = np.linalg.norm(plain.up.weight - model.up.weight)
    want = change / np.linalg.norm(model.up.weight)
    np.testing.assert_allclose(row.error, want, rtol=tol(model.up.weight, condition=10))
    assert row[:5] == ("up", (12, 8), 2, 96, 40)
    conv = report.layers[0]
    assert (conv.shape, conv.before, conv.after) == ((2, 4, 12), 96, 64)
    assert "up" in str(report)
    assert f"{report.ratio:.3f}" in str(report)


def test_where_factors_save_nothing_the_layer_stays(getkey):
    """8 × 8 at rank 4: 64 numbers either way."""
    model = Block(getkey())
    small, report = nn.factorize(model, rank=4, where=["query_proj", "up"])
    query, up = report.layers
    assert query.rank is None
    assert "no fewer numbers" in query.kept_dense
    assert small.attention.query_proj is model.attention.query_proj
    assert up.rank == 4


def test_ranks_are_given_in_many_ways(getkey):
    model = Block(getkey())
    of = lambda **given: {r.path: r.rank for r in nn.factorize(model, **given)[1].layers}
    assert of(rank={"up": 3, "embedding": 2}) == {"embedding": 2, "up": 3}
    assert of(rank=0.25, where="up|embedding") == {"embedding": 2, "up": 2}
    by_shape = lambda path, matrix: 3 if matrix.shape == (12, 8) else 1
    assert of(rank=by_shape, where=lambda path, _: path in ("up", "head")) == {
        "up": 3,
        "head": 1,
    }


def with_weights(spectra, key):
    """A chain of square layers with given singular values."""
    keys = jr.split(key, len(spectra))
    nodes = [eqx.nn.Linear(16, 16, use_bias=False, key=k) for k in keys]
    weights = [
        with_spectrum(k, 16, 16, s) for k, s in zip(keys, spectra.values(), strict=True)
    ]
    layers = dict(zip(spectra, nodes, strict=True))
    get = lambda layers: [layer.weight for layer in layers.values()]
    return eqx.tree_at(get, layers, weights)


def test_ranks_by_energy_and_by_budget(getkey):
    spectra = {"flat": [1.0] * 16, "steep": [4.0, 2.0] + [1e-2] * 14}
    model = with_weights(spectra, getkey())
    _, report = nn.factorize(model, energy=0.9999)
    flat, steep = report.layers
    assert (flat.rank, steep.rank) == (None, 2)  # all of its 16, which saves nothing
    assert steep.error <= 1e-2
    for budget in (160, 160 / 512):  # five columns: two are worth 4 and 2, three 1 each
        small, report = nn.factorize(model, budget=budget)
        assert [row.rank for row in report.layers] == [3, 2]
        assert report.after == 160
    assert isinstance(small["flat"], nn.LowRankLinear)
    _, report = nn.factorize(model, budget=256 + 64)
    flat, steep = report.layers
    assert (flat.rank, steep.rank) == (None, 2)
    assert "budget" in flat.kept_dense


@pytest.mark.slow
def test_a_stack_keeps_its_axis_and_shares_a_rank(getkey):
    stack = eqx.filter_vmap(lambda k: eqx.nn.Linear(16, 16, key=k))(jr.split(getkey(), 3))
    small, report = nn.factorize(stack, rank=4)
    (row,) = report.layers
    assert (row.shape, row.rank, row.after) == ((3, 16, 16), 4, 3 * 128)
    plain = nn.densify(small)
    assert_best(plain.weight, stack.weight, 4)
    arrays, static = eqx.partition(small, eqx.is_array)

    @jax.jit
    def scanned(x, arrays):
        step = lambda x, layer: (eqx.combine(layer, static)(x), None)
        return lax.scan(step, x, arrays)[0]

    x = want = jnp.ones(16)
    for k in range(3):
        want = np.asarray(plain.weight[k], np.float64) @ want + np.asarray(plain.bias[k])
    assert_close(scanned(x, arrays), want, condition=10)


@pytest.mark.slow_but("inputs")
@pytest.mark.parametrize("scheme", ["inputs", "outputs", "first", "last"])
def test_stacked_convolutions_are_folded_one_by_one(scheme, getkey):
    make = lambda key: eqx.nn.Conv2d(4, 4, 3, key=key)
    stack = eqx.filter_vmap(make)(jr.split(getkey(), 2))
    small, _ = nn.factorize({"conv": stack}, rank=2, scheme=scheme)
    got = nn.densify(small)["conv"].weight
    for kernel, approximation in zip(stack.weight, got, strict=True):
        fold = lambda x: nn.fold_kernel(x, scheme)
        assert_best(fold(approximation), fold(kernel), 2)


def test_a_compressed_model_is_saved_and_loaded(getkey, tmp_path):
    model = Block(getkey())
    ranks = {"up": 3, "conv": 1, "attention.key_proj": 2}
    small, _ = nn.factorize(model, rank=ranks)
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", small)
    like, _ = nn.factorize(Block(getkey()), rank=ranks)
    back = eqx.tree_deserialise_leaves(tmp_path / "model.eqx", like)
    assert eqx.tree_equal(back, small)


def test_in_bfloat16_and_of_rank_zero(getkey):
    """Decompositions run in float32; a weight of zeros has error zero."""
    model = {
        "a": eqx.nn.Linear(16, 16, key=getkey()),
        "b": eqx.nn.Linear(16, 16, key=getkey()),
    }
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    model = eqx.tree_at(lambda m: m["b"].weight, model, replace_fn=jnp.zeros_like)
    small, report = nn.factorize(model, rank=4)
    assert small["a"].weight.dtype == jnp.bfloat16
    assert report.layers[1].error == 0
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(small))
    want = best(model["a"].weight, 4)
    got = nn.densify(small)["a"].weight
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)


def padded(key, form, width=16, used=5):
    """A node of a width of which some columns alone are in use."""
    random = np.random.default_rng(np.asarray(jr.key_data(key)))
    left, right = (random.normal(size=(n, width)) for n in (20, 24))
    if form == "svd":
        core = np.zeros((width, width))
        core[:used, :used] = random.normal(size=(used, used))
        core[1], core[:, 2] = 0, 0  # a column of one side alone is in use
        parts = np.linalg.qr(left)[0], core, np.linalg.qr(right)[0]
        return lrjax.SVDForm(*(jnp.asarray(x, jnp.float32) for x in parts))
    left[:, 2 : 2 + width - used] = 0  # in the middle, of one factor alone
    return lrjax.LowRank(*(jnp.asarray(x, jnp.float32) for x in (left, right)))


def value(node):
    """The dense value of a node, in float64."""
    left, right = (np.asarray(x, np.float64) for x in (node.left, node.right))
    if isinstance(node, lrjax.LowRank):
        return left @ right.swapaxes(-1, -2)
    core = np.asarray(node.masked_core(), np.float64)
    return left @ core @ right.swapaxes(-1, -2)


@pytest.mark.slow_but("pair")
@pytest.mark.parametrize("form", ["pair", "svd"])
def test_compact_takes_out_what_is_multiplied_by_zero(form, getkey):
    node = padded(getkey(), form)
    layer = nn.LowRankLinear.from_node(node)
    small = nn.compact({"layer": layer})["layer"]
    assert small.weight.rank == 8
    assert_close(value(small.weight), value(node))
    assert nn.compact(layer, multiple=1).weight.rank == 5
    assert nn.compact(layer, multiple=12).weight.rank == 12
    assert nn.compact(layer, multiple=100).weight.rank == 16
    if form == "svd":
        left = np.asarray(small.weight.left)
        assert_close(left.T @ left, np.eye(8, dtype=left.dtype))


@pytest.mark.slow
def test_compact_takes_the_rank_of_a_stack_and_of_a_rank_given(getkey):
    deep = [padded(getkey(), "svd", used=k) for k in (3, 6)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *deep)
    small = nn.compact(stack, multiple=1)
    assert small.left.shape == (2, 20, 6)
    assert_close(value(small), value(stack))
    masked = lrjax.SVDForm(stack.left, stack.core, stack.right, jnp.array([2, 4]))
    small = nn.compact(masked, multiple=1)
    assert (small.rank, small.active) == (4, None)
    assert_close(value(small), value(masked))


@pytest.mark.slow
def test_compact_cuts_each_axis_of_a_tucker_form(getkey):
    conv = nn.TuckerConv(2, 6, 8, 3, (8, 6), key=getkey())
    core = conv.weight.core.at[5:].set(0).at[:, 0].set(0)
    conv = eqx.tree_at(lambda c: c.weight.core, conv, core)
    small = nn.compact(conv, multiple=1)
    assert small.weight.ranks == (5, 5, 3, 3)
    assert_close(small.weight.materialize(), conv.weight.materialize())


class Gated(eqx.nn.Linear):
    """A linear layer that does more than its weight."""

    def __call__(self, x, *, key=None):
        return jax.nn.sigmoid(super().__call__(x))


def test_what_cannot_be_factorized_is_said(getkey):
    linear = lambda n=8: eqx.nn.Linear(n, n, key=getkey())
    normed = eqx.nn.WeightNorm(linear())
    model = {"gated": Gated(8, 8, key=getkey()), "normed": normed, "plain": linear()}
    small, report = nn.factorize(model, rank=2)
    kept = {row.path: row.kept_dense for row in report.layers}
    assert kept.pop("plain") is None
    assert "Gated may do more" in kept.pop("gated")
    ((path, reason),) = kept.items()
    assert path == "normed.layer"
    assert "another weight out of its own" in reason
    assert small["gated"] is model["gated"]
    with pytest.raises(ValueError, match="gated cannot be factorized: Gated may do more"):
        nn.factorize(model, rank=2, where=["gated"])
    transposed = {"up": eqx.nn.ConvTranspose1d(8, 8, 3, key=getkey()), "plain": linear()}
    with pytest.raises(ValueError, match="up cannot be factorized"):
        nn.factorize(transposed, rank=2, where="up")
    vectors = {"scale": jnp.ones((8, 8)), "plain": linear()}
    with pytest.raises(ValueError, match="scale cannot be factorized: it is an array"):
        nn.factorize(vectors, rank=2, where="scale")


def test_tied_weights_are_not_untied(getkey):
    pair = (eqx.nn.Embedding(8, 8, key=getkey()), eqx.nn.Linear(8, 8, key=getkey()))
    tied = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)
    for where in ("pytree.0", "pytree.1"):
        with pytest.raises(ValueError, match="tied to another layer"):
            nn.factorize(tied, rank=2, where=[where])
    layer = eqx.nn.Linear(8, 8, key=getkey())
    with pytest.raises(ValueError, match="in the tree 2 times"):
        nn.factorize([layer, layer], rank=2)


def test_factorize_refuses_what_it_is_not_told(getkey):
    model = Block(getkey())
    with pytest.raises(ValueError, match="one of rank=, energy= and budget="):
        nn.factorize(model)
    with pytest.raises(ValueError, match="one of rank=, energy= and budget="):
        nn.factorize(model, rank=2, energy=0.9)
    with pytest.raises(ValueError, match="has no entry for up"):
        nn.factorize(model, rank={"head": 2}, where="up|head")
    with pytest.raises(ValueError, match="picked nothing"):
        nn.factorize(model, rank=2, where="nothing")
    with pytest.raises(ValueError, match="rank must be a positive int"):
        nn.factorize(model, rank=0)
    with pytest.raises(ValueError, match="multiple of at least 1"):
        nn.compact(model, multiple=0)

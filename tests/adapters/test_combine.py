"""Several adapters as one: W' = W + Σ w_k (W'_k − W)."""

import functools

import equinox as eqx
import jax
import jax.random as jr
import pytest

import lrjax
from lrjax import merging
from tests.helpers import assert_close


MODEL = eqx.nn.MLP(6, 5, 8, 2, key=jr.key(0))
COMBINE = lrjax.adapters.combine


def trained(kind, key, where=None):
    """Adapters with random numbers in the place of what training would leave."""
    k_init, k_noise = jr.split(key)
    adapters = lrjax.adapt(MODEL, kind, where=where, key=k_init)
    params, frozen = lrjax.partition(adapters)
    leaves, structure = jax.tree.flatten(params)
    keys = jr.split(k_noise, len(leaves))
    noisy = [x + 0.3 * jr.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return eqx.combine(structure.unflatten(noisy), frozen)


def weights(model):
    return jax.tree.leaves(eqx.filter(model, eqx.is_array))


def expected(adapters, factors):
    merged = [weights(lrjax.merge(MODEL, own)) for own in adapters]
    base = weights(MODEL)
    return [
        b + sum(f * (own[i] - b) for f, own in zip(factors, merged, strict=True))
        for i, b in enumerate(base)
    ]


KINDS = {
    "ranks and scales": [lrjax.LoRA(1, 4), lrjax.LoRA(3, 2), lrjax.LoRA(2)],
    "rank-stabilized": [lrjax.LoRA(2, 4, rank_stabilized=True), lrjax.LoRA(4, 4)],
    "residual start": [lrjax.LoRA(2, init="pissa"), lrjax.LoRA(2)],
    "pools and cores": [lrjax.VeRA(rank=4), lrjax.LoRAXS(rank=2), lrjax.LoRA(2)],
    "no products": [lrjax.DoRA(2), lrjax.LoRA(2), lrjax.adapters.Full()],
}


@pytest.mark.slow_but("rank-stabilized")
@pytest.mark.parametrize("name", KINDS)
def test_changes_of_any_kind_are_summed(name, getkey):
    adapters = [trained(kind, getkey()) for kind in KINDS[name]]
    factors = [0.5, -1.5, 2.0][: len(adapters)]
    got = lrjax.merge(MODEL, COMBINE(adapters, factors, MODEL))
    for one, want in zip(weights(got), expected(adapters, factors), strict=True):
        assert_close(one, want, rtol=2e-5)


@pytest.mark.slow_but("kind0")
@pytest.mark.parametrize("kind", [lrjax.LoRA(2, 5, rank_stabilized=True), lrjax.DoRA(2)])
def test_one_adapter_of_weight_one_comes_back(kind, getkey):
    own = trained(kind, getkey())
    got = lrjax.merge(MODEL, COMBINE([own], [1.0], MODEL))
    for one, want in zip(weights(got), weights(lrjax.merge(MODEL, own)), strict=True):
        assert_close(one, want, rtol=2e-5)
    x = jr.normal(getkey(), (6,))
    bound = lrjax.bind(MODEL, COMBINE([own], [1.0], MODEL))
    assert_close(bound(x), lrjax.bind(MODEL, own)(x), rtol=1e-4)


def test_layers_that_only_one_adapts(getkey):
    last = trained(lrjax.LoRA(2), getkey(), where=lambda path, _: path == "layers.2")
    rest = trained(lrjax.LoRA(1), getkey())
    both = COMBINE([rest, last], [1.0, 3.0], MODEL)
    assert {p: a.pair.rank for p, a in both.layers.items()} == {
        "layers.0": 1,
        "layers.1": 1,
        "layers.2": 3,
    }
    wants = expected([rest, last], [1.0, 3.0])
    for one, want in zip(weights(lrjax.merge(MODEL, both)), wants, strict=True):
        assert_close(one, want, rtol=2e-5)


@pytest.mark.slow
def test_a_rank_cuts_to_the_best_approximation(getkey):
    adapters = [trained(kind, getkey()) for kind in (lrjax.DoRA(2), lrjax.LoRA(3))]
    cut = COMBINE(adapters, [1.0, 1.0], MODEL, rank=2)
    base, exact = MODEL.layers[1].weight, expected(adapters, [1.0, 1.0])[2]
    assert exact.shape == base.shape
    want = lrjax.truncate(exact - base, 2).materialize()
    assert_close(cut["layers.1"].pair.materialize(), want, rtol=1e-4)


@pytest.mark.slow
def test_scales_are_shared_by_both_factors(getkey):
    """So that a merge factor by factor is that of the scaled products."""
    adapters = [trained(lrjax.LoRA(2, alpha), getkey()) for alpha in (2.0, 8.0)]
    rule = functools.partial(merging.ties, density=0.6)
    got = COMBINE(adapters, [0.5, 2.0], MODEL, rule=rule)["layers.1"].pair
    pairs = [own["layers.1"].pair for own in adapters]
    roots = [1.0, 2.0]
    scaled = [
        lrjax.LowRank(r * p.left, r * p.right) for r, p in zip(roots, pairs, strict=True)
    ]
    want = merging.ties(scaled, [0.5, 2.0], density=0.6)
    assert_close(got, want, rtol=1e-5)


def test_refusals(getkey):
    own = trained(lrjax.adapters.Full(), getkey())
    with pytest.raises(ValueError, match=r"one weight for each of 2 .* shape \(1,\)"):
        COMBINE([own, own], [1.0], MODEL)
    with pytest.raises(ValueError, match=r"a bias of its own at layers\.0"):
        COMBINE([own], [1.0], MODEL, rank=2)
    two = [trained(lrjax.LoRA(r), getkey()) for r in (1, 2)]
    with pytest.raises(ValueError, match="of one width"):
        COMBINE(two, [1.0, 1.0], MODEL, rule=merging.add_factors)

"""Every change of a weight as plain factors: exact, of a rank, of a share of its energy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax.adapters import Full, WithMagnitude, as_lora, change_errors
from tests.adapters.models import moved
from tests.helpers import assert_close, tol


def model_of(getkey):
    """A stack of layers, a table, and a Flax kernel that a rule reads."""
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(5, 7, key=key))
    return {
        "blocks": make(jr.split(getkey(), 3)),
        "table": eqx.nn.Embedding(6, 4, key=getkey()),
        "query": jr.normal(getkey(), (4, 2, 3)),
    }


def spec(path, array):
    wanted = path.endswith("query")
    return lrjax.MatrixSpec(rows=(1, 2), cols=(0,)) if wanted else None


CORES = {
    "blocks": lrjax.adapters.TinyLoRA(2, 3, group="v"),
    "blocks.bias": None,
    "table": lrjax.adapters.NoRA(2, 3),
    "query": lrjax.adapters.SVFit(2, dropout=0.1),
}


@eqx.filter_jit
def moved_adapters(model, kind, key):
    adapters = lrjax.adapt(model, kind, where=lambda path, _: True, axes=spec, key=key)
    params, frozen = lrjax.partition(adapters)
    return eqx.combine(moved(params, key), frozen)


@eqx.filter_jit
def converted(model, adapters, rank=None):
    """The plain adapters, what they lose, and both merged models."""
    plain = as_lora(adapters, model, rank=rank)
    errors = change_errors(adapters, plain, model)
    return plain, errors, lrjax.merge(model, adapters), lrjax.merge(model, plain)


@pytest.mark.slow_but("kind1")
@pytest.mark.parametrize(
    "kind",
    [
        lrjax.LoRA(2, 3.0, init="pissa", dropout=0.1),
        lrjax.LoRAXS(2),
        lrjax.VeRA(3),
        lrjax.TiedLoRA(2, 6.0),
        lambda path, site: CORES[path],
    ],
)
def test_products_are_exact(kind, getkey):
    model = model_of(getkey)
    adapters = moved_adapters(model, kind, getkey())
    plain, errors, before, after = converted(model, adapters)
    assert {type(a) for a in plain.layers.values()} == {lrjax.adapters.Factors}
    assert plain.pools == {}
    assert_close(after, before, condition=100)
    assert max(np.max(e) for e in errors.values()) < tol(after["query"], condition=10)
    rates = [a.dropout_rate() for a in adapters.layers.values()]
    assert eqx.tree_equal([a.dropout_rate() for a in plain.layers.values()], rates)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [lrjax.DoRA(2), lrjax.LoRA(4, -6.0)], ids=["dense", "product"]
)
def test_a_rank_keeps_the_leading_triplets_and_loses_the_others(kind, getkey):
    model = model_of(getkey)
    adapters = moved_adapters(model, kind, getkey())
    plain, errors, before, after = converted(model, adapters, 3)
    assert plain["blocks"].pair.rank == 3
    assert errors["blocks"].shape == (3,)
    for i in range(3):
        read = lambda tree, i=i: np.asarray(tree["blocks"].weight[i], np.float64)
        change, kept = read(before) - read(model), read(after) - read(model)
        u, s, vt = np.linalg.svd(change)
        np.testing.assert_allclose(kept, u[:, :3] * s[:3] @ vt[:3], atol=1e-4)
        lost = np.linalg.norm(s[3:]) / np.linalg.norm(s)
        np.testing.assert_allclose(errors["blocks"][i], lost, atol=1e-5)


def test_energy_takes_the_smallest_rank_that_keeps_it(getkey):
    model = {"w": jnp.zeros((4, 3))}
    adapters = lrjax.adapt(model, Full(), where="w", key=getkey())
    # Squares 16, 4, 1: the first has 16/21 of the sum, the first two 20/21.
    matrix = jnp.zeros((4, 3)).at[0, 2].set(4.0).at[3, 0].set(-2.0).at[1, 1].set(1.0)
    adapters = eqx.tree_at(lambda a: a["w"].matrix, adapters, matrix)
    for energy, rank in ((0.5, 1), (0.77, 2), (0.95, 2), (0.96, 3), (1.0, 3)):
        plain = as_lora(adapters, model, energy=energy)
        assert plain["w"].pair.rank == rank
    assert_close(lrjax.merge(model, plain)["w"], matrix)
    half = change_errors(adapters, as_lora(adapters, model, rank=2), model)["w"]
    np.testing.assert_allclose(half, 1 / np.sqrt(21), rtol=1e-5)
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda a: as_lora(a, model, energy=0.5))(adapters)


def test_narrow_factors_stay_as_they_are(getkey):
    model = model_of(getkey)
    adapters = lrjax.adapt(model["blocks"], lrjax.LoRA(2, 8.0), key=getkey())
    model = model["blocks"]
    assert eqx.tree_equal(as_lora(adapters, model, rank=2), adapters)


def test_what_is_no_product_is_refused_by_name(getkey):
    model = {"a": eqx.nn.Linear(5, 7, key=getkey()), "b": jnp.ones(3)}
    rule = lambda path, site: Full() if path == "b" else WithMagnitude(lrjax.LoRA(2))
    adapters = lrjax.adapt(model, rule, where=lambda path, _: path in "ab", key=getkey())
    with pytest.raises(ValueError, match=r"'a \(Magnitude\)', 'b \(FullCopy\)'.*rank= or"):
        as_lora(adapters, model)
    with pytest.raises(ValueError, match="b is a vector"):
        as_lora(adapters, model, rank=2)
    biased = lrjax.adapt(model, Full(), where="a", key=getkey())
    with pytest.raises(ValueError, match="'a' has a bias of its own"):
        as_lora(biased, model, rank=2)
    with pytest.raises(ValueError, match="Only one of the two"):
        change_errors(adapters, biased, model)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"rank": 2, "energy": 0.5}, "not both"),
        ({"rank": 0}, "as_lora needs a rank of at least 1"),
        ({"energy": 1.5}, r"must be in \(0, 1\]"),
    ],
)
def test_bad_arguments_are_refused(asked, message, getkey):
    with pytest.raises(ValueError, match=message):
        as_lora(lrjax.adapters.Adapters({}), {}, **asked)

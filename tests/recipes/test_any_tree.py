"""Recipes for factors are drop-ins: what they do with trees of other leaves."""

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

import lrjax
from tests.helpers import assert_close, random_low_rank


RECIPES = {
    "scaled_gd": lrjax.scaled_gd,
    "scaled_gd(alternating)": lambda rate: lrjax.scaled_gd(rate, order="alternating"),
    "scaled_subgradient": lrjax.scaled_subgradient,
    "scaled_subgradient(polyak)": lambda rate: lrjax.scaled_subgradient(rate, f_min=0.1),
    "prec_gd": lrjax.prec_gd,
    "levenberg_marquardt": lrjax.levenberg_marquardt,
    "levenberg_marquardt(search)": lambda rate: lrjax.levenberg_marquardt(
        rate, f_min="search"
    ),
    "opsa": lrjax.opsa,
    "opsa(rebalance)": lambda rate: lrjax.opsa(rate, f_min=None, rebalance=True),
    "subgm": lrjax.subgm,
    "loro": lrjax.loro,
    "lora_muon": lrjax.lora_muon,
    "lora_plus": lrjax.lora_plus,
    "lora_pro": lrjax.lora_pro,
    "scaled_adamw": lrjax.scaled_adamw,
    "ilora": lrjax.ilora,
    "ilora(preconditioned)": lambda rate: lrjax.ilora(rate, damping=0.1),
    "balora": lrjax.balora,
    "allora": lrjax.allora,
    "lora_mgpo": lrjax.lora_mgpo,
    "aflora": lambda rate: lrjax.aflora(rate, begin=1, end=9, weight_decay=0.0),
    "lora_rite": lrjax.lora_rite,
    "alt_lora": lrjax.alt_lora,
    "alt_lora_plus": lrjax.alt_lora_plus,
}
OF_ADAM = ("loro", "lora_muon", "lora_plus", "scaled_adamw", "lora_mgpo", "alt_lora_plus")
OF_ADAM += ("lora_rite",)
OF_ADAM += ("aflora", "allora", "balora", "ilora", "ilora(preconditioned)")
ADAM = [RECIPES[name] for name in OF_ADAM]
every = pytest.mark.parametrize("make", RECIPES.values(), ids=RECIPES.keys())


def tree(key):
    kw, kb = jr.split(key)
    matrix, bias = jr.normal(kw, (3, 2)), jr.normal(kb, (4,))
    return {"w": matrix, "b": bias, "s": jnp.array(2.0), "n": None}


@pytest.mark.slow_but("scaled_gd", "scaled_gd(alternating)", "scaled_subgradient")
@every
def test_without_a_node_it_is_the_plain_gradient_step(make, getkey):
    """Or Adam's, where that is the fallback; no params, value or grad are needed."""
    params, grads = tree(getkey()), tree(getkey())
    tx = make(0.1)
    numbers = {"b1": 0.7, "b2": 0.8} if make is lrjax.scaled_adamw else {}
    numbers |= {"eps": 1e-6} if make is lrjax.lora_rite else {}
    plain = optax.sgd(0.1, 0.9 if make is lrjax.lora_pro else None)
    if make is lrjax.alt_lora:
        plain = optax.chain(optax.ema(0.9, debias=False), plain)
    if make in ADAM:
        plain = optax.adam(0.1, **numbers)
    state, plain_state = tx.init(params), plain.init(params)
    for _ in range(2):
        step, state = tx.update(grads, state)
        want, plain_state = plain.update(grads, plain_state)
        assert_close(step, want)
    assert jax.tree.leaves(make(0.1).init({})) == jax.tree.leaves(tx.init({}))
    assert tx.update({}, tx.init({}))[0] == {}


@pytest.mark.slow_but("scaled_gd", "scaled_gd(alternating)", "scaled_adamw")
@every
def test_other_leaves_do_not_change_what_a_node_gets(make, getkey):
    """But for Polyak's step, which is one of all leaves."""
    x, g = random_low_rank(getkey(), 6, 5, 2), random_low_rank(getkey(), 6, 5, 2)
    params, grads = tree(getkey()), tree(getkey())
    both, both_grads = {**params, "x": x}, {**grads, "x": g}
    zero = jax.tree.map(jnp.zeros_like, grads)
    tx = optax.with_extra_args_support(make(0.1))
    value = {"value": jnp.array(3.0)}
    alone, _ = tx.update({"x": g}, tx.init({"x": x}), {"x": x}, grad={"x": g}, **value)
    still = {**zero, "x": g}
    step, state = tx.update(still, tx.init(both), both, grad=still, **value)
    assert_close(step["x"], alone["x"])
    assert_close({k: step[k] for k in zero}, zero)
    moved, _ = tx.update(both_grads, state, both, grad=both_grads, **value)
    assert all(jnp.linalg.norm(moved[k]) > 0 for k in ("w", "b", "s"))


@every
def test_states_can_be_mapped(make, getkey):
    for params in ({"x": random_low_rank(getkey(), 6, 5, 2)}, tree(getkey())):
        tx = make(0.1)
        state = tx.init(params)
        assert_close(optax.tree.map_params(tx, lambda a: a, state), state)


@pytest.mark.slow_but("scaled_gd", "prec_gd")
@pytest.mark.parametrize(
    "recipe",
    [
        lrjax.scaled_gd,
        lrjax.scaled_subgradient,
        lrjax.prec_gd,
        lrjax.levenberg_marquardt,
        lrjax.opsa,
        lrjax.subgm,
        lrjax.loro,
        lrjax.lora_muon,
        lrjax.lora_plus,
        lrjax.lora_pro,
        lrjax.scaled_adamw,
        lrjax.ilora,
        lrjax.balora,
        lrjax.allora,
        lrjax.lora_mgpo,
        lrjax.aflora,
        lrjax.muon,
        lrjax.alt_lora,
        lrjax.alt_lora_plus,
        lrjax.lora_rite,
    ],
)
def test_hyperparameters_can_be_injected(recipe, getkey):
    """All numbers become arrays of the state, without a list of those that must not."""
    for params in ({"x": random_low_rank(getkey(), 6, 5, 2)}, tree(getkey())):
        tx = optax.with_extra_args_support(recipe(learning_rate=0.1))
        injected = optax.inject_hyperparams(recipe)(learning_rate=0.1)
        extra = {"value": jnp.array(3.0), "grad": params}
        want, _ = tx.update(params, tx.init(params), params, **extra)
        got, _ = jax.jit(injected.update)(params, injected.init(params), params, **extra)
        assert_close(got, want, rtol=1e-5)


def test_transforms_refuse_a_tree_without_nodes_and_complex_leaves(getkey):
    transforms = (
        lrjax.scale_by_gram(),
        lrjax.scale_by_tangent(),
        lrjax.scale_by_gauss_newton(),
        lrjax.add_nuclear_norm(0.1),
        lrjax.scale_factors(),
        lrjax.rebalance(),
        lrjax.retract(),
        lrjax.add_imbalance_penalty(0.1),
        lrjax.scale_by_row_norms(),
        lrjax.perturb_along_momentum(optax.scale_by_adam()),
    )
    x = random_low_rank(getkey(), 6, 5, 2)
    wrong = jax.tree.map(lambda a: a + 0j, x)
    for tx in transforms:
        with pytest.raises(ValueError, match=r"no lrjax\.LowRank node"):
            tx.init(tree(getkey()))
        with pytest.raises(TypeError, match=r"real parameters, but b\.left is complex"):
            tx.init({"a": x, "b": wrong})
        tx.init({})
    for tx in (lrjax.scale_by_polyak(), lrjax.scale_by_target_level()):
        with pytest.raises(TypeError, match="but w is complex"):
            tx.init({"w": jnp.ones(2, complex)})
    for make in RECIPES.values():
        with pytest.raises(TypeError, match="complex"):
            make(0.1).init({"a": x, "b": wrong})

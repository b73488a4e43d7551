"""The mistakes of a first hour, each answered by one sentence, whoever is asked."""

import inspect
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

import lrjax
from lrjax import compression, flows, lowrank, metrics, nn, recovery
from tests.registry import ENTRIES, PARAMS, loss
from tests.test_names import PUBLIC, is_record, parameters


pytestmark = pytest.mark.usefixtures("shapes_unchecked")
every = pytest.mark.parametrize("name", ENTRIES)
KEY = jr.key(0)
MODEL = eqx.nn.MLP(3, 2, 4, 1, key=KEY)


def made(name):
    return ENTRIES[name].make(), PARAMS[ENTRIES[name].params](KEY)


@every
def test_a_model_that_is_not_filtered_is_refused(name):
    tx, _ = made(name)
    fix = re.escape("pass eqx.filter(model, eqx.is_inexact_array)")
    with pytest.raises(TypeError, match=rf"activation is the function \w+: {fix}"):
        tx.init(MODEL)


@every
def test_integer_parameters_are_refused(name):
    tx, params = made(name)
    with pytest.raises(TypeError, match=r"floating-point parameters, but steps is int32"):
        tx.init({**params, "steps": jnp.zeros(3, jnp.int32)})


@every
def test_gradients_of_another_shape_are_refused(name):
    tx, params = made(name)
    state = jax.eval_shape(tx.init, params)
    grads = {**params, "bias": jnp.zeros(4)}
    with pytest.raises(ValueError, match=r"at bias the gradient has shape \(4,\) and the"):
        jax.eval_shape(
            lambda s: tx.update(grads, s, params, value=loss(params), grad=grads), state
        )


@pytest.mark.parametrize("leaf", [optax.MaskedNode(), None, 1.0, jnp.ones(2)])
def test_what_has_gradients_or_is_masked_is_taken(leaf):
    tx = lrjax.scale_factors(1.0, 2.0)
    tx.init({"pair": lrjax.LowRank(jnp.ones((2, 1)), jnp.ones((2, 1))), "leaf": leaf})


SENSING = lrjax.matrix_sensing(KEY, (4, 4), 1, 40)
# How those are called that take a key and are no optimizers: f(key).
WITH_KEY = {
    "linalg.fastfood": lambda key: lrjax.linalg.fastfood(jnp.ones(3), 5, key=key),
    "linalg.nystrom_sketch": lambda key: lrjax.linalg.nystrom_sketch(
        lambda x: x, jnp.ones(3), 2, key=key
    ),
    "linalg.nystrom_preconditioner": lambda key: lrjax.linalg.nystrom_preconditioner(
        lambda x: x, jnp.ones(3), 2, key=key
    ),
    "linalg.pca_split_rotation": lambda key: lrjax.linalg.pca_split_rotation(
        jnp.eye(3), 1, key=key
    ),
    "linalg.truncated_svd": lambda key: lrjax.linalg.truncated_svd(
        jnp.eye(4), 1, method="randomized", key=key
    ),
    "lowrank.balanced_init": lambda key: lowrank.balanced_init(
        (4, 3), jnp.ones(1), key=key
    ),
    "lowrank.gaussian_init": lambda key: lowrank.gaussian_init((4, 3), 1, 1.0, key=key),
    "lowrank.lora_init": lambda key: lowrank.lora_init((4, 3), 1, key=key),
    "lowrank.orthogonal_init": lambda key: lowrank.orthogonal_init((4, 3), 2, key=key),
    "lowrank.small_init": lambda key: lowrank.small_init((4, 3), 1, 1.0, key=key),
    "transforms.sample_prefix": lambda key: lrjax.transforms.sample_prefix(
        lrjax.LowRank(jnp.ones((2, 1)), jnp.ones((2, 1))), key=key
    ),
    "subspaces.random_subspace": lambda key: lrjax.random_subspace(MODEL, 2, key=key),
    "subspaces.zeroth_order_gradient": lambda key: lrjax.zeroth_order_gradient(
        jnp.sum, jnp.ones(3), key=key
    ),
    "adapters.adapt": lambda key: lrjax.adapt(MODEL, lrjax.LoRA(1), key=key),
    "adapters.fold": lambda key: lrjax.fold(
        2, lrjax.adapters.Restart(lrjax.LoRA(1)), key=key
    ),
    "adapters.bind": lambda key: lrjax.bind(
        MODEL, lrjax.adapt(MODEL, lrjax.LoRA(1), key=KEY), key=key
    ),
    "adapters.adversarial_inputs": lambda key: lrjax.adapters.adversarial_inputs(
        jnp.sum, jnp.ones(3), steps=1, key=key
    ),
    "adapters.activation_statistics": lambda key: lrjax.adapters.activation_statistics(
        lambda model, x: jax.vmap(model)(x), MODEL, [jnp.ones((2, 3))], rank=1, key=key
    ),
    "adapters.gradient_statistics": lambda key: lrjax.adapters.gradient_statistics(
        lambda model, x: jnp.sum(jax.vmap(model)(x)),
        MODEL,
        [jnp.ones((2, 3))],
        rank=1,
        key=key,
    ),
    "adapters.loftq": lambda key: lrjax.adapters.loftq(
        MODEL, lrjax.LoRA(1), lrjax.adapters.NF4(), key=key
    ),
    "adapters.feature_weights": lambda key: lrjax.adapters.feature_weights(
        jnp.ones(2), key=key
    ),
    "adapters.search_scale": lambda key: lrjax.adapters.search_scale(
        lambda own: jnp.zeros(2),
        lrjax.adapters.isotropic_posterior(lrjax.adapt(MODEL, lrjax.LoRA(1), key=KEY)),
        key=key,
    ),
    "clustering.fit_low_rank_mixture": lambda key: lrjax.clustering.fit_low_rank_mixture(
        jnp.eye(4), 2, 1, key=key
    ),
    "clustering.k_subspaces": lambda key: lrjax.clustering.k_subspaces(
        jnp.eye(4), 2, 1, key=key
    ),
    "linalg.sample_rows": lambda key: lrjax.linalg.sample_rows(jnp.ones(3), 2, key=key),
    "metrics.hessian_space": lambda key: lrjax.metrics.hessian_space(
        lambda x: jnp.sum(x**2), jnp.ones(3), k=1, key=key
    ),
    "recovery.solve_semidefinite": lambda key: lrjax.recovery.solve_semidefinite(
        jnp.eye(2),
        lrjax.recovery.Entries(jnp.arange(2), jnp.arange(2), (2, 2)),
        jnp.ones(2),
        key=key,
    ),
    "adapters.mix": lambda key: lrjax.adapters.mix(
        lrjax.adapters.stack([lrjax.adapt(MODEL, lrjax.LoRA(1), key=KEY)], MODEL),
        lrjax.adapters.LearnedGates(),
        MODEL,
        key=key,
    ),
    "flows.attention_task": lambda key: flows.attention_task(
        flows.Attention(*[lrjax.LowRank(jnp.eye(2), jnp.eye(2))] * 2),
        examples=1,
        length=2,
        key=key,
    ),
    "flows.lora_task": lambda key: flows.lora_task(
        jnp.ones(3), jnp.ones(1), shape=(4, 3), aligned=True, key=key
    ),
    "metrics.hessian_overlap": lambda key: metrics.hessian_overlap(
        lambda x: jnp.sum(x**2), jnp.ones(3), k=1, key=key, steps=2
    ),
    "nn.GrassmannHead": lambda key: nn.GrassmannHead(4, 3, 2, key=key),
    "nn.LowRankConv": lambda key: nn.LowRankConv(1, 2, 3, 3, 1, key=key),
    "nn.LowRankEmbedding": lambda key: nn.LowRankEmbedding(4, 3, rank=1, key=key),
    "nn.LowRankLinear": lambda key: nn.LowRankLinear(4, 3, 1, key=key),
    "nn.SparsePlusLowRankLinear": lambda key: nn.SparsePlusLowRankLinear(4, 3, 1, key=key),
    "nn.TuckerConv": lambda key: nn.TuckerConv(1, 2, 3, 3, (1, 1, 1), key=key),
    "compression.compress": lambda key: compression.compress(
        MODEL, [jnp.ones((2, 3))], budget=0.5, key=key
    ),
    "compression.layer_statistics": lambda key: compression.layer_statistics(
        MODEL, [jnp.ones((2, 3))], key=key
    ),
    "merging.ColumnNetwork": lambda key: lrjax.merging.ColumnNetwork(
        [jnp.ones((2, 2))], key=key
    ),
    "merging.cluster_units": lambda key: lrjax.merging.cluster_units(
        [lowrank.LowRank(jnp.ones((3, 1)), jnp.ones((2, 1)))], 1, key=key
    ),
    "merging.concrete_mask": lambda key: lrjax.merging.concrete_mask(jnp.ones(2), key=key),
    "merging.drop": lambda key: lrjax.merging.drop(jnp.ones(2), 0.5, key=key),
    "recovery.alternating_least_squares": lambda key: recovery.alternating_least_squares(
        lrjax.matrix_completion(KEY, (4, 4), 1, observed=0.9),
        lowrank.small_init((4, 4), 1, 1.0, key=KEY),
        steps=1,
        key=key,
    ),
    "recovery.mixed_norm_rip": lambda key: recovery.mixed_norm_rip(
        SENSING.operator, 1, key=key
    ),
    "recovery.sign_rip": lambda key: recovery.sign_rip(SENSING.operator, 1, key=key),
    "recovery.matrix_completion": lambda key: lrjax.matrix_completion(key, (4, 4), 1),
    "recovery.matrix_sensing": lambda key: lrjax.matrix_sensing(key, (4, 4), 1, 40),
    "recovery.phase_retrieval": lambda key: lrjax.phase_retrieval(key, 4, 40),
    "recovery.robust_pca": lambda key: lrjax.robust_pca(key, (4, 4), 1),
    "recovery.spiked_model": lambda key: recovery.spiked_model(key, (4, 4), [2.0]),
    "recovery.spectral_init": lambda key: lrjax.spectral_init(SENSING, 1, key=key),
}
OPTIMIZERS = {
    name
    for name, value in PUBLIC.items()
    if name.split(".")[-1] in ENTRIES and "key" in [p.name for p in parameters(value)]
}


def test_every_function_with_a_key_is_asked():
    """Methods of kinds and bases, and records, are called by ours alone."""
    takers = {
        name
        for name, value in PUBLIC.items()
        if name.count(".") == 1
        and not is_record(value)
        and "key" in [p.name for p in parameters(value)]
    }
    takers -= {n for n in takers if inspect.isclass(PUBLIC[n]) and "subspaces" in n}
    assert takers == OPTIMIZERS | set(WITH_KEY)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS | set(WITH_KEY)))
def test_a_seed_in_place_of_a_key_is_refused(name):
    short = name.split(".")[-1]
    call = WITH_KEY.get(name) or (lambda key: ENTRIES[short].make(key=key))
    fix = re.escape("needs a key such as jax.random.key(7), got 7")
    with pytest.raises(TypeError, match=f"^{short} {fix}"):
        call(7)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (jr.split(KEY, 3), r"one key, got \(3,\) of them"),
        (jnp.zeros(3), r"such as jax.random.key\(0\), got an array of float32"),
        ("0", "got '0'"),
    ],
)
def test_what_else_is_no_key(key, message):
    with pytest.raises((TypeError, ValueError), match=message):
        lrjax.matrix_sensing(key, (4, 4), 1, 40)


def test_old_and_new_keys_are_taken():
    new = lowrank.lora_init((4, 3), 1, key=jr.key(3))
    old = lowrank.lora_init((4, 3), 1, key=jr.PRNGKey(3))
    assert jnp.array_equal(new.right, old.right)


def test_a_report_of_a_model_that_is_not_filtered_is_refused():
    with pytest.raises(TypeError, match=r"memory_report .* pass eqx\.filter"):
        metrics.memory_report(MODEL, lrjax.scaled_gd(0.1))


def test_add_of_a_dense_matrix_says_how():
    x = lrjax.LowRank(jnp.ones((4, 1)), jnp.ones((3, 1)))
    with pytest.raises(TypeError, match=r"stacks .* for y: take x\.materialize\(\) \+ y"):
        lrjax.add(x, jnp.ones((4, 3)))


def test_an_operator_that_is_none_is_refused():
    with pytest.raises(TypeError, match=r"derive a class from lrjax\.recovery\.Operator"):
        recovery.Problem(lambda x: x.materialize(), jnp.ones((4, 3)), recovery.L1())


def test_targets_of_another_shape_are_refused():
    problem = recovery.Problem(SENSING.operator, jnp.ones((40, 1)), recovery.L1())
    with pytest.raises(ValueError, match=r"of shape \(40,\), but targets has .*\(40, 1\)"):
        problem.loss(lowrank.small_init((4, 4), 1, 1.0, key=KEY))


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ({"t1": 1.0, "ts": jnp.array([0.5, 2.0])}, r"\[0, 1\.0\], got ts from 0\.5 to 2"),
        ({"t1": 1.0, "ts": jnp.array([-0.5, 0.5])}, r"within \[0, t1\]"),
        ({"t1": 1.0, "ts": jnp.array([0.5, 0.2])}, "increasing times"),
        ({"t1": 1.0, "ts": 0.5}, r"of shape \(count,\)"),
        ({"t1": -1.0}, "from 0 to t1 > 0"),
    ],
)
def test_times_that_no_flow_passes_are_refused(times, message):
    with pytest.raises(ValueError, match=message):
        lrjax.gradient_flow(lambda x: jnp.sum(x**2), jnp.ones(2), **times)


def test_a_flow_of_integers_says_what_to_do():
    with pytest.raises(TypeError, match=r"nothing flows.*int32.*jnp\.asarray\(x, float\)"):
        lrjax.gradient_flow(lambda x: jnp.sum(x**2), jnp.ones(2, jnp.int32), t1=1.0)

"""Every recipe in the trees of the frameworks: NNX, Linen, Haiku and Equinox."""

import inspect
import re
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import lrjax
from tests.helpers import assert_close
from tests.registry import RECIPES, loss, value_and_grad


pytestmark = pytest.mark.usefixtures("shapes_unchecked")


RATE = 0.1
BASE = {name: entry for name, entry in RECIPES.items() if "(" not in name}
every = pytest.mark.parametrize("name", BASE)


def leaves_of(name):
    """A layer of eight inputs and twelve outputs, in factors for the recipes of pairs."""
    size = {"bias": (12,), "kernel": (8, 12)}
    if BASE[name].params == "pairs":
        size = {"bias": (12,), "down": (8, 2), "up": (2, 12)}
    return {n: jr.normal(jr.key(i), s) for i, (n, s) in enumerate(size.items())}


def make(name, factory=None):
    tx = (factory or BASE[name].factory)(learning_rate=RATE)
    if BASE[name].params == "pairs":
        tx = lrjax.on_pairs(tx, lrjax.pairs_by_name(left="down", right="up"))
    return optax.with_extra_args_support(tx)


def plain_step(tx, params, state):
    value, grads = value_and_grad(params)
    updates, state = tx.update(grads, state, params, value=value, grad=grads)
    return optax.apply_updates(params, updates), state


def plain_loop(tx, params, steps=3):
    """A loop in JAX alone, in one program."""

    def step(carry, _):
        return plain_step(tx, *carry), None

    @jax.jit
    def train(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]

    return train(params)


class Layer(nnx.Module):
    def __init__(self, leaves):
        for name, value in leaves.items():
            setattr(self, name, nnx.Param(value))


class Network(nnx.Module):
    def __init__(self, leaves):
        self.linear = Layer(leaves)


def pure(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@nnx.jit
def nnx_step(model, optimizer):
    value, grads = nnx.value_and_grad(lambda model: loss(pure(model)))(model)
    optimizer.update(model, grads, value=value, grad=grads)


def check_under_nnx(tx, leaves, want):
    model = Network(leaves)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(3):
        nnx_step(model, optimizer)
    assert_close(pure(model), want, condition=1e4)


@every
def test_nnx_with_an_injected_learning_rate(name):
    """Three compiled steps, the rate a leaf of the state: those of the plain loop."""
    injected = make(name, optax.inject_hyperparams(BASE[name].factory))
    leaves = leaves_of(name)
    check_under_nnx(injected, leaves, plain_loop(make(name), {"linear": leaves}))


@pytest.mark.slow_but("adam")
@pytest.mark.parametrize("recipe", [lrjax.subspace_adam, lrjax.dion, optax.adam])
def test_nnx_with_quantized_states(recipe):
    leaves = leaves_of("galore")
    tx = optax.with_extra_args_support(lrjax.quantize_state(recipe(RATE), min_size=1))
    check_under_nnx(tx, leaves, plain_loop(tx, {"linear": leaves}))


def test_paths_under_nnx_are_those_of_the_tree():
    """At init, which sees variables, and at update, which sees arrays."""
    seen = []

    def where(path, shape):
        seen.append(path)
        return path.endswith("kernel")

    model = Network(leaves_of("galore"))
    optimizer = nnx.Optimizer(model, lrjax.grass(RATE, 2, where=where), wrt=nnx.Param)
    assert set(seen) == {"linear.kernel", "linear.bias"}
    seen.clear()
    nnx_step(model, optimizer)
    assert set(seen) == {"linear.kernel", "linear.bias"}


class Linear(eqx.Module):
    leaves: dict
    activation: Callable = jax.nn.relu


class Model(eqx.Module):
    linear: Linear


def program(step, *trees):
    """What JAX would compile, and the structure of what it returns."""
    jaxpr, shapes = jax.make_jaxpr(step, return_shape=True)(*trees)
    # Without the addresses, which differ from trace to trace.
    return re.sub(r"0x\w+", "", str(jaxpr)), jax.tree.structure(shapes)


@every
def test_other_layouts_compile_to_the_program_of_the_plain_loop(name):
    """Haiku's names, an Equinox model with leaves that are no arrays, a TrainState."""
    tx, leaves = make(name), leaves_of(name)

    def step(params, state, value, grads):
        updates, state = tx.update(grads, state, params, value=value, grad=grads)
        return optax.apply_updates(params, updates), state

    def on(params, step=step):
        state = jax.eval_shape(tx.init, params)
        value, grads = jax.eval_shape(value_and_grad, params)
        jaxpr, structure = program(step, params, state, value, grads)
        assert structure == jax.tree.structure((params, state))
        return jaxpr

    want = on({"linear": leaves})
    assert on({"mlp/~/linear_0": leaves}) == want
    assert on(eqx.filter(Model(Linear(leaves)), eqx.is_array)) == want

    def linen_step(params, state, value, grads):
        del value
        train = TrainState(
            step=0, apply_fn=jnp.dot, params=params, tx=tx, opt_state=state
        ).apply_gradients(grads=grads)
        return train.params, train.opt_state

    if not BASE[name].extra:  # a TrainState hands over the gradients alone
        plain = lambda params, state, value, grads: (
            lambda u, s: (optax.apply_updates(params, u), s)
        )(*tx.update(grads, state, params))
        linen = {"params": {"linear": leaves}}
        assert on(linen, linen_step) == on(linen, plain)


@every
def test_injected_hyperparameters_need_no_static_arguments(name):
    tx = make(name, optax.inject_hyperparams(BASE[name].factory))
    params = {"linear": leaves_of(name)}
    state = jax.eval_shape(tx.init, params)
    numbers = state.hyperparams if hasattr(state, "hyperparams") else {}
    assert {"learning_rate"} <= set(numbers)
    assert not set(numbers) & {"rank", "blocks", "fraction", "block", "min_size"}
    after = jax.eval_shape(lambda p, s: plain_step(tx, p, s), params, state)
    assert jax.tree.structure(after) == jax.tree.structure((params, state))


DECAYING = [
    name
    for name, entry in BASE.items()
    if "weight_decay" in inspect.signature(entry.factory).parameters
]
PARAMS = {
    "linear": {"kernel": jnp.full((8, 12), 2.0), "bias": jnp.full((12,), 2.0)},
    # Stacked layers: their biases and scales are matrices by their shape alone.
    "blocks": {"scale": jnp.full((9, 12), 2.0), "bias": jnp.full((9, 12), 2.0)},
    "layer_norm": {"weight": jnp.full((9, 12), 2.0)},
}
DECAYED = optax.tree.zeros_like(PARAMS) | {
    "linear": {"kernel": jnp.full((8, 12), -0.1), "bias": jnp.zeros((12,))}
}


def decay_alone(*optimizers):
    """The updates by zero gradients: weight decay, and nothing else."""

    @jax.jit
    def updates(params):
        zeros = optax.tree.zeros_like(params)
        return [tx.update(zeros, tx.init(params), params)[0] for tx in optimizers]

    return updates(PARAMS)


@pytest.mark.parametrize("name", DECAYING)
def test_biases_and_norms_are_not_decayed(name):
    factory = BASE[name].factory
    only_bias = lambda path, x: "blocks" in str(path) and "bias" in str(path)
    mask = jax.tree_util.tree_map_with_path(only_bias, PARAMS)
    default, masked = decay_alone(
        factory(RATE, weight_decay=0.5), factory(RATE, weight_decay=0.5, mask=mask)
    )
    assert_close(default, DECAYED)
    assert_close(masked, jax.tree.map(lambda m, x: -0.05 * x * m, mask, PARAMS))


@pytest.mark.parametrize("name", DECAYING)
def test_groups_with_and_without_decay(name):
    factory = BASE[name].factory
    labels = {"linear": "decay", "blocks": "none", "layer_norm": "none"}
    groups = {
        "decay": factory(RATE, weight_decay=0.5),
        "none": factory(RATE, weight_decay=0.0),
    }
    assert_close(*decay_alone(optax.partition(groups, labels)), DECAYED)

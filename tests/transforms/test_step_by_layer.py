"""The backward pass and the optimizer of one layer at a time: the plain step, in less."""

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

import lrjax
from tests.helpers import assert_close


DEPTH, WIDTH = 3, 8


def embed(rest, x, y):
    del y
    return jnp.tanh(x @ rest["table"])


def layer(params, x, *data):
    del data
    hidden = jax.nn.gelu(x @ params["up"]["weight"].T + params["up"]["bias"][None])
    return x + hidden @ params["down"]["weight"].T


def loss(rest, x, x0, y):
    """The table comes back as the head."""
    del x0
    return jnp.mean((x @ rest["table"].T - y) ** 2)


def problem(key, depth=DEPTH, width=WIDTH):
    keys = jr.split(key, 6)
    stack = lambda k, *shape: jr.normal(k, (depth, *shape)) / width**0.5
    layers = {
        "up": {
            "weight": stack(keys[0], 2 * width, width),
            "bias": stack(keys[1], 2 * width),
        },
        "down": {"weight": stack(keys[2], width, 2 * width), "none": None},
    }
    rest = {"table": jr.normal(keys[3], (5, width)) / 4}
    return layers, rest, jr.normal(keys[4], (6, 5)), jr.normal(keys[5], (6, 5))


def whole(tx, other):
    """The plain step: the gradient of all layers, and one update of it."""

    def value_of(layers, rest, *data):
        again = jax.checkpoint(lambda x, p: (layer(p, x, *data), None))
        return loss(rest, jax.lax.scan(again, embed(rest, *data), layers)[0], *data)

    def step(layers, rest, state, *data):
        both = jax.value_and_grad(value_of, (0, 1))
        value, (grads, rest_grads) = both(layers, rest, *data)
        updates, of_layers = tx.update(grads, state[0], layers)
        rest_updates, of_rest = other.update(rest_grads, state[1], rest)
        layers = optax.apply_updates(layers, updates)
        return layers, optax.apply_updates(rest, rest_updates), (of_layers, of_rest), value

    init = lambda layers, rest: (tx.init(layers), other.init(rest))
    return init, step


def run(init, step, problem, steps=3):
    layers, rest, *data = problem

    def body(carry, _):
        *carry, value = step(*carry, *data)
        return tuple(carry), value

    start = (layers, rest, init(layers, rest))
    return jax.jit(lambda start: jax.lax.scan(body, start, length=steps))(start)


OPTIMIZERS = {
    "adam": optax.adam(0.05),
    "schedule": optax.chain(
        optax.trace(0.9), optax.scale_by_schedule(lambda t: -0.01 / (1 + t))
    ),
    "subspace_adam": lrjax.subspace_adam(0.05, 2, weight_decay=0.1),
    "dion3": lrjax.dion3(0.05),
}


@pytest.mark.slow_but("schedule")
@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_it_is_the_plain_step(tx, getkey):
    other = optax.sgd(0.01)
    by_layer = lrjax.step_by_layer(embed, layer, loss, tx, fallback=other)
    given = problem(getkey())
    (layers, rest, state), values = run(*by_layer, given)
    (want_layers, want_rest, want_state), want = run(*whole(tx, other), given)
    assert_close(values, want, condition=100)
    assert_close((layers, rest), (want_layers, want_rest), condition=1e3)
    # The same state, with a stack of counters where the plain step has one.
    flat = zip(jax.tree.leaves(state.layers), jax.tree.leaves(want_state[0]), strict=True)
    for got, one in flat:
        assert got.shape in (one.shape, (DEPTH, *one.shape))


def test_the_rest_gets_the_same_optimizer_by_default(getkey):
    given = problem(getkey())
    adam = optax.adam(0.05)
    (layers, rest, _), _ = run(*lrjax.step_by_layer(embed, layer, loss, adam), given)
    (want_layers, want_rest, _), _ = run(*whole(adam, adam), given)
    assert_close((layers, rest), (want_layers, want_rest), condition=1e3)


def test_a_layer_is_traced_twice_however_many_there_are(getkey):
    seen = []

    def counted(params, x, *data):
        seen.append(x.shape)
        return layer(params, x, *data)

    by_layer = lrjax.step_by_layer(embed, counted, loss, optax.adam(0.05))
    layers, rest, *data = problem(getkey(), depth=20)
    shapes = jax.eval_shape(by_layer.init, layers, rest)
    jax.eval_shape(by_layer.step, layers, rest, shapes, *data)
    assert len(seen) == 2


def temporaries(init, step, given):
    """Bytes that a step needs beyond its arguments, which it may overwrite."""
    layers, rest, *data = jax.eval_shape(lambda: given)
    state = jax.eval_shape(init, layers, rest)
    jitted = jax.jit(step, donate_argnums=(0, 1, 2))
    compiled = jitted.lower(layers, rest, state, *data).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 0.99 * memory.output_size_in_bytes
    return memory.temp_size_in_bytes


@pytest.mark.slow
def test_the_gradient_is_never_whole():
    given = problem(jr.key(0), depth=16, width=64)
    gradient = sum(x.nbytes for x in jax.tree.leaves(given[0]))
    tx = optax.adam(0.05)
    by_layer = temporaries(*lrjax.step_by_layer(embed, layer, loss, tx), given)
    # The inputs of the layers; of one of them gradient, parameters and two moments.
    assert by_layer < 0.35 * gradient
    assert temporaries(*whole(tx, tx), given) > gradient


def test_what_is_no_stack_is_refused_by_name():
    by_layer = lrjax.step_by_layer(embed, layer, loss, optax.adam(0.1))
    with pytest.raises(ValueError, match=r"stacked.*down: \(4,\), up: \(3,\)"):
        by_layer.init({"up": jnp.ones((3, 2)), "down": jnp.ones((4, 2))}, {})
    with pytest.raises(ValueError, match=r"got first axes of scale: \(\)"):
        by_layer.init({"scale": jnp.ones(())}, {})
    with pytest.raises(ValueError, match="no leaf at all"):
        by_layer.init({}, {})

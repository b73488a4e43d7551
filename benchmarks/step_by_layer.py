"""What does a step need beyond parameters and state, if no gradient is ever whole?

A stack of 32 residual layers of width 512 that keeps the inputs of its layers, compiled and
not run: the temporaries of the plain step, ``value_and_grad`` and one update of the stack,
and of `step_by_layer`, as multiples of the gradient's bytes; parameters and state are
donated to both. The peak is that of arguments and temporaries together.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from _harness import bound, write_results

import lrjax


DEPTH, WIDTH, TOKENS, CLASSES = 32, 512, 64, 16
OPTIMIZERS = {
    "adam": optax.adam(1e-3),
    "adam at 4 bits": lrjax.quantize_state(optax.adam(1e-3), bits=4),
    "subspace_adam": lrjax.subspace_adam(1e-3),
    "normuon": lrjax.normuon(1e-3),
}


def embed(rest, x, y):
    del y
    return x @ rest["table"]


def layer(params, x, *data):
    del data
    scaled = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    return x + jax.nn.gelu(scaled @ params["up"].T) @ params["down"].T


def loss(rest, x, x0, y):
    del x0
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x @ rest["head"].T, y))


def parameters():
    keys = jr.split(jr.key(0), 4)
    layers = {
        "up": jr.normal(keys[0], (DEPTH, 2 * WIDTH, WIDTH)),
        "down": jr.normal(keys[1], (DEPTH, WIDTH, 2 * WIDTH)),
    }
    rest = {
        "table": jr.normal(keys[2], (CLASSES, WIDTH)),
        "head": jr.normal(keys[3], (CLASSES, WIDTH)),
    }
    return layers, rest


def plain(tx):
    """The gradient of all layers, then one update of it; layers run twice forward."""

    def value_of(layers, rest, *data):
        again = jax.checkpoint(lambda x, p: (layer(p, x, *data), None))
        return loss(rest, jax.lax.scan(again, embed(rest, *data), layers)[0], *data)

    def step(layers, rest, state, *data):
        value, grads = jax.value_and_grad(value_of, (0, 1))(layers, rest, *data)
        updates, of_layers = tx.update(grads[0], state[0], layers)
        rest_updates, of_rest = tx.update(grads[1], state[1], rest)
        layers = optax.apply_updates(layers, updates)
        return layers, optax.apply_updates(rest, rest_updates), (of_layers, of_rest), value

    return lambda layers, rest: (tx.init(layers), tx.init(rest)), step


def needed(init, step):
    """Bytes of the arguments, and of what a step needs beyond them."""
    layers, rest = jax.eval_shape(parameters)
    state = jax.eval_shape(init, layers, rest)
    x = jax.ShapeDtypeStruct((TOKENS, CLASSES), jnp.float32)
    y = jax.ShapeDtypeStruct((TOKENS,), jnp.int32)
    donated = jax.jit(step, donate_argnums=(0, 1, 2))
    memory = donated.lower(layers, rest, state, x, y).compile().memory_analysis()
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes


def main():
    gradient = sum(4 * x.size for x in jax.tree.leaves(jax.eval_shape(parameters)[0]))
    rows, bounds = [], []
    for name, tx in OPTIMIZERS.items():
        found = {
            "plain": needed(*plain(tx)),
            "by layer": needed(*lrjax.step_by_layer(embed, layer, loss, tx)),
        }
        for way, (arguments, temporaries) in found.items():
            rows.append(
                {
                    "optimizer": name,
                    "step": way,
                    "gradient MB": gradient / 1e6,
                    "parameters and state": arguments / gradient,
                    "temporaries": temporaries / gradient,
                    "peak": (arguments + temporaries) / gradient,
                }
            )
        by_layer = found["by layer"][1]
        claim = f"{name}: temporaries by layer over the gradient"
        bounds.append(bound(claim, by_layer / gradient, at_most=0.3))
        claim = f"{name}: temporaries of the plain step over those by layer"
        bounds.append(bound(claim, found["plain"][1] / by_layer, at_least=4.0))
    write_results("step_by_layer", rows, bounds)


if __name__ == "__main__":
    main()

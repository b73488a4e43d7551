"""What does a batch cost in which every example has an adapter of its own?"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from _harness import bound, compiled_cost, interleaved, median_ratio, medians, write_results

import lrjax
from lrjax.adapters import Stack, select, stack, swap


WIDTH, RANK, BATCH, TOKENS = 512, 8, 32, 16
TASKS = 8


def layers(key, depth):
    """Square linear layers, a tree of arrays alone."""
    return [eqx.nn.Linear(WIDTH, WIDTH, key=k) for k in jr.split(key, depth)]


def adapters_of(model, key, count):
    """Adapters with both factors at random, as training leaves them."""

    @jax.jit
    def one(key):
        params, frozen = lrjax.partition(lrjax.adapt(model, lrjax.LoRA(RANK), key=key))
        leaves, structure = jax.tree.flatten(params)
        keys = jr.split(key, len(leaves))
        moved = [0.05 * jr.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        return eqx.combine(structure.unflatten(moved), frozen)

    return [one(k) for k in jr.split(key, count)]


def alone(model, x):
    """The base on a batch: linear layers with tanh between them."""
    for i, layer in enumerate(model):
        x = jax.vmap(jax.vmap(layer))(x if i == 0 else jnp.tanh(x))
    return x


def bound_once(model, adapters, x):
    """One adapter for all examples."""
    return alone(lrjax.bind(model, adapters), x)


def routed(model, many, ids, x):
    """Every example by the adapter of its number."""

    def answer(i, own):
        return alone(lrjax.bind(model, select(many, i)), own[None])[0]

    return jax.vmap(answer)(ids, x)


def serving(key):
    """Times and flops of forward passes, and what a swap compiles."""
    k_model, k_adapters, k_ids, k_data = jr.split(key, 4)
    model = layers(k_model, 1)
    rows = adapters_of(model, k_adapters, 256)
    few, all_of_them = (stack(rows[:n], model) for n in (16, 256))
    x = jr.normal(k_data, (BATCH, TOKENS, WIDTH))
    some, any_of_them = (jr.randint(k_ids, (BATCH,), 1, n + 1) for n in (16, 256))
    serve = jax.jit(routed)
    cases = {
        "base alone": (jax.jit(alone), (model, x)),
        "one adapter for all": (jax.jit(bound_once), (model, rows[0], x)),
        "16 adapters, routed": (serve, (model, few, some, x)),
        "256 adapters, routed": (serve, (model, all_of_them, any_of_them, x)),
    }
    run = lambda f, args: lambda: f(*args)
    seconds = interleaved(
        {name: run(*case) for name, case in cases.items()}, 60, time.process_time
    )
    flops = {name: compiled_cost(f, *args)["flops"] for name, (f, args) in cases.items()}
    programs = serve._cache_size()
    for i in range(4):  # what is compiled at all is so the first time
        new = swap(few, i + 1, rows[100 + i], model)
        jax.block_until_ready(serve(model, new, some, x))
    swapped = serve._cache_size() - programs
    return seconds, flops, swapped


def training(key):
    """A step of Adam: one adapter, and eight, on as many tokens in all."""
    k_model, k_adapters, k_data = jr.split(key, 3)
    model = layers(k_model, 3)
    rows, tx = adapters_of(model, k_adapters, TASKS), optax.adam(1e-3)
    x, y = jr.normal(k_data, (2, BATCH, TOKENS, WIDTH))

    def stepper(outputs, whole):
        params, frozen = lrjax.partition(whole)

        @jax.jit
        def step(model, params, state, frozen, x, y):
            def loss(params):
                got = outputs(model, eqx.combine(params, frozen), x)
                return jnp.mean((got - y) ** 2)

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state)
            return optax.apply_updates(params, updates), state, value

        state = tx.init(params)
        return step, (model, params, state, frozen, x, y)

    many = stack(rows, model)
    ids = 1 + jnp.arange(BATCH) % TASKS

    def mixed(model, adapters, x):
        return routed(model, Stack(adapters, many.names), ids, x)

    cases = {
        "step of one adapter": stepper(bound_once, rows[0]),
        "step of eight adapters, mixed": stepper(mixed, many.adapters),
    }
    run = lambda f, args: lambda: f(*args)
    seconds = interleaved(
        {name: run(*case) for name, case in cases.items()}, 40, time.process_time
    )
    flops = {name: compiled_cost(f, *args)["flops"] for name, (f, args) in cases.items()}
    return seconds, flops


def main():
    serving_key, training_key = jr.split(jr.key(0))
    seconds, flops, swapped = serving(serving_key)
    more, their_flops = training(training_key)
    seconds, flops = seconds | more, flops | their_flops
    rows = [
        {"name": name, "processor milliseconds": 1e3 * median, "flops": flops[name]}
        for name, median in medians(seconds).items()
    ]
    ratio = lambda over, under: median_ratio(seconds, over, under)
    write_results(
        "adapter_serving",
        rows,
        [
            bound(
                "processor time of 16 adapters, one for each example, over the base",
                ratio("16 adapters, routed", "base alone"),
                at_most=1.75,
            ),
            bound(
                "processor time of 256 adapters over 16",
                ratio("256 adapters, routed", "16 adapters, routed"),
                at_most=1.1,
            ),
            bound(
                "flops of a routed batch over one adapter for all",
                flops["16 adapters, routed"] / flops["one adapter for all"],
                at_most=1.001,
            ),
            bound(
                "processor time of a step of eight adapters over one, as many tokens",
                ratio("step of eight adapters, mixed", "step of one adapter"),
                at_most=1.3,
            ),
            bound("programs compiled for four swapped adapters", swapped, at_most=0),
        ],
    )


if __name__ == "__main__":
    main()

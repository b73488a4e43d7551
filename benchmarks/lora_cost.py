"""What does a LoRA gradient cost against full fine-tuning and against bare jnp?"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from _harness import bound, compiled_cost, interleaved, median_ratio, medians, write_results

import lrjax


# A step saves what the policy lets through: products, and only those that it can see.
POLICY = jax.checkpoint_policies.dots_saveable
WIDTH, TOKENS, RANK = 1024, 512, 8


def squared(y):
    return jnp.mean((y - 1.0) ** 2)


def by_hand(params, weight, bias, x):
    a, b = params
    return squared(x @ weight.T + bias + (x @ a.T) @ b.T)


def full(layer, x):
    return squared(jax.vmap(layer)(x))


def adapted(attach, frozen, over):
    def loss(params, layer, x):
        model = attach(layer, eqx.combine(params, frozen))
        for _ in range(over):
            model = jax.vmap(model)
        return squared(model(x))

    return loss


def remat_flops(attach, frozen, params, layers, x):
    """Flops of a gradient through layers under a checkpoint that saves products."""

    def net(params, layers, x):
        for layer in attach(layers, eqx.combine(params, frozen)):
            x = jnp.tanh(jax.vmap(layer)(x))
        return x

    net = jax.checkpoint(net, policy=POLICY)
    loss = lambda params, layers, x: squared(net(params, layers, x))
    return compiled_cost(jax.grad(loss), params, layers, x)["flops"]


def written_out(layers, adapters):
    """LoRA by hand in place of bind."""

    def call(layer, pair):
        return lambda v: layer.weight @ v + layer.bias + pair.left @ (pair.right.T @ v)

    return [call(layer, adapters[str(i)].pair) for i, layer in enumerate(layers)]


def gradient(loss, *args):
    """The compiled gradient as a thunk, and what XLA says of its cost."""
    step = jax.jit(jax.value_and_grad(loss))
    return (lambda: step(*args)), compiled_cost(jax.value_and_grad(loss), *args)


def adapters_of(layer, key):
    adapters = lrjax.adapt(layer, lrjax.LoRA(RANK), key=key)
    params, frozen = lrjax.partition(adapters)
    random = lambda x: 0.1 * jr.normal(key, x.shape)
    return jax.tree.map(random, params), frozen


def main():
    layer_key, key, data_key = jr.split(jr.key(0), 3)
    layer = eqx.nn.Linear(WIDTH, WIDTH, key=layer_key)
    params, frozen = adapters_of(layer, key)
    pair = params.layers[""].pair
    x = jr.normal(data_key, (TOKENS, WIDTH))
    hand = (by_hand, (pair.right.T, pair.left), layer.weight, layer.bias, x)

    wide = eqx.nn.Linear(384, 1536, key=layer_key)
    thin, thin_frozen = adapters_of(wide, key)
    tall = jr.normal(data_key, (16, 64, 384))
    flat = tall.reshape(-1, 384)

    layers = [eqx.nn.Linear(256, 256, key=k) for k in jr.split(layer_key, 4)]
    several, rest = adapters_of(layers, key)
    inputs = jr.normal(data_key, (64, 256))
    saved, saved_by_hand = (
        remat_flops(attach, rest, several, layers, inputs)
        for attach in (lrjax.bind, written_out)
    )

    cases = {
        "full fine-tuning": (full, layer, x),
        "bind": (adapted(lrjax.bind, frozen, 1), params, layer, x),
        "dense weight": (adapted(lrjax.merge, frozen, 1), params, layer, x),
        "by hand": hand,
        "bind, (1024, 384)": (adapted(lrjax.bind, thin_frozen, 1), thin, wide, flat),
        "bind, (16, 64, 384)": (adapted(lrjax.bind, thin_frozen, 2), thin, wide, tall),
    }
    built = {name: gradient(*case) for name, case in cases.items()}
    seconds = interleaved({name: run for name, (run, _) in built.items()}, repeats=60)
    rows = [
        {"name": name, "milliseconds": 1e3 * median, **built[name][1]}
        for name, median in medians(seconds).items()
    ]
    flops = {row["name"]: row["flops"] for row in rows}
    write_results(
        "lora_cost",
        rows,
        [
            bound(
                "flops of the LoRA gradient over those of full fine-tuning",
                flops["bind"] / flops["full fine-tuning"],
                at_most=0.6,
            ),
            bound(
                "seconds of bind over LoRA written by hand in jnp",
                median_ratio(seconds, "bind", "by hand"),
                at_most=1.05,
            ),
            bound(
                "flops of bind over LoRA by hand where a checkpoint saves products",
                saved / saved_by_hand,
                at_most=1.0,
            ),
            bound(
                "seconds under two nested vmaps over those of flattened activations",
                median_ratio(seconds, "bind, (16, 64, 384)", "bind, (1024, 384)"),
                at_most=1.05,
            ),
        ],
    )


if __name__ == "__main__":
    main()

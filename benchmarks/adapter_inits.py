"""Which start of LoRA trains fastest, each at its own best learning rate?

Digits of scikit-learn. A small network learns the images as they are; adapters of rank 4
then teach it the same images turned by a quarter and inverted, 200 steps of Adam. Every
start has the same grid of learning rates; losses are those of the whole training set,
medians over eight seeds (of the network, the batches and the adapters), at the rate that
is best after that many steps.
"""

import functools
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _harness import bound, compiled_cost, write_results
from sklearn.datasets import load_digits

import lrjax
from lrjax import adapters as room


RANK, SEEDS, BATCH, STEPS = 4, 8, 64, (20, 200)
RATES = 10.0 ** jnp.arange(-3.5, -0.9, 0.5)
GRADIENTS, INPUTS = ("lora_ga", "lora_one", "spectral"), ("eva", "corda", "corda_kpm")
PLAIN = ("default", "gaussian", "orthogonal", "small", "pissa", "milora", "olora")


def loss(model, batch):
    x, y = batch
    logits = jax.vmap(model)(x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def accuracy(model, x, y):
    return jnp.mean(jnp.argmax(jax.vmap(model)(x), axis=1) == y)


def descend(of, params, rate, key, size, steps, marks=()):
    """Adam on random batches; the parameters after each of the marks."""
    tx = optax.adam(rate)

    def step(carry, key):
        params, state = carry
        grads = jax.grad(of)(params, jr.choice(key, size, (BATCH,)))
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    carry, found, done = (params, tx.init(params)), [], 0
    for mark in (*marks, steps):
        carry, _ = jax.lax.scan(step, carry, jr.split(jr.fold_in(key, mark), mark - done))
        found.append(carry[0])
        done = mark
    return found


def pretrained(key, x, y):
    model = eqx.nn.MLP(64, 10, 64, 2, key=key)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    of = lambda params, rows: loss(eqx.combine(params, static), (x[rows], y[rows]))
    (params,) = descend(of, params, 3e-3, key, len(x), 500)
    return eqx.combine(params, static)


def kind_of(name):
    if name == "full":
        return room.Full()
    if name == "lora_sb":
        return room.LoRASB(RANK)
    return lrjax.LoRA(RANK, init=name)


def finetuned(name, data, test, rate, seed):
    """Losses after some steps and the accuracy on images never seen, from one seed."""
    x, y = data
    turned = 1 - jnp.rot90(x.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
    key = jr.fold_in(jr.key(7), seed)
    model = pretrained(key, x, y)
    batches = [
        (turned[i : i + BATCH], y[i : i + BATCH]) for i in range(0, 8 * BATCH, BATCH)
    ]
    statistics = None
    if name in (*GRADIENTS, "lora_sb"):
        statistics = room.gradient_statistics(loss, model, batches)
    elif name in INPUTS:
        call = lambda model, batch: jax.vmap(model)(batch[0])
        statistics = room.activation_statistics(call, model, batches)
    adapters = lrjax.adapt(model, kind_of(name), key=key, data=statistics)
    params, frozen = lrjax.partition(adapters)
    bound_to = lambda params: lrjax.bind(model, eqx.combine(params, frozen))
    of = lambda params, rows: loss(bound_to(params), (turned[rows], y[rows]))
    found = descend(of, params, rate, key, len(x), STEPS[-1], STEPS[:-1])
    x_test, y_test = test
    turned_test = 1 - jnp.rot90(x_test.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
    losses = jnp.stack([loss(bound_to(p), (turned, y)) for p in found])
    return losses, accuracy(bound_to(found[-1]), turned_test, y_test)


def race(name, data, test):
    """Medians over the seeds, at the best rate of each number of steps."""
    run = functools.partial(finetuned, name)
    over = jax.vmap(jax.vmap(run, (None, None, None, 0)), (None, None, 0, None))
    losses, right = jax.jit(over)(data, test, RATES, jnp.arange(SEEDS))
    losses = np.nan_to_num(np.asarray(losses), nan=np.inf)  # (rate, seed, steps)
    middle = np.median(losses, axis=1)
    row = {"start": name}
    for i, steps in enumerate(STEPS):
        best = int(np.argmin(middle[:, i]))
        row[f"loss after {steps}"] = float(middle[best, i])
        row[f"quartiles after {steps}"] = np.quantile(
            losses[best, :, i], (0.25, 0.75)
        ).tolist()
        row[f"rate for {steps}"] = float(RATES[best])
    row["test accuracy"] = float(np.median(np.asarray(right)[best]))
    row["losses at the best rate"] = losses[best, :, -1].tolist()
    return row


def seconds_of_starts(names):
    """Processor seconds to start one matrix 1024 × 1024, compiled, its statistic given."""
    layer = eqx.nn.Linear(1024, 1024, key=jr.key(0))
    x = jr.normal(jr.key(1), (2048, 1024)) * jnp.linspace(2, 0.1, 1024)
    gradient = {"": layer.weight.T @ (x.T @ x) / 2048}
    inputs = room.activation_statistics(lambda m, x: jax.vmap(m)(x), layer, [x])
    thin = room.gradient_statistics(
        lambda m, x: jnp.mean(jax.vmap(m)(x) ** 2), layer, [x], rank=16, key=jr.key(2)
    )
    kinds = {
        name: (kind_of(name), gradient if name in (*GRADIENTS, "lora_sb") else inputs)
        for name in names
    }
    kinds["lora_ga of factors"] = (kind_of("lora_ga"), thin)

    def seconds(kind, data):
        data, key = data if kind.takes_data else None, jr.key(3)
        start = lambda layer, data, key: lrjax.adapt(layer, kind, key=key, data=data)
        compiled = eqx.filter_jit(start).lower(layer, data, key).compile()
        began = time.process_time()
        jax.block_until_ready(jax.tree.leaves(compiled(layer, data, key)))
        return time.process_time() - began

    return {name: seconds(*settings) for name, settings in kinds.items()}


def flops_of_statistics():
    """Of the sums over inputs against the forward pass they are taken from."""
    model, x = eqx.nn.MLP(512, 512, 512, 4, key=jr.key(0)), jnp.ones((256, 512))
    arrays, static = eqx.partition(model, eqx.is_array)
    call = lambda model, x: jax.vmap(model)(x)

    def sums(rank):
        def run(arrays, x):
            own, key = eqx.combine(arrays, static), jr.key(1)
            found = room.activation_statistics(call, own, [x], rank=rank, key=key)
            return {path: one.image for path, one in found.items()}

        return compiled_cost(run, arrays, x)["flops"]

    forward = compiled_cost(lambda a, x: call(eqx.combine(a, static), x), arrays, x)
    return sums(None) / forward["flops"], sums(32) / forward["flops"]


def main():
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = jnp.asarray(digits.data[order] / 16, jnp.float32)
    y = jnp.asarray(digits.target[order])
    data, test = (x[:1400], y[:1400]), (x[1400:], y[1400:])
    names = (*PLAIN, *GRADIENTS, *INPUTS, "lora_sb", "full")
    rows = []
    for name in names:
        began = time.perf_counter()
        rows.append(race(name, data, test))
        print(rows[-1], f"{time.perf_counter() - began:.0f} s", flush=True)
    seconds = seconds_of_starts([n for n in names if n != "full"])
    whole, thin = flops_of_statistics()
    base = next(row for row in rows if row["start"] == "default")
    for row in rows:
        row["losses below the default's"] = sum(
            a < b
            for a, b in zip(
                row["losses at the best rate"], base["losses at the best rate"], strict=True
            )
        )
        row["processor seconds for 1024 x 1024"] = seconds.get(row["start"])
    rows.append(
        {
            "start": "lora_ga of factors",
            "processor seconds for 1024 x 1024": seconds["lora_ga of factors"],
        }
    )
    rows.append(
        {"statistics": "flops over a forward pass", "whole": whole, "rank 32": thin}
    )
    after = lambda name: next(r for r in rows if r.get("start") == name)["loss after 20"]
    write_results(
        "adapter_inits",
        rows,
        [
            bound(
                "LoRA-GA over the default, loss after 20 steps at the best rates",
                after("lora_ga") / after("default"),
                at_most=1.0,
            ),
            bound(
                "sums of rank 32 over inputs, flops over a forward pass", thin, at_most=1.2
            ),
        ],
    )


if __name__ == "__main__":
    main()

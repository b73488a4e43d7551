"""What does a step in low rank with moving bases cost beside one of plain factors?

Whole training steps, forward and backward pass and update, of four factorized layers of
1024 x 1024 at rank 32, on batches of several sizes. Bases move in every step or in every
few; the plain factors take steps of gradient descent. Seconds are those of processors, the
optimizers in turns, with one thread for LAPACK: small factorizations on many threads time
the threads.
"""

import os
import time
from collections.abc import Callable


os.environ["OPENBLAS_NUM_THREADS"] = "1"

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
import jax.random as jr
import optax
from _harness import (
    bound,
    compiled_cost,
    interleaved,
    median_ratio,
    medians,
    write_results,
)

import lrjax


SIZE, RANK, LAYERS, TOKENS = 1024, 32, 4, (512, 2048)
REPEATS, PERIOD = 10, 8
PLAIN = "factors, SGD"


def network(form):
    """The trainable arrays of the layers, and the rest."""
    layers = [
        lrjax.nn.LowRankLinear(SIZE, SIZE, RANK, form=form, key=key)
        for key in jr.split(jr.key(0), LAYERS)
    ]
    return eqx.partition(layers, eqx.is_inexact_array)


def optimizers():
    """Name: (form of the weights, optimizer)."""
    moving = lambda every: lrjax.dynamical_low_rank(optax.sgd(0.1), 0.01, every=every)
    return {
        PLAIN: ("pair", optax.sgd(0.1)),
        "Riemannian": ("svd", lrjax.riemannian_sgd(0.1, momentum=0.0)),
        **{f"parallel, every {k}": ("svd", moving(k)) for k in (1, 4, 8)},
    }


def training(form, tx, data):
    """Eight steps each time it is called, and what one costs by XLA."""
    params, static = network(form)

    def loss(params, x, y):
        for layer in eqx.combine(params, static):
            x = jnp.tanh(jax.vmap(layer)(x))
        return jnp.mean((x - y) ** 2)

    def step(params, state, x, y):
        grads = jax.grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    cost = compiled_cost(step, params, state, *data)
    widest = max(decomposed(jax.make_jaxpr(step)(params, state, *data).jaxpr), default=0)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    box = [(params, state)]

    def steps():
        for _ in range(PERIOD):
            box[0] = jitted(*box[0], *data)
        return box[0]

    return steps, {**cost, "largest_svd": widest}


def decomposed(jaxpr):
    """The longest side of every matrix whose SVD is taken."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "svd":
            yield max(eqn.invars[0].aval.shape)
        for inside in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from decomposed(inside)


def measure(tokens):
    """A row for each optimizer."""
    data = tuple(jr.normal(key, (tokens, SIZE)) for key in jr.split(jr.key(1)))
    made = {name: training(*pair, data) for name, pair in optimizers().items()}
    steps: dict[str, Callable[[], object]] = {name: f for name, (f, _) in made.items()}
    seconds = interleaved(steps, REPEATS, time.process_time)
    return [
        {
            "tokens": tokens,
            "optimizer": name,
            "milliseconds": 1e3 * median / PERIOD,
            "over factors": median_ratio(seconds, name, PLAIN),
            **made[name][1],
        }
        for name, median in medians(seconds).items()
    ]


def main():
    rows = [row for tokens in TOKENS for row in measure(tokens)]
    ratio = {(row["tokens"], row["optimizer"]): row["over factors"] for row in rows}
    widest = max(row["largest_svd"] for row in rows)
    every = lambda tokens, k: ratio[tokens, f"parallel, every {k}"]
    bounds = [
        bound("512 tokens: bases every 8 steps over factors", every(512, 8), at_most=1.3),
        bound("2048 tokens: bases every 4 steps over factors", every(2048, 4), at_most=1.3),
        bound("largest SVD over the rank", widest / RANK, at_most=2),
    ]
    write_results("dlrt_step_cost", rows, bounds)


if __name__ == "__main__":
    main()

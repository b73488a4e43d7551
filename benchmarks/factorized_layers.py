"""What do layers in factors cost, forward and backward, beside dense ones?"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from _harness import bound, compiled_cost, interleaved, median_ratio, write_results

import lrjax


WIDTH, RANK, TOKENS = 1024, 128, 512
CHANNELS, SIZE, IMAGES = 128, 28, 8
VOCABULARY, EMBEDDING = 30_000, 384
DENSE = "dense"


def linear(key):
    """A layer 1024 → 1024 at an eighth of its rank."""
    node = lambda form: lrjax.nn.LowRankLinear(WIDTH, WIDTH, RANK, form=form, key=key)
    layers = {
        DENSE: eqx.nn.Linear(WIDTH, WIDTH, key=key),
        "pair": node("pair"),
        "svd": node("svd"),
    }
    return layers, jr.normal(key, (TOKENS, WIDTH))


def convolution(key):
    """A 3 × 3 convolution, every scheme at an eighth of the numbers."""
    dense = eqx.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, key=key)
    layers = {DENSE: dense}
    share = dense.weight.size // 8
    for scheme in ("inputs", "outputs", "first", "last"):
        rank = share // sum(lrjax.nn.fold_kernel(dense.weight, scheme).shape)
        layers[scheme] = lrjax.nn.LowRankConv(
            2, CHANNELS, CHANNELS, 3, rank, scheme=scheme, padding=1, key=key
        )
    ranks = (32, 32)
    layers["tucker"] = lrjax.nn.TuckerConv(
        2, CHANNELS, CHANNELS, 3, ranks, padding=1, key=key
    )
    return layers, jr.normal(key, (IMAGES, CHANNELS, SIZE, SIZE))


def embedding(key):
    """A table of 30,000 rows at an eighth of its rank."""
    layers = {
        DENSE: eqx.nn.Embedding(VOCABULARY, EMBEDDING, key=key),
        "pair": lrjax.nn.LowRankEmbedding(VOCABULARY, EMBEDDING, EMBEDDING // 8, key=key),
    }
    return layers, jr.randint(key, (TOKENS,), 0, VOCABULARY)


def passes(layer, x):
    """A forward pass, and the gradient with respect to the layer and its input."""
    arrays, static = eqx.partition(layer, eqx.is_array)
    forward = lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x)
    both = eqx.is_inexact_array(x)
    loss = lambda arrays, x: jnp.sum(forward(arrays, x) ** 2)
    gradient = jax.grad(loss, (0, 1) if both else 0)
    runs = {"forward": forward, "forward and backward": gradient}
    costs = {name: compiled_cost(run, arrays, x) for name, run in runs.items()}
    compiled = {name: jax.jit(run) for name, run in runs.items()}
    return {n: (lambda f=f: f(arrays, x)) for n, f in compiled.items()}, costs


def measure(title, layers, x):
    """Rows of one layer, and its seconds by pass and variant."""
    made = {name: passes(layer, x) for name, layer in layers.items()}
    rows, seconds = [], {}
    for which in ("forward", "forward and backward"):
        runs = {name: runs[which] for name, (runs, _) in made.items()}
        seconds[which] = interleaved(runs, repeats=30, clock=time.process_time)
        for name, (_, costs) in made.items():
            parameters = sum(a.size for a in jax.tree.leaves(layers[name]))
            rows.append(
                {
                    "layer": title,
                    "weight": name,
                    "pass": which,
                    "parameters": parameters,
                    "dense over it": median_ratio(seconds[which], DENSE, name),
                    **costs[which],
                }
            )
    return rows, seconds


def main():
    jax.config.update("jax_platforms", "cpu")
    rows, seconds = [], {}
    for make in (linear, convolution, embedding):
        layers, x = make(jr.key(0))
        new, seconds[make.__name__] = measure(make.__name__, layers, x)
        rows += new
    both = "forward and backward"
    faster = lambda of, name: median_ratio(seconds[of][both], DENSE, name)
    flops = {(r["layer"], r["weight"]): r["flops"] for r in rows if r["pass"] == both}
    ratio = flops["linear", DENSE] / flops["linear", "pair"]
    claim = f"{both} of a linear layer at an eighth of its rank"
    convs = ("inputs", "outputs", "first", "last")
    bounds = [
        bound(f"{claim}: faster than dense", faster("linear", "pair"), at_least=3),
        bound(f"{claim}: flops of dense over its own", ratio, at_least=3.8),
        bound(
            f"{both} of a convolution at an eighth of its numbers: the best scheme, faster",
            max(faster("convolution", name) for name in convs),
            at_least=2,
        ),
        bound(
            f"{both} of an embedding at an eighth of its rank: faster than dense",
            faster("embedding", "pair"),
            at_least=1,
        ),
    ]
    write_results("factorized_layers", rows, bounds)


if __name__ == "__main__":
    main()

"""How small may a real language model become, by a weighted fit and by plain SVD?

SmolLM2-135M-Instruct, without training. Its layers are fitted on articles of Python's own
reference manual, and measured on others of it: the loss of the next token, how often the
likeliest next token is still that of the model itself, and the divergence from its
distribution. The table of tokens, a fifth of the numbers, is the head as well and stays.
The fit by sensitivity is left out: its decompositions, of 90 matrices of 1536 × 1536 and
more, take longer than all of this.
"""

import time
from pydoc_data.topics import topics

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _harness import bound, write_results

import lrjax
from lrjax._tour import decoder as smollm2
from lrjax.compression import decompose, layer_statistics, uniform_ranks
from lrjax.lowrank import knapsack_ranks


RATIOS = (0.9, 0.8, 0.7)
METHODS = ("svd", "inputs")
ALLOCATORS = (knapsack_ranks, uniform_ranks)
CONTEXT, BATCH, FITTED, HELD = 128, 4, 24, 8


def texts(file):
    """Batches of windows to fit on, and of whole articles that are held back."""
    tokenizer = smollm2.load_tokenizer(file)
    articles = [np.array(tokenizer.encode(text).ids) for _, text in sorted(topics.items())]
    held = np.concatenate(articles[::10])
    fitted = np.concatenate([a for i, a in enumerate(articles) if i % 10])
    return batches(fitted, FITTED), batches(held, HELD)


def batches(tokens, count):
    starts = np.random.default_rng(0).integers(0, len(tokens) - CONTEXT, count)
    windows = jnp.asarray(tokens[starts[:, None] + np.arange(CONTEXT + 1)])
    return list(windows.reshape(-1, BATCH, CONTEXT + 1))


@eqx.filter_jit
def log_probabilities(model, tokens):
    return jax.nn.log_softmax(jax.vmap(model)(tokens[:, :-1]))


@jax.jit
def compared(ours, theirs, tokens):
    """Loss; how often the likeliest token is the same; divergence from the model."""
    picked = jnp.take_along_axis(ours, tokens[:, 1:, None], axis=-1)
    return {
        "loss": -jnp.mean(picked),
        "agreement": jnp.mean(jnp.argmax(ours, -1) == jnp.argmax(theirs, -1)),
        "divergence": jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)),
    }


def quality(small, originals, held):
    """The means over the batches that are held back."""
    small = lrjax.nn.densify(small)
    each = [
        compared(log_probabilities(small, tokens), theirs, tokens)
        for theirs, tokens in zip(originals, held, strict=True)
    ]
    return jax.tree.map(lambda *x: float(np.mean(x)), *each)


def main():
    clock = time.process_time
    file = smollm2.model_file()
    model = smollm2.load_decoder(file)
    fitted, held = texts(file)
    start = clock()
    statistics = jax.block_until_ready(
        layer_statistics(model, fitted, call=log_probabilities, sensitivity=False)
    )
    summing = clock() - start
    originals = [log_probabilities(model, tokens) for tokens in held]
    whole = quality(model, originals, held)
    rows = [{"method": "the model itself", "allocator": None, "ratio": 1.0, **whole}]
    found = {}
    for method in METHODS:
        start = clock()
        parts = decompose(model, statistics, method=method)
        jax.block_until_ready(parts.spectra)
        seconds = clock() - start
        for ratio in RATIOS:
            for allocate in ALLOCATORS:
                small, report = parts.cut(budget=ratio, allocate=allocate)
                of = quality(small, originals, held)
                found[method, allocate, ratio] = of
                rows.append(
                    {
                        "method": method,
                        "allocator": allocate.__name__,
                        "ratio": ratio,
                        "numbers": report.after,
                        **of,
                        "ranks": {row.path: row.rank for row in report.layers if row.rank},
                        "seconds of statistics": summing,
                        "seconds of decomposition": seconds,
                    }
                )
    best = lambda method, ratio, name: min(
        of[name] for (m, _, r), of in found.items() if (m, r) == (method, ratio)
    )
    write_results(
        "compress_smollm2",
        rows,
        [
            bound(
                "perplexity on held-back text at 90 % of the numbers, by inputs, over that "
                "of SmolLM2",
                np.exp(found["inputs", knapsack_ranks, 0.9]["loss"] - whole["loss"]),
                at_most=1.5,
            ),
            bound(
                "least advantage over plain SVD of all sizes, of the best allocators, in "
                "nats a token",
                min(best("svd", r, "loss") - best("inputs", r, "loss") for r in RATIOS),
                at_least=1,
            ),
        ],
        "gguf",
        "tokenizers",
    )


if __name__ == "__main__":
    main()

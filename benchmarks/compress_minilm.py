"""How small may a real text encoder become, by a weighted fit and by plain SVD?"""

import tempfile
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _harness import bound, write_results

import lrjax
from lrjax._tour import docstrings, encoder as minilm
from lrjax.compression import decompose, layer_statistics


RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5)
METHODS = ("svd", "inputs", "covariance", "sensitivity")
CUT, LONG, BATCH, HELD = 24, 40, 32, 240


def unit_embeddings(model, batch):
    """Embeddings of length one: what the sensitivity is that of."""
    embeddings = model(*batch)
    return embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True)


@eqx.filter_jit
def embed(model, batch):
    return unit_embeddings(model, batch)


def held_back(model, batches):
    return np.concatenate([embed(model, batch) for batch in batches])


def in_batches(ids, mask):
    count = len(ids) // BATCH * BATCH
    return [(ids[i : i + BATCH], mask[i : i + BATCH]) for i in range(0, count, BATCH)]


def texts(directory):
    """Sentences without padding to fit on, and whole ones that are held back."""
    train, test = docstrings.load(1500, HELD // 2)
    ids, mask = minilm.tokenize(minilm.load_tokenizer(directory, CUT), train.texts)
    long = mask.all(axis=1)
    held = minilm.tokenize(minilm.load_tokenizer(directory, LONG), test.texts)
    return in_batches(ids[long], mask[long]), in_batches(*held)


def reloaded(small, report, directory):
    """The compressed model from a file, into what ``factorize`` makes of these ranks."""
    ranks = {row.path: row.rank for row in report.layers if row.rank is not None}
    like, _ = lrjax.nn.factorize(minilm.load_encoder(directory), rank=ranks)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "small.eqx"
        eqx.tree_serialise_leaves(file, small)
        return eqx.tree_deserialise_leaves(file, like), file.stat().st_size


def main():
    directory = minilm.model_directory()
    model = minilm.load_encoder(directory)
    fitted, held = texts(directory)
    clock = time.process_time
    start = clock()
    statistics = jax.block_until_ready(
        layer_statistics(model, fitted, call=unit_embeddings)
    )
    seconds = {"statistics": clock() - start}
    original = held_back(model, held)
    rows, cosine = [], {}
    for method in METHODS:
        start = clock()
        parts = decompose(model, statistics, method=method)
        jax.block_until_ready(parts.spectra)
        seconds[method] = clock() - start
        for ratio in RATIOS:
            small, report = parts.cut(budget=ratio)
            cosines = np.sum(held_back(lrjax.nn.densify(small), held) * original, axis=1)
            cosine[method, ratio] = float(np.mean(cosines))
            rows.append(
                {
                    "method": method,
                    "numbers": report.after,
                    "ratio": ratio,
                    "mean cosine": cosine[method, ratio],
                    "worst cosine": float(np.min(cosines)),
                    "layers in factors": sum(row.rank is not None for row in report.layers),
                    "seconds of statistics": seconds["statistics"],
                    "seconds of decomposition": seconds[method],
                }
            )
            if (method, ratio) == ("sensitivity", 0.7):
                kept = (small, report)
    again, size = reloaded(*kept, directory)
    gap = np.abs(held_back(again, held) - held_back(kept[0], held)).max()
    gained = lambda method: min(cosine[method, r] - cosine["svd", r] for r in RATIOS)
    write_results(
        "compress_minilm",
        rows,
        [
            bound(
                "mean cosine to the embeddings of MiniLM on held-back text, at 70 % of its "
                "parameters by sensitivity, less that of plain SVD at 90 %",
                cosine["sensitivity", 0.7] - cosine["svd", 0.9],
                at_least=0,
            ),
            bound("mean cosine at 70 %", cosine["sensitivity", 0.7], at_least=0.97),
            bound(
                "least advantage over plain SVD of all ratios, by sensitivity",
                gained("sensitivity"),
                at_least=0,
            ),
            bound(
                "least advantage over plain SVD of all ratios, by inputs",
                gained("inputs"),
                at_least=0,
            ),
            bound(
                "largest difference of embeddings after saving and loading", gap, at_most=0
            ),
            bound(
                "bytes of the file over those of the model in float32",
                size / (4 * kept[1].before),
                at_most=0.701,
            ),
        ],
        "safetensors",
        "tokenizers",
    )


if __name__ == "__main__":
    main()

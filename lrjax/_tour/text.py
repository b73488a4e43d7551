import importlib.util
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import lrjax

from . import docstrings
from .encoder import (
    INSTALL,
    MINILM,
    load_encoder,
    load_tokenizer,
    model_directory,
    reference,
    tokenize,
)
from .report import Check, Report


TITLE = "text: MiniLM tells whether a docstring describes a class or a function"
RANK, LENGTH, BATCH = 8, 32, 32
COLORS = ("#c8553d", "#1b6ca8")


class Batch(NamedTuple):
    """Tokenized sentences: ids and mask ``(n, length)``, labels ``(n,)``."""

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray


@eqx.filter_jit
def _embed(encoder, ids, mask):
    return encoder(ids, mask)


def embed(encoder, ids, mask) -> np.ndarray:
    """The embeddings of any number of texts, computed in batches of one size."""
    short = -len(ids) % 64
    ids, mask = (np.pad(x, ((0, short), (0, 0)), mode="edge") for x in (ids, mask))
    parts = [
        np.asarray(_embed(encoder, ids[i : i + 64], mask[i : i + 64]))
        for i in range(0, len(ids), 64)
    ]
    return np.concatenate(parts)[: len(ids) - short]


def cross_entropy(head, features, labels):
    """The mean loss of a linear head on the embeddings."""
    scores = jax.vmap(head)(features)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, labels))


def fit_head(features, labels):
    """The head alone: logistic regression whose penalty cross-validation picks."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    grid = {"C": np.geomspace(1e-3, 1, 7)}
    search = GridSearchCV(LogisticRegression(max_iter=2000), grid, cv=5)
    model = search.fit(features, labels).best_estimator_
    half = np.concatenate([-model.coef_, model.coef_]) / 2
    bias = np.concatenate([-model.intercept_, model.intercept_]) / 2
    head = eqx.nn.Linear(MINILM.width, 2, key=jr.key(0))
    arrays = (jnp.asarray(half, jnp.float32), jnp.asarray(bias, jnp.float32))
    return eqx.tree_at(lambda h: (h.weight, h.bias), head, arrays)


def fit_lora(encoder, adapters, head, data, steps):
    """LoRA and the head together: adapters, head, seconds a step, bytes of Adam."""
    params, frozen = lrjax.partition(adapters)
    tx = optax.adam(optax.linear_schedule(2e-3, 2e-4, steps))

    @eqx.filter_jit
    def step(trained, state, encoder, batch):
        def loss(trained):
            bound = lrjax.bind(encoder, eqx.combine(trained[0], frozen))
            features = bound(batch.ids, batch.mask)
            return cross_entropy(trained[1], features, batch.labels)

        updates, state = tx.update(jax.grad(loss)(trained), state)
        return optax.apply_updates(trained, updates), state

    trained: Any = (params, head)
    state, seconds = tx.init(trained), []
    random = np.random.default_rng(0)
    epochs = 1 + steps * BATCH // len(data.labels)
    order = np.concatenate([random.permutation(len(data.labels)) for _ in range(epochs)])
    for rows in order[: steps * BATCH].reshape(steps, BATCH):
        batch = Batch(*(x[rows] for x in data))
        begin = time.perf_counter()
        trained, state = jax.block_until_ready(step(trained, state, encoder, batch))
        seconds.append(time.perf_counter() - begin)
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    adapters = eqx.combine(trained[0], frozen)
    return adapters, trained[1], float(np.median(seconds[1:])), state_bytes


def score(head, features) -> np.ndarray:
    """The scores of the two kinds for each embedding."""
    return features @ np.asarray(head.weight).T + np.asarray(head.bias)


def word_counts(train, test) -> float:
    """What TF-IDF and logistic regression reach, with no pretrained model at all."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LogisticRegression(C=10.0, max_iter=1000)
    model.fit(words.fit_transform(train.texts), train.labels)
    return float(model.score(words.transform(test.texts), test.labels))


def missing() -> str:
    """What the part needs and is not installed, as one sentence with the install line."""
    if model_directory() is None:
        return f"the pretrained model is not installed: {INSTALL}"
    others = ("safetensors", "tokenizers", *docstrings.LIBRARIES)
    absent = [name for name in others if importlib.util.find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} missing: python -m pip install 'lrjax[tour]'"
    return ""


def run(out: Path, quick: bool) -> Report:
    """Embeddings against the reference; then head only against LoRA on real sentences."""
    directory = model_directory()
    if directory is None or missing():
        return Report(TITLE, skipped=missing())
    encoder = load_encoder(directory)
    texts, expected = reference()
    got = embed(encoder, *tokenize(load_tokenizer(directory, 64), texts))
    got /= np.linalg.norm(got, axis=1, keepdims=True)
    embedding_error = float(np.max(np.abs(got - expected)))

    texts = docstrings.load(*((250, 100) if quick else (600, 250)))
    tokenizer = load_tokenizer(directory, LENGTH)
    train, test = (
        Batch(*tokenize(tokenizer, part.texts), np.array(part.labels)) for part in texts
    )
    before = [embed(encoder, part.ids, part.mask) for part in (train, test)]
    head = fit_head(before[0], train.labels)

    adapters = eqx.filter_jit(lrjax.adapt)(
        encoder,
        lrjax.LoRA(RANK),
        where=lambda path, _: path in ("blocks.query", "blocks.value"),
        key=jr.key(0),
    )
    steps = 16 if quick else 60
    adapters, lora_head, seconds, state_bytes = fit_lora(
        encoder, adapters, head, train, steps
    )
    merged = lrjax.merge(encoder, adapters)
    after = embed(merged, test.ids, test.mask)
    bound = embed(lrjax.bind(encoder, adapters), test.ids[:128], test.mask[:128])
    gap = float(np.max(np.abs(bound - after[:128])) / np.max(np.abs(bound)))

    logits = {"head only": score(head, before[1]), "LoRA": score(lora_head, after)}
    guesses = {name: np.argmax(x, axis=1) for name, x in logits.items()}
    scores = {name: float(np.mean(g == test.labels)) for name, g in guesses.items()}
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree) if eqx.is_array(x))
    head_numbers = count(head)
    lora_numbers = head_numbers + count(lrjax.partition(adapters)[0])
    _plot(logits, guesses, test.labels, texts[1].texts, out / "text.png")
    return Report(
        title=TITLE,
        rows=(
            {
                "method": "word counts, no model",
                "held back": word_counts(*texts),
                "trainable": "-",
                "optimizer bytes": "-",
                "ms a step": "-",
            },
            {
                "method": "head only",
                "held back": scores["head only"],
                "trainable": head_numbers,
                "optimizer bytes": 8 * head_numbers + 4,
                "ms a step": "-",
            },
            {
                "method": f"LoRA, {steps} steps",
                "held back": scores["LoRA"],
                "trainable": lora_numbers,
                "optimizer bytes": state_bytes,
                "ms a step": 1e3 * seconds,
            },
        ),
        checks=(
            Check("largest difference from PyTorch's embeddings", embedding_error, 1e-4),
            Check(
                "LoRA above the head alone, accuracy",
                scores["LoRA"] - scores["head only"],
                -0.03 if quick else 0.01,
                at_most=False,
            ),
            Check("merged against bound embeddings, relative", gap, 1e-5),
            Check(
                "trained numbers over those of the model",
                lora_numbers / count(encoder),
                0.01,
            ),
        ),
        figures=("text.png",),
    )


def _plot(logits, guesses, labels, sentences, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 6), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(2.2, 1))
    top, bottom = (figure.add_subfigure(cell) for cell in grid)
    panels = top.subplots(1, 2, sharey=True)
    for panel, (name, scores) in zip(panels, logits.items(), strict=True):
        margin = scores[:, 1] - scores[:, 0]
        bins = np.linspace(-8, 8, 41)
        for kind, (word, color) in enumerate(zip(docstrings.KINDS, COLORS, strict=True)):
            mine = np.clip(margin[labels == kind], -8, 8)
            panel.hist(mine, bins, color=color, alpha=0.6, label=f"docstring of a {word}")
        panel.axvline(0, color="0.3", lw=1)
        accuracy = np.mean(guesses[name] == labels)
        panel.set(
            title=f"{name}: {accuracy:.1%} of {len(labels)} held-back sentences",
            xlabel="← class      log-odds (cut at ±8)      function →",
        )
    panels[0].legend(frameon=False)
    _plot_sentences(bottom, guesses, labels, sentences)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_sentences(figure, guesses, labels, sentences) -> None:
    """Sentences that the head alone gets wrong and LoRA gets right."""
    gained = np.flatnonzero((guesses["head only"] != labels) & (guesses["LoRA"] == labels))
    lost = np.sum((guesses["head only"] == labels) & (guesses["LoRA"] != labels))
    lines = []
    for i in gained[:: max(1, len(gained) // 4)][:4]:
        wrong = docstrings.KINDS[guesses["head only"][i]]
        right = docstrings.KINDS[guesses["LoRA"][i]]
        text = textwrap.shorten(sentences[i], 110, placeholder=" …")
        lines.append(f"“{text}”   {wrong} → {right}")
    figure.suptitle(
        f"{len(gained)} sentences that the head alone misplaces and LoRA places right "
        f"(the other way round: {lost}), four of them:",
        fontsize=10,
    )
    figure.text(
        0.02, 0.7, "\n".join(lines), fontsize=9, va="top", linespacing=1.6, parse_math=False
    )

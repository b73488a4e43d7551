"""How much of what task labels are worth does a pool of clusters keep without them?

Digits of scikit-learn in a stream of five tasks, one epoch each, through one small network
with one head: turned by 0 to 144 degrees, or with their pixels permuted. A-GEM and OGD are
told when a task ends, and store samples of it then. Their task-agnostic forms are told
nothing, and offer one sample of each batch to pools of clusters (TA-A-GEM, TA-OGD). What is
compared is the gain in average accuracy over plain training, as the mean of five seeds and
at equal memories; with it settings of the pools, and two buffers without clusters: the
last samples that were offered, and a reservoir.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _harness import bound, write_results
from jax.flatten_util import ravel_pytree
from scipy.ndimage import rotate
from sklearn.datasets import load_digits

import lrjax
from lrjax.continual import ClusterPool, GradientBasis


TASKS, SEEDS, BATCH, STEPS, HIDDEN, RATE = 5, 5, 10, 140, 64, 0.1
SAMPLES, DIRECTIONS = 200, 100  # room for images of A-GEM, for gradients of OGD
EVERY = 14  # steps between measurements, and between refreshes of the bases of TA-OGD


def stream(kind: str):
    """Images ``(tasks, samples, 64)`` and labels, to train on and to test on."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    draw = np.random.default_rng(1)
    if kind == "turned":
        turn = lambda angle: rotate(
            x.reshape(-1, 8, 8), angle, axes=(1, 2), reshape=False, order=1
        )
        tasks = [turn(36 * task).reshape(-1, 64) for task in range(TASKS)]
    else:
        tasks = [x, *(x[:, draw.permutation(64)] for _ in range(TASKS - 1))]
    images = np.stack(tasks).astype(np.float32)[:, order] / 16
    train = STEPS * BATCH
    return images[:, :train], y[order][:train], images[:, train:], y[order][train:]


def start(key):
    """A network of one hidden layer."""
    a, b = jr.split(key)
    return {
        "first": jr.normal(a, (64, HIDDEN)) / 8,
        "bias": jnp.zeros(HIDDEN),
        "second": jr.normal(b, (HIDDEN, 10)) / HIDDEN**0.5,
    }


def hidden(params, x):
    return jax.nn.relu(x @ params["first"] + params["bias"])


def logits(params, x):
    return hidden(params, x) @ params["second"]


def loss(params, x, y, there=1.0):
    """The mean over the samples that are there."""
    logs = jax.nn.log_softmax(logits(params, x))
    there = jnp.broadcast_to(there, y.shape)
    of_label = jnp.take_along_axis(logs, y[:, None], axis=1)[:, 0]
    return -jnp.sum(of_label * there) / jnp.maximum(jnp.sum(there), 1)


class Method(NamedTuple):
    """What a method keeps, and what it makes of a gradient.

    Attributes:
        begin: ``params -> memory``.
        project: ``(memory, params, gradient) -> gradient``.
        see: ``(memory, params, x, y, count, key) -> memory``, one sample of each batch.
        refresh: ``memory -> memory``, from time to time.
        end: ``(memory, params, task, x, y, key) -> memory``, at the end of a task: where
            it is anything, task labels are used.
    """

    begin: Callable[..., Any] = lambda params: ()
    project: Callable[..., Any] = lambda memory, params, grad: grad
    see: Callable[..., Any] = lambda memory, *rest: memory
    refresh: Callable[..., Any] = lambda memory: memory
    end: Callable[..., Any] = lambda memory, *rest: memory


def off_conflict(params, grad, x, y, there):
    """A-GEM: the gradient without its conflict with that of all samples in memory."""
    memory = jax.grad(loss)(params, x, y, there)
    tx = lrjax.project_conflicts()
    one = jax.tree.map(lambda m: m[None], memory)
    return tx.update(grad, tx.init(params), memory=one)[0]


def buffer(places):
    return jnp.zeros((places, 64)), jnp.zeros(places, jnp.int32), jnp.zeros(places)


def a_gem():
    """Told when a task ends: as many samples of each as there is room for."""
    each = SAMPLES // (TASKS - 1)

    def end(memory, params, task, x, y, key):
        chosen = jr.choice(key, len(x), (each,), replace=False)
        places = task * each + jnp.arange(each)
        put = lambda old, new: old.at[places].set(new, mode="drop")
        return tuple(map(put, memory, (x[chosen], y[chosen], jnp.ones(each))))

    project = lambda memory, params, grad: off_conflict(params, grad, *memory)
    return Method(lambda params: buffer(SAMPLES), project, end=end)


def ta_a_gem(clusters, size, *, merge=False, features=False):
    """Told nothing: a pool for each class, of samples or of what the hidden layer sees."""

    def begin(params):
        point = jnp.zeros(HIDDEN if features else 64)
        carried = jnp.zeros(64), jnp.zeros([], jnp.int32)
        return ClusterPool.start(
            point, carried, clusters=clusters, size=size, pools=10, merge=merge
        )

    def project(memory, params, grad):
        _, (x, y), there = memory.contents()
        return off_conflict(params, grad, x, y, there)

    def see(memory, params, x, y, count, key):
        point = hidden(params, x) if features else x
        return memory.add(point, (x, y), pool=y)

    return Method(begin, project, see)


def without_clusters(reservoir):
    """The last samples that were offered, or each of all of them as likely as another."""

    def see(memory, params, x, y, count, key):
        drawn = jr.randint(key, (), 0, count + 1)
        place = jnp.where(count < SAMPLES, count, drawn) if reservoir else count % SAMPLES
        put = lambda old, new: old.at[place].set(new, mode="drop")
        return tuple(map(put, memory, (x, y, 1.0)))

    project = lambda memory, params, grad: off_conflict(params, grad, *memory)
    return Method(lambda params: buffer(SAMPLES), project, see)


def logit_gradient(params, x, y):
    """Of the logit of the true class."""
    return jax.grad(lambda params: logits(params, x)[y])(params)


def ogd():
    """Told when a task ends: gradients at as many samples of each as there is room for."""
    each = DIRECTIONS // (TASKS - 1)

    def end(memory, params, task, x, y, key):
        chosen = jr.choice(key, len(x), (each,), replace=False)
        return memory.add(
            jax.vmap(logit_gradient, (None, 0, 0))(params, x[chosen], y[chosen])
        )

    begin = lambda params: GradientBasis.start(params, DIRECTIONS)
    return Method(begin, lambda memory, params, grad: memory.project_out(grad), end=end)


def ta_ogd(clusters, size, *, merge=False):
    """Told nothing: pools of gradients, by their own distances."""

    def begin(params):
        flat = jnp.zeros_like(ravel_pytree(params)[0])
        pool = ClusterPool.start(flat, clusters=clusters, size=size, pools=10, merge=merge)
        return pool, jnp.zeros((len(flat), 10 * clusters * size))

    def see(memory, params, x, y, count, key):
        flat = ravel_pytree(logit_gradient(params, x, y))[0]
        return memory[0].add(flat, pool=y), memory[1]

    def refresh(memory):
        unit = lrjax.linalg.unit_columns(memory[0].contents()[0].T)
        return memory[0], unit @ lrjax.linalg.inverse_root_gram(unit, 1e-5)

    def project(memory, params, grad):
        flat, back = ravel_pytree(grad)
        return back(flat - memory[1] @ (memory[1].T @ flat))

    return Method(begin, project, see, refresh)


def accuracies(method: Method, data):
    """The accuracy on each task, ``(seeds, tasks, times)``."""
    x, y, x_test, y_test = data

    def step(carry, batch):
        params, memory, count = carry
        x, y, key = batch
        first, second = jr.split(key)
        grad = method.project(memory, params, jax.grad(loss)(params, x, y))
        params = jax.tree.map(lambda p, g: p - RATE * g, params, grad)
        index = jr.randint(first, (), 0, BATCH)
        memory = method.see(memory, params, x[index], y[index], count, second)
        return (params, memory, count + 1), None

    def stretch(carry, batches):
        (params, memory, count), _ = jax.lax.scan(step, carry, batches)
        right = jnp.argmax(logits(params, x_test), -1) == y_test[None]
        return (params, method.refresh(memory), count), jnp.mean(right, axis=1)

    def task(carry, inputs):
        number, x, key = inputs
        order, ending, rest = jr.split(key, 3)
        chosen = jr.permutation(order, len(y)).reshape(-1, EVERY, BATCH)
        keys = jr.split(rest, STEPS).reshape(-1, EVERY)
        carry, seen = jax.lax.scan(stretch, carry, (x[chosen], y[chosen], keys))
        params, memory, count = carry
        memory = method.end(memory, params, number, x, y, ending)
        return (params, memory, count), seen

    def run(key, x):
        first, rest = jr.split(key)
        params = start(first)
        carry = params, method.begin(params), jnp.zeros([], jnp.int32)
        inputs = jnp.arange(TASKS), x, jr.split(rest, TASKS)
        return jax.lax.scan(task, carry, inputs)[1].reshape(-1, TASKS).T

    y, x_test, y_test = map(jnp.asarray, (y, x_test, y_test))
    return jax.jit(jax.vmap(run, (0, None)))(jr.split(jr.key(0), SEEDS), x)


METHODS = {
    "plain": Method(),
    "A-GEM": a_gem(),
    "TA-A-GEM": ta_a_gem(10, 2),
    "TA-A-GEM, merging": ta_a_gem(20, 1, merge=True),
    "TA-A-GEM, merging, features": ta_a_gem(20, 1, merge=True, features=True),
    "last samples": without_clusters(reservoir=False),
    "reservoir": without_clusters(reservoir=True),
    "OGD": ogd(),
    "TA-OGD": ta_ogd(5, 2),
    "TA-OGD, merging": ta_ogd(10, 1, merge=True),
}
TWINS = {"TA-A-GEM": "A-GEM", "TA-OGD": "OGD"}


def measured(kind: str) -> list[dict]:
    """The scores of all methods on a stream, mean and standard deviation over seeds."""
    data, rows = stream(kind), []
    learned = jnp.arange(1, TASKS + 1) * (STEPS // EVERY) - 1
    for name, method in METHODS.items():
        scores = jax.vmap(lambda a: lrjax.metrics.continual_scores(a, learned))(
            accuracies(method, data)
        )
        row = {"stream": kind, "method": name}
        for score in ("average_accuracy", "forgetting", "stability_gap"):
            row[score] = float(jnp.mean(getattr(scores, score)))
        row["deviation"] = float(jnp.std(scores.average_accuracy, ddof=1))
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


def main():
    rows, bounds = [], []
    for kind in ("turned", "permuted"):
        found = measured(kind)
        rows += found
        accuracy = {row["method"]: row["average_accuracy"] for row in found}
        gain = {name: value - accuracy["plain"] for name, value in accuracy.items()}
        for agnostic, aware in TWINS.items():
            kept = {n: gain[n] / gain[aware] for n in METHODS if n.startswith(agnostic)}
            best = max(kept, key=kept.get)
            claims = {agnostic: kept[agnostic], f"the best pool, {best}": kept[best]}
            if aware == "A-GEM":
                claims["a reservoir"] = gain["reservoir"] / gain[aware]
            for name, value in claims.items():
                claim = (
                    f"{kind} digits: share of the gain of {aware} that is kept by {name}"
                )
                bounds.append(bound(claim, value, at_least=0.8))
    write_results("continual_streams", rows, bounds)


if __name__ == "__main__":
    main()

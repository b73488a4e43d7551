"""How much of old tasks do steps keep that leave directions of them alone?

Digits turned by five angles, one task after the other, a network with one head for all,
Adam; the labels of the tasks are not known when it answers. Each method projects the steps
of Adam off directions of the tasks before: gradients of the logits of the true class at 50
samples of each (OGD), the inputs of all layers up to a share of their energy (GPM), or all
inputs but those of the smallest eigenvalues (Adam-NSCL), with the numbers of the papers.
"projected before Adam" is the trap: what Adam makes of a projected gradient leaks.
"all at once" trains on the tasks up to now together, an upper bound.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _harness import bound, write_results
from scipy.ndimage import rotate
from sklearn.datasets import load_digits

import lrjax
from lrjax.continual import GradientBasis, InputBases


ANGLES = (0, 30, 60, 90, 120)
SEEDS, STEPS, BATCH, RATE = 5, 300, 64, 2e-3
STORED = 50
# Of the first, second and last layer: those of GPM for permuted digits.
ENERGY = {"layers.0": 0.95, "layers.1": 0.99, "layers.2": 0.99}
SMALLEST = 10.0  # of Adam-NSCL for ten tasks
SAMPLE = 300  # of which GPM looks at the inputs


def digits(seed):
    """Turned images (angle, sample, 64) and labels (sample,), to train on and to test."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    images, labels = data.images[order] / 16, data.target[order]
    turned = [rotate(images, a, axes=(1, 2), reshape=False, order=1) for a in ANGLES]
    x = jnp.asarray(np.stack(turned).reshape(len(ANGLES), -1, 64), jnp.float32)
    y = jnp.asarray(labels)
    return (x[:, :1200], y[:1200]), (x[:, 1200:], y[1200:])


def network(key):
    return eqx.partition(eqx.nn.MLP(64, 10, 64, 2, key=key), eqx.is_inexact_array)


STATIC = network(jr.key(0))[1]


def logits(params, x):
    return jax.vmap(eqx.combine(params, STATIC))(x)


def loss(params, x, y):
    cross = optax.losses.softmax_cross_entropy_with_integer_labels
    return jnp.mean(cross(logits(params, x), y))


def true_logit(params, x, y):
    return eqx.combine(params, STATIC)(x)[y]


stored = jax.jit(jax.vmap(jax.grad(true_logit), (None, 0, 0)))
accuracy = jax.jit(
    lambda params, x, y: jnp.mean(jnp.argmax(logits(params, x.reshape(-1, 64)), 1) == y)
)


def trainer(make):
    """One compiled stretch of training, for all tasks and seeds."""

    @jax.jit
    def train(params, memory, x, y, key):
        tx = make(memory)

        def step(carry, key):
            params, state = carry
            rows = jr.randint(key, (BATCH,), 0, len(x))
            grads = jax.grad(loss)(params, x[rows], y[rows])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jr.split(key, STEPS)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

    return train


def behind(memory):
    return optax.chain(optax.adam(RATE), lrjax.project_out(memory))


def before(memory):
    return optax.chain(lrjax.project_out(memory), optax.adam(RATE))


class Plain:
    """Adam, which knows nothing of the past; and what the others are."""

    make = staticmethod(lambda memory: optax.adam(RATE))

    def start(self, params):
        return None

    def after(self, memory, params, x, y):
        return None

    def used(self, memory):
        """How many numbers are kept of the past."""
        return 0


class OGD(Plain):
    """Gradients of logits, of some samples of each task."""

    make = staticmethod(behind)

    def start(self, params):
        return GradientBasis.start(params, STORED * (len(ANGLES) - 1))

    def after(self, memory, params, x, y):
        return add(memory, stored(params, x[:STORED], y[:STORED]))

    def used(self, memory):
        numbers = sum(x[0].size for x in jax.tree.leaves(memory.directions))
        return int(memory.used) * numbers


class GPM(Plain):
    """Inputs of layers, up to a share of their energy."""

    def __init__(self, make=behind):
        self.make = make

    def start(self, params):
        return InputBases.start(params)

    def after(self, memory, params, x, y):
        model = eqx.combine(params, STATIC)
        return grow(memory, memory.statistics(model, [x[:SAMPLE]]))

    def used(self, memory):
        return sum(int(k) * len(memory.bases[path]) for path, k in memory.used.items())


class NSCL(GPM):
    """Inputs of layers, but those of the smallest eigenvalues of all tasks together."""

    def after(self, memory, params, x, y):
        model, empty = eqx.combine(params, STATIC), InputBases.start(params)
        new = empty.statistics(model, [x])
        old = self.sums
        self.sums = new if old is None else {p: old[p] + new[p] for p in new}
        return empty.grow(self.sums, smallest=SMALLEST)

    def start(self, params):
        self.sums = None
        return InputBases.start(params)

    def used(self, memory):  # the moments
        return sum(len(m) ** 2 for m in memory.bases.values())


add = eqx.filter_jit(GradientBasis.add)
grow = eqx.filter_jit(lambda memory, sums: memory.grow(sums, energy=ENERGY))
METHODS = {
    "plain": Plain(),
    "OGD": OGD(),
    "GPM": GPM(),
    "GPM, projected before Adam": GPM(before),
    "Adam-NSCL": NSCL(),
}


def run(method, train, seed):
    """Accuracies (after task, on task), the numbers kept, and what a layer has left."""
    (x, y), (test, labels) = digits(seed)
    params, key = network(jr.key(seed))[0], jr.key(100 + seed)
    memory = method.start(params)
    table = np.zeros((len(ANGLES), len(ANGLES)))
    for task in range(len(ANGLES)):
        params = train(params, memory, x[task], y, jr.fold_in(key, task))
        table[task] = [accuracy(params, test[i], labels) for i in range(len(ANGLES))]
        if task + 1 < len(ANGLES):
            memory = method.after(memory, params, x[task], y)
    return table, method.used(memory), memory


def all_at_once(train, seed):
    """The last row of the table of a network that saw all tasks together."""
    (x, y), (test, labels) = digits(seed)
    every, all_labels = x.reshape(-1, 64), jnp.tile(y, len(ANGLES))
    params = network(jr.key(seed))[0]
    for task in range(len(ANGLES)):
        key = jr.fold_in(jr.key(100 + seed), task)
        params = train(params, None, every, all_labels, key)
    return np.mean([accuracy(params, test[i], labels) for i in range(len(ANGLES))])


def summary(name, tables, kept):
    last = np.array([table[-1] for table in tables])
    learnt = np.array([np.diag(table) for table in tables])
    best = np.array([np.max(table[:-1, :-1], axis=0) for table in tables])
    mean, lost = 100 * np.mean(last, 1), 100 * np.mean(best - last[:, :-1], 1)
    return {
        "method": name,
        "accuracy_of_all": float(np.mean(mean)),
        "deviation_over_seeds": float(np.std(mean, ddof=1)),
        "forgetting": float(np.mean(lost)),
        "forgetting_deviation": float(np.std(lost, ddof=1)),
        "accuracy_when_learnt": float(100 * np.mean(learnt)),
        "last_task": float(100 * np.mean(last[:, -1])),
        "first_task_at_the_end": float(100 * np.mean(last[:, 0])),
        "kept_kilobytes": float(np.mean(kept)) * 4 / 1e3,
    }


def main():
    rows = []
    for name, method in METHODS.items():
        train = trainer(method.make)
        runs = [run(method, train, seed) for seed in range(SEEDS)]
        rows.append(summary(name, [r[0] for r in runs], [r[1] for r in runs]))
        memory = runs[0][2]
        if isinstance(memory, InputBases):
            used = {p: int(k) for p, k in memory.used.items()}
            rows[-1]["columns_used"] = used
            rows[-1]["columns"] = {p: m.shape[-1] for p, m in memory.bases.items()}
        print(rows[-1], flush=True)
    train = trainer(Plain.make)
    together = [100 * all_at_once(train, seed) for seed in range(SEEDS)]
    rows.append(
        {
            "method": "all at once",
            "accuracy_of_all": float(np.mean(together)),
            "deviation_over_seeds": float(np.std(together, ddof=1)),
        }
    )
    of = {row["method"]: row for row in rows}
    gain = lambda name: of[name]["accuracy_of_all"] - of["plain"]["accuracy_of_all"]
    lost = lambda name: of[name]["forgetting"] / of["plain"]["forgetting"]
    bounds = [
        bound("points of accuracy over plain Adam, OGD", gain("OGD"), at_least=5),
        bound("points of accuracy over plain Adam, GPM", gain("GPM"), at_least=5),
        bound(
            "points of accuracy over plain Adam, Adam-NSCL", gain("Adam-NSCL"), at_least=5
        ),
        bound("forgetting over that of plain Adam, OGD", lost("OGD"), at_most=0.7),
        bound("forgetting over that of plain Adam, GPM", lost("GPM"), at_most=0.5),
        bound(
            "forgetting over that of plain Adam, Adam-NSCL", lost("Adam-NSCL"), at_most=0.5
        ),
        bound(
            "points of forgetting that projecting before Adam costs, GPM",
            of["GPM, projected before Adam"]["forgetting"] - of["GPM"]["forgetting"],
            at_least=5,
        ),
    ]
    write_results("continual_projection", rows, bounds, "scikit-learn")


if __name__ == "__main__":
    main()

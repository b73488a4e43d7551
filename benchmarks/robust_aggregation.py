"""How much do workers that may send anything spoil a classifier, rule by rule?

Eight workers train a network 64-32-10 on the digits of scikit-learn, each on a batch of its
own; none, one, two or three of them attack. They flip the sign of their gradient and send
five times as much, send normal noise of ten times the size of a gradient, or agree on the
mean of the honest ones less 1.5 of their standard deviations at each coordinate, "a little
is enough", which no length gives away. Rules are used as they come: none is told how many
attack. Test accuracies are means of five seeds; all attacks and seeds of a rule are one
program.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _harness import bound, write_results
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

from lrjax import merging


SEEDS, STEPS, WORKERS, BATCH, TEST, RATE = 5, 200, 8, 32, 450, 0.2
ATTACKS = ("sign flip", "noise", "a little")
RULES = {
    "mean": merging.Mean(),
    "geometric median": merging.GeometricMedian(),
    "flag mean": merging.FlagMean(),
    "Krum": merging.Krum(),
    "multi-Krum of 5": merging.Krum(keep=5),
    "trimmed mean of 4": merging.TrimmedMean(2),
    "coordinate-wise median": merging.TrimmedMean(),
}


def digits(key):
    """Images with numbers in [0, 1] and labels: to learn from and to test."""
    images, labels = load_digits(return_X_y=True)
    order = jr.permutation(key, len(labels))
    images = jnp.asarray(images / 16, jnp.float32)[order]
    labels = jnp.asarray(labels)[order]
    return (images[TEST:], labels[TEST:]), (images[:TEST], labels[:TEST])


def attacked(gradients, attack, bad, key):
    """The gradients ``(workers, d)``, the first ``bad`` of them what the attack sends."""
    theirs = (jnp.arange(WORKERS) < bad)[:, None]
    honest = jnp.where(theirs, 0, 1)
    mean = jnp.sum(honest * gradients, axis=0) / jnp.sum(honest)
    gaps = honest * (gradients - mean[None]) ** 2
    spread = jnp.sqrt(jnp.sum(gaps, axis=0) / jnp.sum(honest))
    size = jnp.sqrt(jnp.mean(mean**2))
    sent = jnp.stack(
        [
            -5 * gradients,
            10 * size * jr.normal(key, gradients.shape),
            jnp.broadcast_to(mean - 1.5 * spread, gradients.shape),
        ]
    )
    return jnp.where(theirs, sent[attack], gradients)


def accuracy(rule, data, attack, bad, key):
    """On the test images, at the end."""
    (images, labels), (test, answers) = data
    k_init, k_run = jr.split(key)
    params, static = eqx.partition(
        eqx.nn.MLP(64, 10, 32, 1, jnp.tanh, key=k_init), eqx.is_array
    )
    flat, unravel = ravel_pytree(params)
    logits = lambda flat, x: jax.vmap(eqx.combine(unravel(flat), static))(x)

    def loss(flat, batch):
        of = optax.softmax_cross_entropy_with_integer_labels
        return of(logits(flat, images[batch]), labels[batch]).mean()

    def step(flat, key):
        k_batch, k_attack = jr.split(key)
        batches = jr.randint(k_batch, (WORKERS, BATCH), 0, len(labels))
        gradients = jax.vmap(jax.grad(loss), (None, 0))(flat, batches)
        gradients = attacked(gradients, attack, bad, k_attack)
        return flat - RATE * merging.aggregate_gradients(gradients, rule), None

    flat, _ = jax.lax.scan(step, flat, jr.split(k_run, STEPS))
    return jnp.mean(jnp.argmax(logits(flat, test), axis=-1) == answers)


def main():
    """A table of rules and attacks."""
    data = digits(jr.key(0))
    settings = [(0, 0), *((a, bad) for a in range(len(ATTACKS)) for bad in (1, 2, 3))]
    attacks, counts = map(jnp.asarray, zip(*settings, strict=True))
    keys = jr.split(jr.key(1), SEEDS)
    rows, table = [], {}
    for name, rule in RULES.items():
        of = lambda attack, bad, key, rule=rule: accuracy(rule, data, attack, bad, key)
        run = jax.jit(jax.vmap(jax.vmap(of, (None, None, 0)), (0, 0, None)))
        found = np.asarray(run(attacks, counts, keys))
        for (attack, bad), seeds in zip(settings, found, strict=True):
            what = ATTACKS[attack] if bad else "none"
            table[name, what, bad] = seeds.mean()
            rows.append(
                {
                    "rule": name,
                    "attack": what,
                    "attackers": bad,
                    "accuracy": float(seeds.mean()),
                    "spread": float(seeds.std(ddof=1)),
                }
            )
    clean = table["mean", "none", 0]
    gross = [(a, b) for a in ATTACKS[:2] for b in (1, 2, 3)]
    median = min(table["geometric median", a, b] for a, b in gross)
    flag = min(table["flag mean", a, b] for a, b in gross)
    little = max(table[name, "a little", 3] for name in RULES if name != "mean")
    bounds = [
        bound("accuracy of the mean without attackers", clean, at_least=0.9),
        bound(
            "the mean with three that flip their sign, over that without",
            table["mean", "sign flip", 3] / clean,
            at_most=0.5,
        ),
        bound(
            "geometric median, up to three gross attackers, over the mean without any",
            median / clean,
            at_least=0.97,
        ),
        bound(
            "flag mean, up to three gross attackers, over the mean without any",
            flag / clean,
            at_least=0.97,
        ),
        bound(
            "what robustness costs without attackers, the worst rule",
            1 - min(table[name, "none", 0] for name in RULES) / clean,
            at_most=0.05,
        ),
        bound(
            "the best robust rule where three send a little, over the mean without any",
            little / clean,
            at_least=0.9,
        ),
    ]
    write_results("robust_aggregation", rows, bounds, "scikit-learn")


if __name__ == "__main__":
    main()

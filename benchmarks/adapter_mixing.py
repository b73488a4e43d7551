"""Do adapters of known domains together serve a domain that none of them has seen?

Digits of scikit-learn in fifteen domains: five angles, each plain, moved and blurred. A
network knows upright plain digits. Ten domains have adapters; five pairs of an angle and a
style, both known from other pairs, are held out. Mixtures of the ten adapters are compared
there: by equal weights, by Arrow, by gates or single weights that are trained on 32
labelled images; beside LoRA on these images alone, one LoRA of all ten domains, and FLix,
whose adapters belong to the eight features. Rates were chosen on another seed.
"""

import dataclasses
import statistics

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _harness import bound, write_results
from scipy import ndimage
from sklearn.datasets import load_digits

import lrjax
from lrjax import adapters as room


ANGLES, STYLES = (-40, -20, 0, 20, 40), ("plain", "moved", "blurred")
HELD_OUT = ((0, 1), (1, 2), (2, 1), (3, 2), (4, 0))
DOMAINS = [(a, s) for a in range(5) for s in range(3)]
KNOWN = [DOMAINS.index(d) for d in DOMAINS if d not in HELD_OUT]
UNKNOWN = [DOMAINS.index(d) for d in HELD_OUT]
FEATURES = np.array([[*np.eye(5)[a], *np.eye(3)[s]] for a, s in DOMAINS], dtype=np.float32)
RANK, TRAIN, FEW, BATCH, STEPS = 4, 1000, 32, 64, 400
RATES = {"adapter": 1e-2, "gates": 1e-1, "few": 1e-2}


def load():
    """All images in all domains ``(15, 1797, 64)``, and their labels."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8) / 16
    moved = lambda x: ndimage.shift(x, (0, 1, 1), order=0)
    styles = (lambda x: x, moved, lambda x: ndimage.uniform_filter(x, (0, 3, 3)))
    turned = [
        np.clip(ndimage.rotate(images, angle, (1, 2), reshape=False, order=1), 0, 1)
        for angle in ANGLES
    ]
    domains = [styles[s](turned[a]).reshape(-1, 64) for a, s in DOMAINS]
    return jnp.asarray(np.stack(domains), jnp.float32), jnp.asarray(labels)


def loss_of(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def fit(params, loss, rate, key, steps=STEPS):
    """Adam with a rate that falls to zero; ``loss(params, key)``."""
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, key):
        params, state = carry
        grads = jax.grad(loss)(params, key)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    start = (params, tx.init(params))
    return jax.lax.scan(step, start, jr.split(key, steps))[0][0]


def accuracy(model, x, y):
    return jnp.mean(jnp.argmax(jax.vmap(model)(x), axis=1) == y)


def fit_adapters(model, start, rate, x, y, key, batch=BATCH, steps=STEPS):
    """What of some adapters is trained, trained on a few images at a time."""
    params, frozen = lrjax.partition(start)

    def loss(params, key):
        i = jr.choice(key, len(x), (min(batch, len(x)),), replace=False)
        own = lrjax.bind(model, eqx.combine(params, frozen))
        return loss_of(jax.vmap(own)(x[i]), y[i])

    return eqx.combine(fit(params, loss, rate, key, steps), frozen)


def fit_features(model, x, y, rate, drop, key):
    """FLix: eight adapters, of which each image meets the two of its domain."""
    keys = jr.split(key, len(FEATURES[0]) + 1)
    stack = room.stack(
        [lrjax.adapt(model, lrjax.LoRA(RANK), key=k) for k in [keys[i] for i in range(7)]],
        model,
    )
    params, frozen = lrjax.partition(stack.adapters)
    features, everything = jnp.asarray(FEATURES[KNOWN]), jnp.arange(1, 9)

    def loss(params, key):
        which, where, dropped = jr.split(key, 3)
        domain = jr.randint(which, (BATCH,), 0, len(KNOWN))
        i = jr.randint(where, (BATCH,), 0, len(y))
        own = dataclasses.replace(stack, adapters=eqx.combine(params, frozen))
        weights = room.feature_weights(features[domain], rate=drop, key=dropped)

        def call(weights, x):
            return lrjax.bind(model, room.select(own, everything, weights))(x)

        return loss_of(jax.vmap(call)(weights, x[domain, i]), y[i])

    params = fit(params, loss, rate, keys[8], 4 * STEPS)
    return dataclasses.replace(stack, adapters=eqx.combine(params, frozen))


def run(domains, labels, key, rates):
    """The accuracy of every method on each domain that is held out."""
    k = jr.split(key, 8)
    order = jr.permutation(k[0], len(labels))
    domains, labels = domains[:, order], labels[order]
    x, y = domains[:, :TRAIN], labels[:TRAIN]
    tests, answers = domains[:, TRAIN:], labels[TRAIN:]
    arrays, static = eqx.partition(eqx.nn.MLP(64, 10, 128, 1, key=k[1]), eqx.is_array)

    def base_loss(arrays, key):
        i = jr.randint(key, (BATCH,), 0, TRAIN)
        return loss_of(jax.vmap(eqx.combine(arrays, static))(x[0, i]), y[i])

    model = eqx.combine(fit(arrays, base_loss, 3e-3, k[2]), static)
    known, unknown = jnp.array(KNOWN), jnp.array(UNKNOWN)

    def expert(x, key):
        start = lrjax.adapt(model, lrjax.LoRA(RANK), key=key)
        return fit_adapters(model, start, rates["adapter"], x, y, key)

    experts = jax.vmap(expert)(x[known], jr.split(k[3], len(KNOWN)))
    each = [jax.tree.map(lambda a, i=i: a[i], experts) for i in range(len(KNOWN))]
    stack = room.stack(each, model)
    ids = jnp.arange(1, len(KNOWN) + 1)

    def on_unknown(make):
        """``make(features, few images, their labels, key)`` gives adapters, or None."""

        def one(domain, key):
            few, features = x[domain, :FEW], jnp.asarray(FEATURES)[domain]
            adapters = make(features, few, y[:FEW], key)
            own = model if adapters is None else lrjax.bind(model, adapters)
            return accuracy(own, tests[domain], answers)

        return jax.vmap(one)(unknown, jr.split(k[4], len(UNKNOWN)))

    def few_lora(f, x, y, key):
        start = lrjax.adapt(model, lrjax.LoRA(RANK), key=key)
        return fit_adapters(model, start, rates["few"], x, y, key, steps=300)

    def few_gates(f, x, y, key):
        start = room.mix(stack, room.LearnedGates(), model)
        return fit_adapters(model, start, rates["gates"], x, y, key, steps=300)

    def few_weights(f, x, y, key):
        def loss(scores, key):
            own = room.select(stack, ids, room.softmax_weights(scores))
            return loss_of(jax.vmap(lrjax.bind(model, own))(x), y)

        scores = fit(jnp.zeros(len(KNOWN)), loss, rates["gates"], key, 300)
        return room.select(stack, ids, room.softmax_weights(scores))

    def joint(key):
        start = lrjax.adapt(model, lrjax.LoRA(RANK), key=key)
        every = x[known].reshape(-1, 64)
        return fit_adapters(
            model,
            start,
            rates["adapter"],
            every,
            jnp.tile(y, len(KNOWN)),
            key,
            steps=4 * STEPS,
        )

    mean = room.select(stack, ids, jnp.full(len(KNOWN), 1 / len(KNOWN)))
    together = joint(k[5])
    alone = jax.vmap(lambda own: on_unknown(lambda *_: own))(experts)
    found = {
        "base": on_unknown(lambda *_: None),
        "best single adapter, by the test": jnp.max(alone, axis=0),
        "one LoRA of all ten domains": on_unknown(lambda *_: together),
        "mean of the adapters": on_unknown(lambda *_: mean),
        "Arrow, all": on_unknown(lambda *_: room.mix(stack, room.Arrow(None), model)),
        "Arrow, the first 2": on_unknown(lambda *_: room.mix(stack, room.Arrow(2), model)),
        "32 images: LoRA": on_unknown(few_lora),
        "32 images: a weight for each adapter": on_unknown(few_weights),
        "32 images: learned gates": on_unknown(few_gates),
    }
    flix = lambda drop: on_unknown(
        lambda features, *_: room.select(
            fit_features(model, x[known], y, rates["adapter"], drop, k[6]),
            jnp.arange(1, 9),
            features,
        )
    )
    both = jax.vmap(flix)(jnp.array([0.0, 0.3]))
    return found | {"FLix": both[0], "FLix, features dropped": both[1]}


def main():
    domains, labels = load()
    once, rows = jax.jit(run), []
    results = [
        jax.tree.map(np.asarray, once(domains, labels, jr.key(seed), RATES))
        for seed in range(5)
    ]
    for name in results[0]:
        each = np.stack([found[name] for found in results])  # (seeds, domains)
        row = {"method": name, "accuracy": float(each.mean())}
        row["between seeds"] = statistics.stdev(each.mean(axis=1))
        for (a, s), value in zip(HELD_OUT, each.mean(axis=0), strict=True):
            row[f"{ANGLES[a]}°, {STYLES[s]}"] = float(value)
        rows.append(row)
    mean_of = {row["method"]: row["accuracy"] for row in rows}
    gain = lambda a, b: mean_of[a] - mean_of[b]
    gates, mean = "32 images: learned gates", "mean of the adapters"
    alone, single = "32 images: LoRA", "32 images: a weight for each adapter"
    dropped = "FLix, features dropped"
    bounds = [
        bound("accuracy: gates over the mean", gain(gates, mean), at_least=0.1),
        bound("accuracy: gates over single weights", gain(gates, single), at_least=0.0),
        bound("accuracy: gates over LoRA, 32 images", gain(gates, alone), at_least=0.0),
        bound("accuracy: Arrow over the mean", gain("Arrow, all", mean), at_least=0.0),
        bound("accuracy: FLix over the base", gain("FLix", "base"), at_least=0.1),
        bound("accuracy: features dropped or not", gain(dropped, "FLix"), at_least=0.0),
    ]
    write_results("adapter_mixing", rows, bounds)


if __name__ == "__main__":
    main()

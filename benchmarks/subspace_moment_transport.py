"""How should Adam's second moment follow a subspace that moves?

A basis that turns on every step lets mean squares leave with each direction. Three rules
for what the entering directions get: nothing (``paper``, LDAdam, 2024, arXiv 2410.16103),
their own present square (``present``), or what has left (``rotate_variance``); ``rotate``
leaves the second moment where it is. First the root mean square of the update at constant
statistics of the gradient, a constant signal in noise, where nothing should change; then
the loss after training at the best of five rates, a multilayer perceptron on digits with
fresh noise and one on the characters of Python's manual, five seeds each. All rates and
seeds of one optimizer run in one program.
"""

from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _harness import bound, write_results
from sklearn.datasets import load_digits

import lrjax


sub = lrjax.subspaces
RATES = 2e-3 * 2.0 ** np.arange(5)
SEEDS, STEPS, BATCH, RANK, WIDTH = 5, 1000, 64, 32, 128
AT = (10, 100, 1000, 2000)


class Paper(sub.MomentTransport):
    """``v̂ ← |C² (v̂ − m̂²) + (C m̂)²|``: what leaves is lost."""

    b1: float = 0.9
    b2: float = 0.999

    def __call__(self, moments, change):
        count = moments.count
        seen1, seen2 = (jnp.where(count > 0, 1 - b**count, 1) for b in (self.b1, self.b2))
        first = change.rotate(moments.first)
        spread = moments.second / seen2 - (moments.first / seen1) ** 2
        second = jnp.abs(change.rotate(spread, squared=True) + (first / seen1) ** 2)
        second = second + self.entering(change)
        return moments._replace(first=first, second=second * seen2)

    def entering(self, change):
        del change
        return 0.0


class Present(Paper):
    """The same, and the missing share of each direction of the present square."""

    def entering(self, change):
        missing = 1 - jnp.sum(change.overlap**2, axis=-1)
        missing = jnp.expand_dims(missing, -1 if change.on_rows else -2)
        return jnp.maximum(missing, 0) * change.projected**2


TRANSPORTS = {
    "paper": Paper,
    "present": Present,
    "rotate": lambda b1=0.9, b2=0.999: sub.Rotate(),
    "rotate_variance": sub.RotateVariance,
}


def subspace_adam(carry, rank=RANK):
    return lrjax.project_updates(
        optax.scale_by_adam(),
        sub.Power(rank, blocks=8),
        schedule=sub.Always(when="after"),
        carry=carry(),
        lift=sub.ScaledResidual(),
    )


def ldadam(carry, rank=RANK):
    b1, b2 = 0.908, 0.99
    return lrjax.project_updates(
        optax.scale_by_adam(b1, b2),
        sub.Power(rank, blend=b1, first=sub.SVD(rank)),
        schedule=sub.Always(),
        carry=carry(b1, b2),
        feedback=sub.ErrorFeedback(b1),
    )


def subtrack(carry, rank=RANK):
    return lrjax.project_updates(
        optax.scale_by_adam(),
        sub.Geodesic(rank),
        schedule=sub.Periodic(200),
        carry=carry(),
        lift=sub.ScaledResidual(0.25),
    )


def sizes(tx, shape):
    """The root mean square of the update, step by step, for a constant signal in noise."""
    k_signal, k_noise = jr.split(jr.key(0))
    signal = 0.3 * jr.normal(k_signal, shape)

    def step(state, i):
        noise = jr.normal(jr.fold_in(k_noise, i), shape)
        updates, state = tx.update({"weight": signal + noise}, state)
        return state, jnp.sqrt(jnp.mean(updates["weight"] ** 2))

    start = tx.init({"weight": signal})
    return jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(AT[-1] + 1))[1])()


def constant_statistics():
    """One row for each optimizer, rule, shape and rank."""
    square, wide, tall = (WIDTH, WIDTH), (WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH)
    ours = ["rotate_variance"]
    cases = [(subspace_adam, list(TRANSPORTS), square, RANK)]
    cases += [(subspace_adam, ours, square, rank) for rank in (4, 64)]
    cases += [(subspace_adam, ours, shape, RANK) for shape in (wide, tall)]
    cases += [(make, ["paper", *ours], square, RANK) for make in (ldadam, subtrack)]
    cases += [(ldadam, ours, square, 4)]
    rows = [_size_row("adam", "", square, "", sizes(optax.scale_by_adam(), square))]
    for make, names, shape, rank in cases:
        for name in names:
            curve = sizes(make(TRANSPORTS[name], rank), shape)
            rows.append(_size_row(make.__name__, name, shape, rank, curve))
    return rows


def _size_row(optimizer, transport, shape, rank, curve):
    return {
        "measured": "size of the update",
        "optimizer": optimizer,
        "transport": transport,
        "shape": "x".join(map(str, shape)),
        "rank": rank,
        **{f"step {i}": float(curve[i]) for i in AT},
        "2000 over 100": float(curve[2000] / curve[100]),
    }


def init_mlp(key, sides):
    """Hidden layers and a head, which no optimizer here projects."""
    names = [*(f"layer{i}" for i in range(len(sides) - 2)), "head"]
    keys = jr.split(key, len(names))
    return {
        name: {"weight": jr.normal(k, (m, n)) * (2 / m) ** 0.5, "bias": jnp.zeros(n)}
        for name, k, m, n in zip(names, keys, sides[:-1], sides[1:], strict=True)
    }


def mlp(params, x):
    for name in sorted(name for name in params if name.startswith("layer")):
        x = jax.nn.relu(x @ params[name]["weight"] + params[name]["bias"])
    return x @ params["head"]["weight"] + params["head"]["bias"]


def cross_entropy(logits, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def digits():
    """8 × 8 images with noise that is new on every step."""
    images, labels = load_digits(return_X_y=True)
    data = (jnp.asarray(images / 16 - 0.5, jnp.float32), jnp.asarray(labels))

    def loss(params, data, key):
        images, labels = data
        k_batch, k_noise = jr.split(key)
        batch = jr.randint(k_batch, (BATCH,), 0, len(images))
        noise = 0.4 * jr.normal(k_noise, (BATCH, images.shape[1]))
        return cross_entropy(mlp(params, images[batch] + noise), labels[batch])

    return lambda key: init_mlp(key, (64, WIDTH, WIDTH, WIDTH, 10)), loss, data


def characters():
    """The next character of Python's manual from the eight before it."""
    text = "".join(topics.values())
    alphabet = {c: i for i, c in enumerate(sorted(set(text)))}
    codes = jnp.asarray([alphabet[c] for c in text])
    context, features = 8, 16

    def init(key):
        k_embedding, k_rest = jr.split(key)
        params = init_mlp(k_rest, (context * features, WIDTH, WIDTH, len(alphabet)))
        table = jr.normal(k_embedding, (len(alphabet), features))
        return {"embedding": {"table": table}, **params}

    def loss(params, codes, key):
        at = jr.randint(key, (BATCH, 1), 0, len(codes) - context)
        window = codes[at + jnp.arange(context + 1)]
        x = params["embedding"]["table"][window[:, :-1]].reshape(BATCH, -1)
        return cross_entropy(mlp(params, x), window[:, -1])

    return init, loss, codes


def train(task, tx, *, rates=RATES, seeds=SEEDS, steps=STEPS):
    """The mean loss of the last tenth, for each rate (rows) and seed (columns)."""
    init, loss, data = task()
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)

    def one(rate, key, data):
        k_init, k_steps = jr.split(key)
        params = init(k_init)
        schedule = lambda count: rate * shape(count)
        optimizer = optax.chain(tx, optax.scale_by_learning_rate(schedule))

        def step(carry, key):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, data, key)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        start = (params, optimizer.init(params))
        _, losses = jax.lax.scan(step, start, jr.split(k_steps, steps))
        return jnp.mean(losses[-steps // 10 :])

    over_seeds = jax.vmap(one, (None, 0, None))
    over_rates = jax.jit(jax.vmap(over_seeds, (0, None, None)))
    return over_rates(jnp.asarray(rates), jr.split(jr.key(1), seeds), data)


def training():
    """One row for each task and optimizer, and the losses by seed at its best rate."""
    optimizers = {"adam": optax.scale_by_adam()}
    for name, transport in TRANSPORTS.items():
        optimizers[name] = subspace_adam(transport)
    rows, best = [], {}
    for task in (digits, characters):
        for name, tx in optimizers.items():
            losses = np.nan_to_num(train(task, tx), nan=np.inf)
            means = losses.mean(axis=1)
            at = int(means.argmin())
            best[task.__name__, name] = losses[at]
            rows.append(
                {
                    "measured": f"loss on {task.__name__}",
                    "optimizer": "adam" if name == "adam" else "subspace_adam",
                    "transport": "" if name == "adam" else name,
                    "best rate": float(RATES[at]),
                    "loss": float(means[at]),
                    "standard error": _standard_error(losses[at]),
                    "by rate": "  ".join(f"{loss:.3f}" for loss in means),
                }
            )
    return rows, best


def _standard_error(values):
    return float(values.std(ddof=1) / len(values) ** 0.5)


def main():
    size_rows = constant_statistics()
    loss_rows, best = training()

    def growth(transport):
        return max(r["2000 over 100"] for r in size_rows if r["transport"] == transport)

    bounds = [
        bound("size at step 2000 over 100", growth("rotate_variance"), at_most=1.3),
        bound("the same by the paper's rule", growth("paper"), at_least=2.0),
    ]
    for task in ("digits", "characters"):
        excess = best[task, "rotate_variance"] - best[task, "rotate"]
        claim = f"{task}: loss above that of rotate"
        bounds.append(bound(claim, excess.mean(), at_most=0.02))
    rows = size_rows + loss_rows
    write_results("subspace_moment_transport", rows, bounds, "scikit-learn")


if __name__ == "__main__":
    main()

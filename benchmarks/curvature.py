"""What does a low-rank sketch of curvature save: steps of a solver, of training, samples?

Three answers. Conjugate gradients with the Nyström preconditioner at condition 1e5, on a
spectrum that falls as a power and on a kernel matrix of digits. Logistic regression on
random features of digits and a network on digits, trained with SketchySGD and M-FAC beside
Adam and SGD with momentum, each at the best of its learning rates: steps and processor time
to the loss that SGD has at the end. And the low-rank Kalman filter, which sees each digit
once, beside SGD and the full filter.
"""

import functools
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax
from _harness import bound, interleaved, medians, write_results
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import lrjax
from lrjax.continual import LowRankKalman


SEEDS, STEPS, EVERY, BATCH = 5, 600, 10, 64
CLASSES, HIDDEN, FEATURES, RIDGE = 10, 24, 200, 1e-4


def digits(seed=0):
    x, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = (
        (x[order] / 16).astype(np.float32),
        np.eye(CLASSES, dtype=np.float32)[labels[order]],
    )
    return (x[:1440], y[:1440]), (x[1440:], y[1440:])


# Conjugate gradients.

RANKS = (10, 30, 60)


def matrices():
    """Condition 1e5: a power law, and a Gaussian kernel on 500 digits with a ridge."""
    n = 500
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    power = (q * np.arange(1, n + 1.0) ** (-5 / np.log10(n))) @ q.T
    x = digits()[0][0][:n].astype(float)
    kernel = np.exp(-((x[:, None] - x[None]) ** 2).sum(-1) / 20)
    kernel += np.linalg.eigvalsh(kernel)[-1] / 1e5 * np.eye(n)
    return {"power law": power, "kernel of digits": kernel}


@functools.partial(jax.jit, static_argnums=1)
def steps_of_cg(a, rank, key):
    b = jr.normal(jr.fold_in(key, 0), (len(a),), a.dtype)
    operator = lx.MatrixLinearOperator(a, lx.positive_semidefinite_tag)
    options = {}
    if rank:
        p = lrjax.linalg.nystrom_preconditioner(operator.mv, b, rank, key=key)
        options = {"preconditioner": p.inverse()}
    solver = lx.CG(1e-6, 1e-6, max_steps=5000)
    found = lx.linear_solve(operator, b, solver, options=options, throw=False)
    return found.stats["num_steps"]


def solver_rows():
    rows = []
    jax.config.update("jax_enable_x64", True)
    for name, a in matrices().items():
        for rank in (0, *RANKS):
            steps = [int(steps_of_cg(a, rank, jr.key(s))) for s in range(SEEDS)]
            rows.append({"matrix": name, "rank": rank, "steps": float(np.median(steps))})
            print(rows[-1], flush=True)
    jax.config.update("jax_enable_x64", False)
    return rows


# Training.


def cross_entropy(logits, y):
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(logits), -1))


def linear(params, x):
    return x @ params["w"] + params["b"]


def network(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def tasks():
    """Name, model, start of a seed, training set."""
    x, y = map(jnp.asarray, digits()[0])
    lift = np.asarray(jr.normal(jr.key(0), (64, FEATURES))) / 8
    lifted = jax.nn.relu(x @ lift)

    def start_linear(key):
        del key
        return {"w": jnp.zeros((FEATURES, CLASSES)), "b": jnp.zeros(CLASSES)}

    return {
        "logistic regression": (linear, start_linear, (lifted, y)),
        "network": (network, start_network, (x, y)),
    }


def start_network(key, hidden=HIDDEN):
    one, two = jr.split(key)
    return {
        "w1": jr.normal(one, (64, hidden)) / 8,
        "b1": jnp.zeros(hidden),
        "w2": jr.normal(two, (hidden, CLASSES)) / hidden**0.5,
        "b2": jnp.zeros(CLASSES),
    }


def objective(model, params, x, y):
    penalty = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
    return cross_entropy(model(params, x), y) + 0.5 * RIDGE * penalty


def gauss_newton(model):
    """Products with the Gauss-Newton matrix of a batch, which ``value_fn`` carries."""

    def product(value_fn, params, v):
        x, y = value_fn.args
        outputs, moved = jax.jvp(lambda p: model(p, x), (params,), (v,))
        bent = jax.jvp(jax.grad(lambda z: cross_entropy(z, y)), (outputs,), (moved,))[1]
        back = jax.vjp(lambda p: model(p, x), params)[1](bent)[0]
        return jax.tree.map(lambda a, b: a + RIDGE * b, back, v)

    return product


class OnBatch:
    """The loss on a batch."""

    def __init__(self, model, *args):
        self.model, self.args = model, args

    def __call__(self, params):
        return objective(self.model, params, *self.args)


def optimizers(model):
    """Of a learning rate, and which rates are tried."""
    sketch = lrjax.scale_by_nystrom(20, refresh_every=23, product=gauss_newton(model))
    return {
        "sgd": (lambda rate: optax.sgd(rate, 0.9), 10.0 ** np.arange(-3, 1.1, 0.5)),
        "adam": (optax.adam, 10.0 ** np.arange(-4, 0.1, 0.5)),
        "sketchy_sgd": (
            lambda rate: optax.chain(sketch, optax.scale_by_learning_rate(rate)),
            10.0 ** np.arange(-1.5, 0.6, 0.25),
        ),
        **{
            f"mfac, damping {d}": (functools.partial(lrjax.mfac, damping=d), rates)
            for d, rates in (
                (1.0, 10.0 ** np.arange(-2, 2.1, 0.5)),
                (0.1, 10.0 ** np.arange(-1, 3.1, 0.5)),
            )
        },
    }


def curve(task, make, rate, seed):
    """The loss on the whole training set every few steps."""
    model, start, (x, y) = task
    key = jr.fold_in(jr.key(1), seed)
    tx = optax.with_extra_args_support(make(rate))
    params = start(key)

    def step(carry, i):
        params, state = carry
        rows = jr.randint(jr.fold_in(key, i), (2 * BATCH,), 0, len(x))
        one, two = (OnBatch(model, x[r], y[r]) for r in jnp.split(rows, 2))
        grads = jax.grad(one)(params)
        updates, state = tx.update(grads, state, params, value_fn=one, rate_fn=two)
        return (optax.apply_updates(params, updates), state), None

    def block(carry, k):
        carry, _ = jax.lax.scan(step, carry, k * EVERY + jnp.arange(EVERY))
        return carry, objective(model, carry[0], x, y)

    carry = (params, tx.init(params))
    return jax.lax.scan(block, carry, jnp.arange(STEPS // EVERY))[1]


def one_step(task, make):
    """One step after the sketch was taken, and the mean of a period of them."""
    model, start, (x, y) = task
    tx = optax.with_extra_args_support(make(0.01))
    params = start(jr.key(0))

    @jax.jit
    def steps(params, x, y):
        def step(carry, i):
            params, state = carry
            one = OnBatch(model, x[:BATCH], y[:BATCH])
            grads = jax.grad(one)(params)
            updates, state = tx.update(grads, state, params, value_fn=one)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=46)[0][0]

    return functools.partial(steps, params, x, y)


def training_rows():
    rows = []
    for name, task in tasks().items():
        made = optimizers(task[0])
        curves = {}
        for optimizer, (make, rates) in made.items():
            grid = lambda rate, seed, make=make, task=task: curve(task, make, rate, seed)
            run = jax.jit(jax.vmap(jax.vmap(grid, (None, 0)), (0, None)))
            losses = np.asarray(run(jnp.asarray(rates), jnp.arange(SEEDS)))
            losses = np.where(np.isfinite(losses), losses, np.inf)
            curves[optimizer] = losses
        seconds = medians(
            interleaved(
                {k: one_step(task, make) for k, (make, _) in made.items()},
                repeats=9,
                clock=time.process_time,
            )
        )
        final = np.median(curves["sgd"][:, :, -1], axis=1)
        target = float(np.min(final))
        for optimizer, losses in curves.items():
            reached = (
                np.maximum.accumulate(losses[:, :, ::-1], axis=2)[:, :, ::-1] <= target
            )
            first = np.where(reached.any(2), (1 + reached.argmax(2)) * EVERY, np.inf)
            steps = np.median(first, axis=1)
            last = np.median(losses[:, :, -1], axis=1)
            best = int(np.lexsort((last, steps))[0])
            rows.append(
                {
                    "task": name,
                    "optimizer": optimizer,
                    "rate": float(made[optimizer][1][best]),
                    "edge": best in (0, len(steps) - 1),
                    "target": target,
                    "steps": float(steps[best]) if np.isfinite(steps[best]) else None,
                    "final_loss": float(np.min(last)),
                    "microseconds_a_step": 1e6 * seconds[optimizer] / 46,
                }
            )
            print(rows[-1], flush=True)
    return rows


# One pass.

SMALL, STREAM = 12, 8
PRECISIONS = (1.0, 10.0, 100.0)


def scores(params, test):
    logits = network(params, test[0])
    right = jnp.argmax(logits, -1) == jnp.argmax(test[1], -1)
    return jnp.stack([jnp.mean(right), cross_entropy(logits, test[1])])


def pass_of_kalman(key, precision, batches, test, rank, form):
    start = LowRankKalman.start(
        start_network(key, SMALL), rank, precision=precision, form=form
    )
    step = lambda s, xy: (s.update(network, *xy, likelihood="categorical"), None)
    return scores(jax.lax.scan(step, start, batches)[0].mean, test)


def pass_of_full(key, precision, batches, test):
    """The extended Kalman filter with the whole covariance."""
    flat, unravel = ravel_pytree(start_network(key, SMALL))
    model = lambda w, x: network(unravel(w), x)

    def step(carry, xy):
        mean, covariance = carry
        x, y = xy
        logits = model(mean, x)
        p = jax.nn.softmax(logits)
        j = jax.jacrev(model)(mean, x)
        root = jnp.sqrt(p)[..., None] * (j - jnp.sum(p[..., None] * j, 1, keepdims=True))
        root = root.reshape(-1, len(mean))
        seen = root @ covariance
        inner = jnp.eye(len(root)) + seen @ root.T
        covariance = covariance - seen.T @ jnp.linalg.solve(inner, seen)
        covariance = (covariance + covariance.T) / 2
        return (mean + covariance @ jnp.einsum("bcp,bc->p", j, y - p), covariance), None

    carry = flat, jnp.eye(len(flat)) / precision
    return scores(unravel(jax.lax.scan(step, carry, batches)[0][0]), test)


def pass_of_sgd(key, rate, batches, test):
    params, tx = start_network(key, SMALL), optax.sgd(rate, 0.9)

    def step(carry, xy):
        params, state = carry
        grads = jax.grad(lambda p: cross_entropy(network(p, xy[0]), xy[1]))(params)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    return scores(jax.lax.scan(step, (params, tx.init(params)), batches)[0][0], test)


def stream_rows():
    split = [digits(s) for s in range(SEEDS)]
    cut = lambda a: a.reshape(len(a) // STREAM, STREAM, -1)
    batches = [np.stack([cut(train[i]) for train, _ in split]) for i in range(2)]
    test = [np.stack([held[i] for _, held in split]) for i in range(2)]
    keys = jr.split(jr.key(0), SEEDS)
    kinds = {
        "full filter": (pass_of_full, PRECISIONS),
        "sgd": (pass_of_sgd, 10.0 ** np.arange(-3, 0.1, 0.5)),
    }
    for rank, form in (
        (5, "diagonal"),
        (5, "spherical"),
        (20, "diagonal"),
        (20, "spherical"),
        (50, "diagonal"),
    ):
        one = functools.partial(pass_of_kalman, rank=rank, form=form)
        kinds[f"rank {rank}, {form}"] = (one, PRECISIONS)
    rows = []
    for name, (one, settings) in kinds.items():
        # One seed at a time: no member of a batch of filters needs its own memory.
        run = jax.jit(
            lambda s, one=one: jax.lax.map(
                lambda a: one(a[0], s, a[1:3], a[3:]), (keys, *batches, *test)
            )
        )
        found = np.stack([np.asarray(run(s)) for s in settings]).mean(1)
        best = int(np.nanargmin(found[:, 1]))
        rows.append(
            {
                "one_pass_with": name,
                "setting": float(settings[best]),
                "accuracy": float(found[best, 0]),
                "log_loss": float(found[best, 1]),
            }
        )
        print(rows[-1], flush=True)
    return rows


def bounds_of(solver, training, stream):
    at = lambda name, rank: next(
        r["steps"] for r in solver if (r["matrix"], r["rank"]) == (name, rank)
    )
    of = lambda task, optimizer: next(
        r for r in training if (r["task"], r["optimizer"]) == (task, optimizer)
    )
    online = {r["one_pass_with"]: r for r in stream}
    bounds = [
        bound(
            f"products of conjugate gradients, {name}, plain over those with rank {rank} "
            "and its sketch",
            at(name, 0) / (at(name, rank) + rank),
            at_least=least,
        )
        for name in ("power law", "kernel of digits")
        for rank, least in zip(RANKS, (1, 1.5, 2), strict=True)
    ]
    for task in ("logistic regression", "network"):
        first = of(task, "sgd")
        for optimizer in ("sketchy_sgd", "mfac, damping 1.0"):
            row = of(task, optimizer)
            steps = row["steps"] or np.inf
            seconds = lambda row, steps: steps * row["microseconds_a_step"]
            bounds += [
                bound(
                    f"{task}: steps of SGD over those of {optimizer}",
                    first["steps"] / steps,
                    at_least=1,
                ),
                bound(
                    f"{task}: time of SGD over that of {optimizer}",
                    seconds(first, first["steps"]) / seconds(row, steps),
                    at_least=1,
                ),
                bound(
                    f"{task}: last loss of {optimizer} over that of SGD",
                    row["final_loss"] / first["final_loss"],
                    at_most=1,
                ),
            ]
        bounds.append(
            bound(
                f"{task}: best rate of sketchy_sgd, or one over it",
                max((r := of(task, "sketchy_sgd")["rate"]), 1 / r),
                at_most=2,
            )
        )
    return [
        *bounds,
        bound(
            "log loss after one pass, rank 20 over SGD",
            online["rank 20, diagonal"]["log_loss"] / online["sgd"]["log_loss"],
            at_most=1.0,
        ),
        bound(
            "accuracy after one pass, full filter less rank 50",
            online["full filter"]["accuracy"] - online["rank 50, diagonal"]["accuracy"],
            at_most=0.02,
        ),
    ]


def main():
    rows = solver_rows(), training_rows(), stream_rows()
    write_results("curvature", [row for part in rows for row in part], bounds_of(*rows))


if __name__ == "__main__":
    main()

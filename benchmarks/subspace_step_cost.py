"""What does a step in a subspace cost, and is any step slower than the others?

The optimizers take turns on the leaves of a transformer and on one MLP matrix. Median and
worst step are given apart; steps on which a basis is refreshed by an SVD are timed as
such. Set OPENBLAS_NUM_THREADS=1: small factorizations on many threads time the threads.
"""

import statistics

import jax
import jax.random as jr
import optax
from _harness import bound, compiled_cost, median_ratio, timed, write_results

import lrjax


REPEATS = 30
EVERY = 10**6  # no refresh but the first: the steps in between


def optimizers(rank):
    """Name: (optimizer, optimizer whose every step refreshes, or None)."""
    galore = lambda every: optax.contrib.scale_by_galore(rank, every)
    ours = lambda recipe, every: recipe(1e-3, rank, refresh_every=every, stagger=False)
    fira = lambda every: lrjax.fira(1e-3, rank, refresh_every=every)
    return {
        "adam": (optax.scale_by_adam(), None),
        "optax galore": (galore(EVERY), galore(1)),
        "lrjax galore": (ours(lrjax.galore, EVERY), ours(lrjax.galore, 1)),
        "lrjax fira": (fira(EVERY), fira(1)),
        "lrjax apollo": (lrjax.apollo(1e-3, rank, refresh_every=EVERY), None),
        "lrjax subspace_adam": (lrjax.subspace_adam(1e-3, rank), None),
        "lrjax ldadam": (lrjax.ldadam(1e-3, rank), None),
    }


def leaves(name):
    """The shapes of the two models."""
    if name == "mlp 512x1376":
        return {"w": (512, 1376)}
    layer = {"q": (512, 512), "k": (512, 512), "v": (512, 512), "o": (512, 512)}
    layer |= {"gate": (512, 1376), "up": (512, 1376), "down": (1376, 512)}
    return {f"{i}.{k}": shape for i in range(4) for k, shape in layer.items()}


def one_step(tx, grads):
    """A function that takes the next step each time it is called."""
    state = jax.jit(tx.init)(grads)
    update = jax.jit(tx.update, donate_argnums=1)
    _, state = update(grads, state)
    box = [state]

    def step():
        updates, box[0] = update(grads, box[0])
        return updates

    return step


def gemm_rate(grads, rank):
    """Flops per second of the projections of these leaves, measured."""
    bases = {k: jr.normal(jr.key(1), (g.shape[0], rank)) for k, g in grads.items()}
    project = jax.jit(lambda b, g: {k: b[k].T @ g[k] for k in g})
    jax.block_until_ready(project(bases, grads))
    seconds = statistics.median(timed(lambda: project(bases, grads)) for _ in range(20))
    return sum(2 * rank * g.size for g in grads.values()) / seconds


def measure(model, rank, repeats):
    """Rows of one model and rank, and the ratios that bounds are set on."""
    shapes = leaves(model)
    grads = {
        k: jr.normal(jr.fold_in(jr.key(0), i), s) for i, (k, s) in enumerate(shapes.items())
    }
    rate = gemm_rate(grads, rank)
    steady, refreshing = {}, {}
    for name, (tx, always) in optimizers(rank).items():
        steady[name] = one_step(tx, grads)
        if always is not None:
            refreshing[name] = one_step(always, grads)
    seconds = {name: [] for name in steady}
    for step in steady.values():
        step()
    for _ in range(repeats):
        for name, step in steady.items():
            seconds[name].append(timed(step))
    worst = {name: [timed(step) for _ in range(3)] for name, step in refreshing.items()}
    # A block of subspace_adam's basis turns on each step: the slowest of the eight kinds.
    step = steady["lrjax subspace_adam"]
    kinds = [[] for _ in range(8)]
    for i in range(8 * 8):
        kinds[i % 8].append(timed(step))
    kinds = [statistics.median(k) for k in kinds]
    worst["lrjax subspace_adam"] = [max(kinds)]
    rows = []
    for name, (tx, _) in optimizers(rank).items():
        cost = compiled_cost(tx.update, grads, jax.eval_shape(tx.init, grads))
        median = statistics.median(seconds[name])
        slow = statistics.median(worst[name]) if name in worst else median
        rows.append(
            {
                "model": model,
                "rank": rank,
                "optimizer": name,
                "median_ms": 1e3 * median,
                "refresh_ms": 1e3 * slow,
                "floor_ms": 1e3 * 2 * 2 * rank * sum(g.size for g in grads.values()) / rate,
                "state_bytes": lrjax.metrics.memory_report(grads, tx).state_bytes,
                **cost,
            }
        )
    ours = median_ratio(seconds, "lrjax subspace_adam", "optax galore")
    own = max(kinds) / statistics.median(kinds)
    stall = statistics.median(worst["optax galore"]) / statistics.median(
        seconds["optax galore"]
    )
    return rows, ours, own, stall


def main():
    rows, bounds = [], []
    for model, rank, repeats in (
        ("mlp 512x1376", 64, REPEATS),
        ("mlp 512x1376", 128, REPEATS),
        ("transformer d=512", 64, 20),
    ):
        found, ours, own, stall = measure(model, rank, repeats)
        rows += found
        label = f"{model}, rank {rank}"
        bounds += [
            bound(
                f"{label}: subspace_adam over optax galore between refreshes",
                ours,
                at_most=1.5,
            ),
            bound(
                f"{label}: slowest step of subspace_adam over its median", own, at_most=1.5
            ),
            bound(
                f"{label}: refresh of optax galore over its median", stall, at_least=10.0
            ),
        ]
    write_results("subspace_step_cost", rows, bounds)


if __name__ == "__main__":
    main()

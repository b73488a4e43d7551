"""What does a step in a subspace cost, and is any step slower than the others?

The optimizers take turns on the leaves of a transformer, apart and stacked by layer, and on
one MLP matrix. Median and worst step are given apart; steps on which a basis is refreshed
by an SVD are timed as such. galore-torch and pytorch-optimizer follow in the same process
if they are installed; their steps include the update of the weights, which ours leave to
the next program. Set OPENBLAS_NUM_THREADS=1: small factorizations on many threads time the
threads.

What was tried for subspace_adam, in the order of what it saved on one 512x1376 leaf:
- one sum of squares of the gradient for the limiter, the guard against zero gradients and
  the scaling, by ‖a_j − P R_j‖² = ‖a_j‖² − ‖R_j‖²; two consumers of the squares make XLA
  write them out, as large as the gradient, and a fresh buffer costs more than the sum;
- products with the thin factor as first operand, behind a barrier where XLA would turn
  them round: the power step of a tall leaf 6 times faster, PᵀG a third;
- U = P(N − φR) + φa, one product and one pass, instead of P N and φ(a − P R);
- projection off the other columns and passes of Cholesky QR in turns: three of each
  instead of two and six;
- slower or no faster, and left: Householder QR of the block (it gathers sharded rows),
  sums of squares as a batched dot or in a loop over blocks of rows.
"""

import statistics

import jax
import jax.random as jr
import optax
from _harness import (
    bound,
    compiled_cost,
    interleaved,
    median_ratio,
    timed,
    write_results,
)

import lrjax


TORCH = ("galore-torch", "pytorch-optimizer", "torch")
REPEATS = 30
EVERY = 10**6  # no refresh but the first: the steps in between


def optimizers(rank):
    """Name: (optimizer, optimizer whose every step refreshes, or None)."""
    rate = optax.scale_by_learning_rate(1e-3)
    galore = lambda every: optax.chain(optax.contrib.scale_by_galore(rank, every), rate)
    ours = lambda recipe, every: recipe(1e-3, rank, refresh_every=every, stagger=False)
    fira = lambda every: lrjax.fira(1e-3, rank, refresh_every=every)
    return {
        "adam": (optax.adam(1e-3), None),
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
    stacked = name.endswith("stacked")
    layer = {"q": (512, 512), "k": (512, 512), "v": (512, 512), "o": (512, 512)}
    layer |= {"gate": (512, 1376), "up": (512, 1376), "down": (1376, 512)}
    if stacked:
        return {k: (4, *shape) for k, shape in layer.items()}
    return {f"{i}.{k}": shape for i in range(4) for k, shape in layer.items()}


def one_step(tx, grads):
    """A function that takes the next step each time it is called."""
    state = jax.jit(tx.init)(grads)
    update = jax.jit(tx.update, donate_argnums=1)
    # Whole before anything else is measured: its threads count as processor time.
    _, state = jax.block_until_ready(update(grads, state))
    box = [state]

    def step():
        updates, box[0] = update(grads, box[0])
        return updates

    return step


def torch_optimizers(grads, rank):
    """Name: (step, step that refreshes), of the installed torch peers; and the others."""
    try:
        import torch
        from galore_torch import GaLoreAdamW
        from pytorch_optimizer import APOLLO, Fira
    except ImportError as absent:
        return {}, str(absent)
    torch.manual_seed(0)

    def make(optimizer, every, projection="std", **extra):
        params = [torch.nn.Parameter(torch.zeros(g.shape)) for g in grads.values()]
        for p in params:
            p.grad = torch.randn(p.shape)
        group = {"params": params, "rank": rank, "update_proj_gap": every, "scale": 1.0}
        group |= {"proj_type": projection, "projection_type": projection}  # two spellings
        step = optimizer([group | extra], lr=1e-3).step
        # Without a closure a step returns None; torch on CPU has finished by then.
        return lambda: (step(), 0)[1]

    random = {"scale_type": "channel", "projection": "random"}
    kinds = {
        "galore-torch galore": (GaLoreAdamW, {}),
        "pytorch-optimizer fira": (Fira, {}),
        "pytorch-optimizer apollo": (APOLLO, random),
    }
    made = {}
    for name, (optimizer, extra) in kinds.items():
        made[name] = (make(optimizer, EVERY, **extra), make(optimizer, 1, **extra))
    return made, None


def gemm_rate(grads, rank):
    """Flops per second of the projections of these leaves, measured."""
    bases = {k: jr.normal(jr.key(1), (*g.shape[:-1], rank)) for k, g in grads.items()}
    project = jax.jit(lambda b, g: {k: b[k].mT @ g[k] for k in g})
    jax.block_until_ready(project(bases, grads))
    seconds = statistics.median(timed(lambda: project(bases, grads)) for _ in range(20))
    return sum(2 * rank * g.size for g in grads.values()) / seconds


def apart(grads):
    """Stacked layers as leaves of their own."""
    return {f"{k}.{i}": x for k, g in grads.items() for i, x in enumerate(g)}


def steps_of(grads, rank):
    """Name: (usual step, step that refreshes or None), and what is known by shape."""
    steps, known = {}, {}
    stacked = any(g.ndim == 3 for g in grads.values())
    for name, (tx, always) in optimizers(rank).items():
        # optax galore leaves stacked layers unprojected: it gets them apart.
        its = apart(grads) if stacked and name == "optax galore" else grads
        refreshing = None if always is None or stacked else one_step(always, its)
        steps[name] = (one_step(tx, its), refreshing)
        known[name] = {"state_bytes": lrjax.metrics.memory_report(its, tx).state_bytes}
        known[name] |= compiled_cost(tx.update, its, jax.eval_shape(tx.init, its))
    peers, absent = ({}, None) if stacked else torch_optimizers(grads, rank)
    if absent is not None:
        print(f"The torch peers are not measured: {absent}. Install {', '.join(TORCH)}.")
    return steps | peers, known


def slowest_block(step, blocks=8, rounds=8):
    """The slowest of the kinds of step that turn through the blocks, and their median."""
    kinds = [[] for _ in range(blocks)]
    for i in range(blocks * rounds):
        kinds[i % blocks].append(timed(step))
    kinds = [statistics.median(kind) for kind in kinds]
    return max(kinds), statistics.median(kinds)


def measure(model, rank, repeats):
    """Rows of one model and rank, and the ratios that bounds are set on."""
    grads = {
        k: jr.normal(jr.fold_in(jr.key(0), i), shape)
        for i, (k, shape) in enumerate(leaves(model).items())
    }
    floor = 2 * 2 * rank * sum(g.size for g in grads.values()) / gemm_rate(grads, rank)
    steps, known = steps_of(grads, rank)
    seconds = {}
    # The torch peers after the others: its threads spin on for a while after each step.
    for peers in (False, True):
        turn = {n: steady for n, (steady, _) in steps.items() if (n in known) is not peers}
        seconds |= interleaved(turn, repeats) if turn else {}
    worst = {}
    for name, (_, refreshing) in steps.items():
        if refreshing is not None:
            if name not in known:
                refreshing()  # ours are warm already
            # With many leaves one step is an average by itself, and takes seconds.
            times = 3 if len(grads) == 1 else 1
            worst[name] = statistics.median(timed(refreshing) for _ in range(times))
    worst["lrjax subspace_adam"], usual = slowest_block(steps["lrjax subspace_adam"][0])
    rows = [
        {
            "model": model,
            "rank": rank,
            "optimizer": name,
            "median_ms": 1e3 * statistics.median(seconds[name]),
            "refresh_ms": 1e3 * worst.get(name, statistics.median(seconds[name])),
            "matmul_floor_ms": 1e3 * floor,
            **known.get(name, {}),
        }
        for name in steps
    ]
    ratios = {
        "ours": median_ratio(seconds, "lrjax subspace_adam", "optax galore"),
        "own": worst["lrjax subspace_adam"] / usual,
    }
    if "optax galore" in worst:
        galore = statistics.median(seconds["optax galore"])
        ratios["stall"] = worst["optax galore"] / galore
    return rows, ratios


CLAIMS = {
    "ours": ("subspace_adam over optax galore between refreshes", {"at_most": 1.5}),
    "own": ("slowest step of subspace_adam over its median", {"at_most": 1.5}),
    "stall": ("refresh of optax galore over its median", {"at_least": 10.0}),
}


def main():
    rows, bounds = [], []
    for model, rank, repeats in (
        ("mlp 512x1376", 64, REPEATS),
        ("mlp 512x1376", 128, REPEATS),
        ("transformer d=512", 64, 20),
        ("transformer d=512 stacked", 64, 20),
    ):
        found, ratios = measure(model, rank, repeats)
        rows += found
        for name, value in ratios.items():
            claim, limit = CLAIMS[name]
            bounds.append(bound(f"{model}, rank {rank}: {claim}", value, **limit))
    write_results("subspace_step_cost", rows, bounds, *TORCH)


if __name__ == "__main__":
    main()

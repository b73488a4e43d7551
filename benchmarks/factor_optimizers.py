"""What does a step of each optimizer of LoRA pairs cost beside one of Adam?

Twelve layers of 1024 × 1024 with rank 16, the optimizer step alone, turn by turn with Adam
on the same factors: seconds of processors, and bytes of the state beside those of the
formula. A step of an alternating order moves one factor; two of them are one round.
"""

import time

import jax
import jax.random as jr
import optax
from _harness import (
    bound,
    compiled_cost,
    interleaved,
    median_ratio,
    medians,
    write_results,
)

import lrjax


LAYERS, SIZE, RANK = 12, 1024, 16
PAIR = 2 * SIZE * RANK  # the numbers of the two factors
# The numbers of the state of a pair, and the bound of the time over Adam's.
OPTIMIZERS = {
    "adam": (optax.adam, 2 * PAIR, None),
    "lora_plus": (lrjax.lora_plus, 2 * PAIR, None),
    "scaled_gd": (lrjax.scaled_gd, 0, None),
    "scaled_adamw": (lrjax.scaled_adamw, 2 * PAIR, 1.5),
    "lora_pro": (lrjax.lora_pro, PAIR, None),
    "alt_lora": (lrjax.alt_lora, 2 * PAIR, 1.5),
    "alt_lora_plus": (lrjax.alt_lora_plus, 3 * PAIR, None),
    "lora_rite": (lrjax.lora_rite, 2 * PAIR + 2 * RANK**2, 3),
    "lora_muon": (lrjax.lora_muon, PAIR, 2.5),
    "muon": (lrjax.muon, PAIR, None),
}
COUNTERS = 64  # bytes, at most


def factors(key):
    def layer(key):
        left, right = jr.normal(key, (2, SIZE, RANK))
        return lrjax.LowRank(left, right)

    return {f"layer{i}": layer(k) for i, k in enumerate(jr.split(key, LAYERS))}


def stepper(tx):
    """The step of an optimizer."""

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def running(step, state, params, grads):
    """A function that takes the next step each time it is called, in place."""
    jitted, box = jax.jit(step, donate_argnums=(1, 2)), [params, state]

    def run():
        box[:] = jitted(grads, box[1], box[0])
        return box[0]

    return run


def main():
    grads = factors(jr.key(1))
    rows, runs = [], {}
    for name, (make, numbers, _) in OPTIMIZERS.items():
        tx, params = make(1e-6), factors(jr.key(0))
        state, step = tx.init(params), stepper(tx)
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        cost = compiled_cost(step, grads, state, params)
        runs[name] = running(step, state, params, grads)
        formula = 4 * LAYERS * numbers
        rows.append({"optimizer": name, **cost, "state_bytes": size, "formula": formula})
    times = interleaved(runs, repeats=100, clock=time.process_time)
    bounds = []
    for row in rows:
        name = row["optimizer"]
        row["step_seconds"] = medians(times)[name]
        row["over_adam"] = median_ratio(times, name, "adam")
        if (limit := OPTIMIZERS[name][2]) is not None:
            claim = f"step of {name} over adam"
            bounds.append(bound(claim, row["over_adam"], at_most=limit))
    worst = max(row["state_bytes"] - row["formula"] for row in rows)
    bounds.append(bound("bytes of states above their formulas", worst, at_most=COUNTERS))
    write_results("factor_optimizers", rows, bounds)


if __name__ == "__main__":
    main()

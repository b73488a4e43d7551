"""What does scale_by_gram add to a step of Adam on LoRA factors?

Twelve layers of 1024 × 1024 with rank 16, the optimizer step alone, against Adam alone.
"""

import jax
import jax.random as jr
import optax
from _harness import bound, compiled_cost, interleaved, median_ratio, medians, write_results

import lrjax


LAYERS, SIZE, RANK = 12, 1024, 16


def factors(key):
    def layer(key):
        kl, kr = jr.split(key)
        return lrjax.LowRank(jr.normal(kl, (SIZE, RANK)), jr.normal(kr, (SIZE, RANK)))

    return {f"layer{i}": layer(k) for i, k in enumerate(jr.split(key, LAYERS))}


def main():
    params, grads = factors(jr.key(0)), factors(jr.key(1))
    learning_rate = optax.scale_by_learning_rate(1e-3)
    chains = {
        "adam": optax.chain(optax.scale_by_adam(), learning_rate),
        "gram + adam": optax.chain(
            lrjax.scale_by_gram(1e-3), optax.scale_by_adam(), learning_rate
        ),
    }
    rows, steps, compiles = [], {}, {}
    for name, tx in chains.items():
        state = tx.init(params)

        def step(grads, state, params, tx=tx):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        jitted = jax.jit(step)
        steps[name] = lambda jitted=jitted, state=state: jitted(grads, state, params)
        compiles[name] = lambda step=step, state=state: compiled_cost(
            step, grads, state, params
        )
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        rows.append({"chain": name, **compiles[name](), "state_bytes": size})
    compile_seconds = {name: [] for name in chains}
    for _ in range(30):
        for name, compile_once in compiles.items():
            compile_seconds[name].append(compile_once()["compile_seconds"])
    for row in rows:
        row["compile_seconds"] = medians(compile_seconds)[row["chain"]]
    seconds = interleaved(steps, repeats=200)
    for row in rows:
        row["step_seconds"] = medians(seconds)[row["chain"]]
    bounds = [
        bound(
            "step of gram + adam over adam",
            median_ratio(seconds, "gram + adam", "adam"),
            at_most=2.0,
        ),
        bound(
            "compilation of gram + adam over adam",
            median_ratio(compile_seconds, "gram + adam", "adam"),
            at_most=2.0,
        ),
    ]
    write_results("gram_cost", rows, bounds)


if __name__ == "__main__":
    main()

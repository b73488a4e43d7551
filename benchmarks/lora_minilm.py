"""What does a LoRA step on a pretrained encoder cost, beside full training and PEFT?"""

import os


# Set before either library is imported: one thread each. Processor seconds are measured, so
# that what else the machine does hardly counts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"

import resource
import statistics

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _harness import bound, median_ratio, write_results

import lrjax
from lrjax._tour import encoder as minilm


BATCH, LENGTH, RANK, RATE, REPEATS = 16, 64, 8, 1e-3, 7
QUERY_VALUE = ["query", "value"]
OURS = (
    ("LoRA q, v", lrjax.LoRA(RANK), QUERY_VALUE),
    ("LoRA all", lrjax.LoRA(RANK), None),
    ("DoRA all", lrjax.DoRA(RANK), None),
)
THEIRS = (
    ("LoRA q, v, PEFT", QUERY_VALUE),
    ("LoRA all, PEFT", r".*encoder\..*(query|key|value|dense)"),
)


def squared(y, target):
    return ((y - target) ** 2).mean()


def whole(params, frozen, model):
    return eqx.combine(params, frozen)


def bound_to(params, frozen, model):
    return lrjax.bind(eqx.combine(*model), eqx.combine(params, frozen))


def jax_step(assemble, params, *data):
    """One step of Adam, as a thunk; what XLA says of its cost; and the loss before it."""
    tx = optax.adam(RATE)

    def step(params, state, frozen, model, ids, mask, target):
        loss = lambda p: squared(assemble(p, frozen, model)(ids, mask), target)
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    args = (params, tx.init(params), *data)
    compiled = jax.jit(step).lower(*args).compile()
    run = lambda: jax.block_until_ready(compiled(*args))
    flops = compiled.cost_analysis()["flops"]
    peak = compiled.memory_analysis().temp_size_in_bytes
    return run, {"flops": flops, "temp_bytes": peak}, float(run()[2])


def peft_step(targets, ids, mask, target):
    """The same by PEFT on PyTorch: thunk, number of trained numbers, loss."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = transformers.BertModel.from_pretrained(minilm.model_directory())
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    model = peft.get_peft_model(model, config).eval()  # without BERT's dropout, as ours
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(trained, RATE, fused=True)
    ids, mask, target = (torch.from_numpy(np.array(x)) for x in (ids, mask, target))

    def step():
        adam.zero_grad()
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        loss = squared(hidden.mean(dim=1), target)
        loss.backward()
        adam.step()
        return loss.item()

    return step, sum(p.numel() for p in trained), step()


def main():
    cost, trained, losses, runs = {}, {}, {}, {}
    model = minilm.load_encoder(minilm.model_directory())
    ids_key, target_key, key = jr.split(jr.key(0), 3)
    ids = jr.randint(ids_key, (BATCH, LENGTH), 0, minilm.MINILM.vocabulary)
    data = (ids, jnp.ones_like(ids), jr.normal(target_key, (BATCH, minilm.MINILM.width)))

    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    runs["full"], cost["full"], losses["full"] = jax_step(
        whole, arrays, static, None, *data
    )
    trained["full"] = numbers(arrays)
    for name, kind, where in OURS:
        adapters = eqx.filter_jit(lrjax.adapt)(model, kind, where=where, key=key)
        params, frozen = lrjax.partition(adapters)
        built = jax_step(bound_to, params, frozen, (arrays, static), *data)
        runs[name], cost[name], losses[name] = built
        trained[name] = numbers(params)
    for name, targets in THEIRS:
        runs[name], trained[name], losses[name] = peft_step(targets, *data)
    assert np.allclose(list(losses.values()), losses["full"], rtol=1e-5), losses

    seconds, in_system = processor_seconds(runs)
    rows = [
        {
            "step": name,
            "trained": trained[name],
            "processor ms": 1e3 * statistics.median(seconds[name]),
            "in the system, ms": 1e3 * statistics.median(in_system[name]),
            **cost.get(name, {"flops": None, "temp_bytes": None}),
        }
        for name in runs
    ]
    flops = lambda name: cost[name]["flops"]
    faster = lambda name, than: median_ratio(seconds, than, name)
    write_results(
        "lora_minilm",
        rows,
        [
            bound(
                "times faster than PEFT on PyTorch, LoRA of query and value",
                faster("LoRA q, v", "LoRA q, v, PEFT"),
                at_least=1,
            ),
            bound(
                "times faster than PEFT on PyTorch, LoRA of all linears",
                faster("LoRA all", "LoRA all, PEFT"),
                at_least=1,
            ),
            bound(
                "times faster than full fine-tuning, LoRA of query and value",
                faster("LoRA q, v", "full"),
                at_least=1.5,
            ),
            bound(
                "flops over those of full fine-tuning, LoRA of query and value",
                flops("LoRA q, v") / flops("full"),
                at_most=0.55,
            ),
            bound(
                "flops of DoRA over those of LoRA, all linears",
                flops("DoRA all") / flops("LoRA all"),
                at_most=1.05,
            ),
            bound(
                "seconds of DoRA over those of LoRA, all linears",
                median_ratio(seconds, "DoRA all", "LoRA all"),
                at_most=1.2,
            ),
        ],
        "torch",
        "peft",
        "transformers",
    )


def numbers(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def processor_seconds(runs):
    """Of each in turn, so that a busy minute slows all alike; and those in the system.

    The system's are for memory: pages that it fills with zeros and hands out.
    """
    total, in_system = ({name: [] for name in runs} for _ in range(2))
    for _ in range(REPEATS):
        for name, run in runs.items():
            before = resource.getrusage(resource.RUSAGE_SELF)
            run()
            after = resource.getrusage(resource.RUSAGE_SELF)
            system = after.ru_stime - before.ru_stime
            total[name].append(after.ru_utime - before.ru_utime + system)
            in_system[name].append(system)
    return total, in_system


if __name__ == "__main__":
    main()

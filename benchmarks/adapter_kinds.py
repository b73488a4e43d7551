"""What do the kinds of adapters cost beside LoRA, in training, decoding and memory?"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from _harness import bound, compiled_cost, interleaved, median_ratio, medians, write_results

import lrjax


WIDTH, TOKENS, RANK = 1024, 512, 8
KINDS = {
    "LoRA": lrjax.LoRA(RANK),
    "LoRA-FA": lrjax.LoRA(RANK, train="left"),
    "PiSSA": lrjax.LoRA(RANK, init="pissa"),
    "DoRA": lrjax.DoRA(RANK),
    "BoRA": lrjax.adapters.BoRA(RANK),
    "LoRA-XS": lrjax.LoRAXS(RANK),
    "TinyLoRA": lrjax.adapters.TinyLoRA(RANK),
    "SVFit": lrjax.adapters.SVFit(RANK),
    "LoLDU": lrjax.adapters.LoLDU(RANK),
    "PMSS": lrjax.adapters.PMSS(RANK),
    "NoRA": lrjax.adapters.NoRA(RANK),
    "LoTR": lrjax.adapters.LoTR(RANK),
    "StelLA": lrjax.adapters.StelLA(RANK),
    "NOLA": lrjax.adapters.NOLA(RANK, bases=64),
    "VeRA": lrjax.VeRA(RANK),
    "Tied-LoRA": lrjax.TiedLoRA(RANK),
    "Full": lrjax.adapters.Full(),
}


def gradient_case(layer, kind, x):
    """The gradient of what a kind trains: thunk, cost and the number of its numbers."""
    params, frozen = lrjax.partition(lrjax.adapt(layer, kind, key=jr.key(0)))

    def loss(params, frozen, layer, x):
        adapted = lrjax.bind(layer, eqx.combine(params, frozen))
        return jnp.mean((jax.vmap(adapted)(x) - 1.0) ** 2)

    args = (params, frozen, layer, x)
    step = jax.jit(jax.value_and_grad(loss))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    return (lambda: step(*args)), compiled_cost(jax.value_and_grad(loss), *args), numbers


def decode_case(layer, kind, x):
    """One token through a layer that was bound before."""
    bound_layer = lrjax.bind(layer, lrjax.adapt(layer, kind, key=jr.key(0)))
    arrays, static = eqx.partition(bound_layer, eqx.is_array)
    call = lambda arrays, x: eqx.combine(arrays, static)(x)
    step = jax.jit(call)
    return (lambda: step(arrays, x)), compiled_cost(call, arrays, x)["flops"]


def measure(layer, kinds, x):
    """A row for each kind; seconds of a gradient, and of a decoded token."""
    trained = {name: gradient_case(layer, kind, x) for name, kind in kinds.items()}
    decoded = {name: decode_case(layer, kind, x[0]) for name, kind in kinds.items()}
    seconds = interleaved({name: case[0] for name, case in trained.items()}, repeats=30)
    calls = interleaved({name: case[0] for name, case in decoded.items()}, repeats=300)
    typical, typical_call = medians(seconds), medians(calls)
    rows = [
        {
            "kind": name,
            "trained": numbers,
            "gradient, ms": 1e3 * typical[name],
            "flops": cost["flops"],
            "temp_bytes": cost["temp_bytes"],
            "a token, µs": 1e6 * typical_call[name],
            "flops of a token": decoded[name][1],
        }
        for name, (_, cost, numbers) in trained.items()
    ]
    return rows, seconds, calls


def temporaries_under_scan(kind, blocks, x):
    """Bytes that the gradient through scanned layers needs beside its arguments."""
    params, frozen = lrjax.partition(lrjax.adapt(blocks, kind, key=jr.key(0)))

    def loss(params, frozen, blocks, x):
        bound_blocks = lrjax.bind(blocks, eqx.combine(params, frozen))
        arrays, static = eqx.partition(bound_blocks, eqx.is_array)

        def step(x, layer):
            return jnp.tanh(jax.vmap(eqx.combine(layer, static))(x)), None

        return jnp.sum(jax.lax.scan(step, x, arrays)[0] ** 2)

    return compiled_cost(jax.grad(loss), params, frozen, blocks, x)["temp_bytes"]


def peak_of_adapt():
    """Memory that ``adapt`` takes at its peak, over the bytes of the adapters."""
    kernels = lambda count: {
        str(i): {"kernel": jnp.full((WIDTH, WIDTH), float(i))} for i in range(count)
    }
    few, many = jax.block_until_ready((kernels(2), kernels(64)))
    kind = lrjax.LoRA(64)
    jax.block_until_ready(lrjax.adapt(few, kind, key=jr.key(0)))  # compiles

    def status(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(x.split()[1]) for x in lines if x.startswith(field))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    adapters = jax.block_until_ready(lrjax.adapt(many, kind, key=jr.key(0)))
    size = sum(x.nbytes for x in jax.tree.leaves(adapters))
    return (status("VmHWM") - before) / size


def main():
    peak = peak_of_adapt()  # first, while no memory lies free that could be used again
    layer_key, data_key, stack_key = jr.split(jr.key(1), 3)
    layer = eqx.nn.Linear(WIDTH, WIDTH, key=layer_key)
    x = jr.normal(data_key, (TOKENS, WIDTH))
    rows, seconds, calls = measure(layer, KINDS, x)

    # The setting of a pool: 32 layers of 256 inputs and outputs, rank 128.
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(256, 256, key=key))
    blocks, tokens = make(jr.split(stack_key, 32)), jnp.ones((8, 256))
    narrow, wide = (
        temporaries_under_scan(kind, blocks, tokens)
        for kind in (lrjax.VeRA(1), lrjax.VeRA(128))
    )
    pool = 4 * 2 * 256 * 128

    flops = {row["kind"]: row["flops"] for row in rows}
    token = {row["kind"]: row["flops of a token"] for row in rows}
    write_results(
        "adapter_kinds",
        rows,
        [
            bound(
                "flops of DoRA over those of LoRA",
                flops["DoRA"] / flops["LoRA"],
                at_most=1.05,
            ),
            bound(
                "seconds of DoRA over those of LoRA",
                median_ratio(seconds, "DoRA", "LoRA"),
                at_most=1.2,
            ),
            bound(
                "flops of a decoded token, DoRA over LoRA",
                token["DoRA"] / token["LoRA"],
                at_most=1.1,
            ),
            bound(
                "seconds of a decoded token, DoRA over LoRA",
                median_ratio(calls, "DoRA", "LoRA"),
                at_most=1.1,
            ),
            bound(
                "memory of adapt at its peak over the bytes of the adapters",
                peak,
                at_most=1.5,
            ),
            bound(
                "pools that 32 scanned layers hold in temporaries",
                (wide - narrow) / pool,
                at_most=3,
            ),
        ],
    )


if __name__ == "__main__":
    main()

"""Does a batch with an adapter for each example run faster as scaled products (fLoRA)?"""

import time

import equinox as eqx
import jax
import jax.random as jr
from _harness import (
    bound,
    compiled_cost,
    interleaved,
    median_ratio,
    medians,
    write_results,
)

import lrjax


WIDTH, BATCH = 1024, 64
KINDS = {
    "fLoRA, rank 1": lrjax.adapters.FLoRA(1),
    "fLoRA, rank 2": lrjax.adapters.FLoRA(2),
    "fLoRA, rank 8": lrjax.adapters.FLoRA(8),
    "LoRA, rank 1": lrjax.LoRA(1),
    "LoRA, rank 8": lrjax.LoRA(8),
    "LoRA, rank 32": lrjax.LoRA(32),
}


def main():
    layer = eqx.nn.Linear(WIDTH, WIDTH, key=jr.key(0))
    calls, rows = {}, []
    for tokens in (1, 16):
        x = jr.normal(jr.key(1), (BATCH, tokens, WIDTH))
        plain = lambda layer, _, x: jax.vmap(jax.vmap(layer))(x)
        cases = {f"the layer alone, {tokens}": (plain, None)}
        for name, kind in KINDS.items():
            many = jax.vmap(lambda k, kind=kind: lrjax.adapt(layer, kind, key=k))(
                jr.split(jr.key(2), BATCH)
            )
            one = lambda layer, own, x: jax.vmap(lrjax.bind(layer, own))(x)
            each = lambda layer, own, x, one=one: jax.vmap(one, (None, 0, 0))(layer, own, x)
            cases[f"{name}, {tokens}"] = (each, many)
        for name, (call, own) in cases.items():
            arguments = (layer, own, x)
            arrays, static = eqx.partition(arguments, eqx.is_array)
            f = lambda arrays, call=call, static=static: call(*eqx.combine(arrays, static))
            compiled = jax.jit(f)
            calls[name] = lambda compiled=compiled, arrays=arrays: compiled(arrays)
            cost = compiled_cost(f, arrays)
            kind, length = name.rsplit(", ", 1)
            rows.append({"kind": kind, "tokens": int(length), "flops": cost["flops"]})
    seconds = interleaved(calls, repeats=30, clock=time.process_time)
    for row, (_, median) in zip(rows, medians(seconds).items(), strict=True):
        row["processor ms"] = 1000 * median
    flops = {f"{row['kind']}, {row['tokens']}": row["flops"] for row in rows}
    bounds = []
    for tokens in (1, 16):
        name, alone = f"fLoRA, rank 1, {tokens}", f"the layer alone, {tokens}"
        said = f"fLoRA of rank one, {BATCH} adapters, {tokens} tokens each"
        bounds.append(
            bound(f"{said}: flops over the layer", flops[name] / flops[alone], at_most=1.02)
        )
        for rank, most in ((1, 1.1), (8, 1.0)):
            ratio = median_ratio(seconds, name, f"LoRA, rank {rank}, {tokens}")
            claim = f"{said}: processor seconds over LoRA of rank {rank}"
            bounds.append(bound(claim, ratio, at_most=most))
    write_results("adapter_scaled_products", rows, bounds)


if __name__ == "__main__":
    main()

"""What do structured adapters cost beside LoRA: blocks, products, rotations, tensors?"""

import functools
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from _harness import bound, compiled_cost, interleaved, median_ratio, write_results
from adapter_kinds import RANK, TOKENS, WIDTH, measure

import lrjax


KINDS = {
    "LoRA": lrjax.LoRA(RANK),
    "MiSS": lrjax.adapters.MiSS(RANK),
    "GraLoRA": lrjax.adapters.GraLoRA(RANK, blocks=2),
    "BAT": lrjax.adapters.BAT(RANK),
    "HiRA": lrjax.adapters.HiRA(RANK),
    "LoHa": lrjax.adapters.LoHa(RANK),
    "LoKr": lrjax.adapters.LoKr(RANK),
    "OFT": lrjax.adapters.OFT(32, terms=5),
    "SODA": lrjax.adapters.SODA(),
    "RandLoRA": lrjax.adapters.RandLoRA(32),
    "DoTA": lrjax.adapters.DoTA(RANK, cores=2),
    "IA3": lrjax.adapters.IA3(),
    "Full": lrjax.adapters.Full(),
}
STEPS = ("LoRA", "MiSS", "LoKr", "HiRA")
BATCH, LENGTH, BLOCK_WIDTH = 16, 64, 384  # a sentence encoder of MiniLM's width


class Block(eqx.Module):
    """A block of a transformer."""

    attention: eqx.nn.MultiheadAttention
    norms: list[eqx.nn.LayerNorm]
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        ka, ku, kd = jr.split(key, 3)
        self.attention = eqx.nn.MultiheadAttention(12, BLOCK_WIDTH, key=ka)
        self.norms = [eqx.nn.LayerNorm(BLOCK_WIDTH) for _ in range(2)]
        self.up = eqx.nn.Linear(BLOCK_WIDTH, 4 * BLOCK_WIDTH, key=ku)
        self.down = eqx.nn.Linear(4 * BLOCK_WIDTH, BLOCK_WIDTH, key=kd)

    def __call__(self, x):
        x = jax.vmap(self.norms[0])(x + self.attention(x, x, x))
        wide = lambda v: self.down(jax.nn.gelu(self.up(v)))
        return jax.vmap(self.norms[1])(x + jax.vmap(wide)(x))


def step_case(blocks, kind, x):
    """A step of Adam through blocks, their six matrices adapted: thunk and flops."""
    params, frozen = lrjax.partition(lrjax.adapt(blocks, kind, key=jr.key(0)))
    tx = optax.adam(1e-3)

    def step(params, state, frozen, blocks, x):
        def loss(params):
            bound_blocks = lrjax.bind(blocks, eqx.combine(params, frozen))
            through = lambda x: functools.reduce(lambda y, block: block(y), bound_blocks, x)
            return jnp.mean((jax.vmap(through)(x) - 1.0) ** 2)

        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    arrays, static = eqx.partition(
        (params, tx.init(params), frozen, blocks, x), eqx.is_array
    )
    call = lambda arrays: eqx.filter(step(*eqx.combine(arrays, static)), eqx.is_array)
    compiled = jax.jit(call)
    return (lambda: compiled(arrays)), compiled_cost(call, arrays)["flops"]


def main():
    layer_key, data_key = jr.split(jr.key(1))
    layer = eqx.nn.Linear(WIDTH, WIDTH, key=layer_key)
    x = jr.normal(data_key, (TOKENS, WIDTH))
    rows, _, _ = measure(layer, KINDS, x)

    blocks = [Block(key) for key in jr.split(jr.key(2), 3)]
    sentences = jr.normal(jr.key(3), (BATCH, LENGTH, BLOCK_WIDTH))
    steps = {name: step_case(blocks, KINDS[name], sentences) for name in STEPS}
    runs = {name: case[0] for name, case in steps.items()}
    seconds = interleaved(runs, repeats=30, clock=time.process_time)
    flops = {name: case[1] for name, case in steps.items()}

    bounds = []
    for name, most in (("MiSS", 1.0), ("LoKr", 1.4), ("HiRA", 1.4)):
        of = f"of a step of {name} over those of LoRA"
        ratio = flops[name] / flops["LoRA"]
        bounds.append(bound(f"flops {of}", ratio, at_most=most))
        ratio = median_ratio(seconds, name, "LoRA")
        bounds.append(bound(f"processor seconds {of}", ratio, at_most=most))
    write_results("adapter_structures", rows, bounds)


if __name__ == "__main__":
    main()

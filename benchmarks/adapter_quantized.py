"""What do quantized bases save and cost under LoRA, and what is lost of the weights?"""

import functools
import tempfile
from pathlib import Path

import equinox as eqx
import gguf
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _harness import bound, interleaved, median_ratio, medians, write_results
from scipy.stats import norm

import lrjax
from lrjax.adapters import NF4, Int8, dequantize, loftq, quantize, read_gguf


WIDTH, DEPTH, TOKENS, RANK = 1024, 8, 512, 8


def stack(key):
    make = lambda key: eqx.nn.Linear(WIDTH, WIDTH, use_bias=False, key=key)
    layers = eqx.filter_vmap(make)(jr.split(key, DEPTH))
    shape = (DEPTH, WIDTH, WIDTH)
    weight = jr.normal(key, shape) / WIDTH**0.5
    return eqx.tree_at(lambda layer: layer.weight, layers, weight)


def through_a_file(layers, kind):
    """The layers with their weight written to a GGUF file and read again."""
    kind = gguf.GGMLQuantizationType[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stack.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        data = gguf.quantize(np.asarray(layers.weight), kind)
        writer.add_tensor("stack", data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        weight = read_gguf(path)["stack"]
    return eqx.tree_at(lambda layer: layer.weight, layers, weight)


def compiled_gradient(layers, kind, x):
    """The gradient of adapters on scanned layers: program and arguments."""
    params, frozen = lrjax.partition(lrjax.adapt(layers, kind, key=jr.key(0)))

    def loss(params, frozen, layers, x):
        adapted = lrjax.bind(layers, eqx.combine(params, frozen))
        arrays, static = eqx.partition(adapted, eqx.is_array)
        layer = lambda arrays: jax.vmap(eqx.combine(arrays, static))
        y, _ = jax.lax.scan(lambda x, a: (jnp.tanh(layer(a)(x)), None), x, arrays)
        return jnp.mean(y**2)

    args = (params, frozen, layers, x)
    return jax.jit(jax.grad(loss)).lower(*args).compile(), args


def expected_error(levels, block):
    """Relative error of normal numbers, rounded after their block was scaled.

    Of a block all numbers but the largest are normal, cut off at its magnitude M. The
    integral over them and over M, which is below m with probability ``(2Φ(m) − 1)^block``.
    """
    largest = np.linspace(0.5, 6, 60)
    weight = block * (2 * norm.cdf(largest) - 1) ** (block - 1) * 2 * norm.pdf(largest)
    squares = []
    for m in largest:
        x = np.linspace(-m, m, 2001)
        nearest = levels[np.abs(x[:, None] / m - levels[None]).argmin(axis=1)]
        p = norm.pdf(x)
        squares.append(np.trapezoid((x - m * nearest) ** 2 * p, x) / np.trapezoid(p, x))
    mean = np.trapezoid(weight * squares, largest) / np.trapezoid(weight, largest)
    return float(np.sqrt(mean * (block - 1) / block))


def expected_even(count, block):
    """The same for many even levels: a uniform error of one step."""
    largest = np.linspace(0.01, 8, 4000)
    weight = block * (2 * norm.cdf(largest) - 1) ** (block - 1) * 2 * norm.pdf(largest)
    mean = np.trapezoid(weight * largest**2, largest)
    return float(np.sqrt(mean / 12 * (block - 1) / block) / count)


def lost(layers, base):
    want = layers.weight
    got = dequantize(base).weight.astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def loftq_rows(key):
    """What is left of the error of quantization with LoftQ and QPiSSA."""
    noise, left, right = jr.split(key, 3)
    gaussian = jr.normal(noise, (256, 256))
    thin = jr.normal(left, (256, 16)) @ jr.normal(right, (16, 256)) / 4
    rows = []
    for name, weight in {"normal": gaussian, "and of rank 16": gaussian + 3 * thin}.items():
        layer = eqx.nn.Linear(256, 256, use_bias=False, key=key)
        layer = eqx.tree_at(lambda x: x.weight, layer, weight)
        plain = lost(layer, quantize(layer, NF4()))
        for first, steps in (("weight", 1), ("weight", 5), ("factors", 5)):
            run = functools.partial(loftq, format=NF4(), first=first, steps=steps)
            small, adapters = eqx.filter_jit(run)(layer, lrjax.LoRA(16), key=key)
            left_over = lost(layer, lrjax.merge(dequantize(small), adapters))
            rows.append(
                {
                    "weights": name,
                    "start": {"weight": "LoftQ", "factors": "QPiSSA"}[first],
                    "steps": steps,
                    "error over that of NF4 alone": left_over / plain,
                }
            )
    return rows


def main():
    layers, x = stack(jr.key(1)), jr.normal(jr.key(2), (TOKENS, WIDTH))
    half = eqx.tree_at(
        lambda layer: layer.weight, layers, replace_fn=lambda w: w.astype("bfloat16")
    )
    bases = {
        "float32": layers,
        "bfloat16": half,
        "int8": quantize(layers, Int8()),
        "NF4": quantize(layers, NF4()),
        "NF4, scales in float32": quantize(layers, NF4(double=False)),
        "Q4_1": through_a_file(layers, "Q4_1"),
    }
    programs = {
        ("LoRA", name): compiled_gradient(base, lrjax.LoRA(RANK), x)
        for name, base in bases.items()
    }
    for name in ("float32", "NF4"):
        programs["DoRA", name] = compiled_gradient(bases[name], lrjax.DoRA(RANK), x)
    thunk = lambda program, args: lambda: program(*args)
    seconds = interleaved({case: thunk(*pair) for case, pair in programs.items()}, 5)
    typical, rows = medians(seconds), []
    for (kind, name), (program, _) in programs.items():
        base, memory = bases[name], program.memory_analysis()
        size = sum(x.nbytes for x in jax.tree.leaves(base))
        rows.append(
            {
                "base": name,
                "kind": kind,
                "bits of a number": 8 * size / layers.weight.size,
                "bytes of the base": size,
                "temporaries of the gradient": memory.temp_size_in_bytes,
                "peak": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
                "gradient, ms": 1e3 * typical[kind, name],
                "seconds over float32": median_ratio(
                    seconds, (kind, name), (kind, "float32")
                ),
                "relative error of the weights": lost(layers, base),
            }
        )
    of = {(row["kind"], row["base"]): row for row in rows}
    levels = np.asarray(bases["NF4"].weight.levels)
    theory = {"NF4": expected_error(levels, 64), "int8": expected_even(127, 64)}
    rows += [{"base": name, "expected error": value} for name, value in theory.items()]
    started = loftq_rows(jr.key(3))
    rows += started
    ratio = lambda field, name, kind="LoRA": (
        of[kind, name][field] / of[kind, "float32"][field]
    )
    error = lambda name: of["LoRA", name]["relative error of the weights"]
    write_results(
        "adapter_quantized",
        rows,
        [
            bound(
                "bits of a number in NF4",
                of["LoRA", "NF4"]["bits of a number"],
                at_most=4.13,
            ),
            bound(
                "temporaries of a LoRA gradient on NF4 over those on float32",
                ratio("temporaries of the gradient", "NF4"),
                at_most=1.25,
            ),
            bound(
                "temporaries of a DoRA gradient on NF4 over those on float32",
                ratio("temporaries of the gradient", "NF4", "DoRA"),
                at_most=1.25,
            ),
            bound(
                "bytes of the base, NF4 over float32",
                ratio("bytes of the base", "NF4"),
                at_most=0.13,
            ),
            bound(
                "seconds of a LoRA gradient, NF4 over float32",
                ratio("gradient, ms", "NF4"),
                at_most=1.3,
            ),
            bound(
                "seconds of a LoRA gradient, int8 over float32",
                ratio("gradient, ms", "int8"),
                at_most=1.3,
            ),
            bound(
                "seconds of a LoRA gradient, Q4_1 over float32",
                ratio("gradient, ms", "Q4_1"),
                at_most=1.3,
            ),
            bound(
                "error of NF4 on normal weights, off what is expected",
                abs(error("NF4, scales in float32") / theory["NF4"] - 1),
                at_most=0.01,
            ),
            bound(
                "error of int8 on normal weights, off what is expected",
                abs(error("int8") / theory["int8"] - 1),
                at_most=0.01,
            ),
            bound(
                "error that quantized scales add to NF4",
                error("NF4") / error("NF4, scales in float32") - 1,
                at_most=0.01,
            ),
            bound(
                "error of LoftQ over that of NF4 alone, at worst",
                max(row["error over that of NF4 alone"] for row in started),
                at_most=1,
            ),
        ],
        "gguf",
    )


if __name__ == "__main__":
    main()

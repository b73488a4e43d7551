"""What does it take to run and to compile an optimizer on a tree of many matrices?

A model of 7 billion parameters, its 32 layers as 224 leaves: the kernels and conditionals
of an update on an H100, compiled without the hardware, by ``stack_leaves`` and, two of the
layers, leaf by leaf. ``kernels`` counts a loop as one, ``with_turns`` its body as often as
it turns. Then 48 small matrices on CPU: processor seconds to trace and compile, and the
time of a step beside that of the leaves apart.
"""

import time

import jax


jax.config.update("jax_platforms", "cpu")

import jax.numpy as jnp  # noqa: E402
import jax.random as jr  # noqa: E402
import optax  # noqa: E402
from _harness import bound, interleaved, median_ratio, write_results  # noqa: E402
from _hlo import FREE, compiled, read  # noqa: E402
from _hlo_text import parse  # noqa: E402
from _targets import devices, missing  # noqa: E402

import lrjax  # noqa: E402


LAYERS, WIDTH, HIDDEN, RANK = 32, 4096, 11008, 1024
SMALL, SMALL_SIZE = 48, 256


def tree(layers):
    """The matrices of a Llama, each a leaf."""
    shapes = dict.fromkeys("qkvo", (WIDTH, WIDTH)) | {"down": (WIDTH, HIDDEN)}
    shapes |= dict.fromkeys(("gate", "up"), (HIDDEN, WIDTH))
    return {f"{i}.{name}": shape for i in range(layers) for name, shape in shapes.items()}


def lowered(tx, shapes, device=None):
    """The update of a tree, as written, for a device or for this machine."""
    place = None if device is None else jax.sharding.SingleDeviceSharding(device)
    array = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    grads = {k: array(jax.ShapeDtypeStruct(s, jnp.float32)) for k, s in shapes.items()}
    state = jax.tree.map(array, jax.eval_shape(tx.init, grads))
    return jax.jit(lambda g, s: tx.update(g, s)).lower(grads, state)


def kernels_row(name, tx, layers, device):
    """Kernels and conditionals of one update."""
    program, seconds = compiled(lowered(tx, tree(layers), device))
    text = program.as_text()
    run, (computations, entry) = read(text), parse(text)
    straight = sum(line.op not in FREE for line in computations[entry].values())
    return {
        "optimizer": name,
        "leaves": 7 * layers,
        "kernels": straight,
        "with_turns": run.always.kernels,
        "conditionals": run.conditionals,
        "compile_seconds": seconds,
    }


def on_gpu():
    """Rows and bounds of the large model."""
    device = devices("h100")[0]
    ours = lrjax.subspace_adam(1e-3, RANK)
    stacked = lrjax.stack_leaves(ours, max_size=None)
    rows = [
        kernels_row("adam", optax.adam(1e-3), LAYERS, device),
        kernels_row("subspace_adam, leaf by leaf", ours, 2, device),
        kernels_row("subspace_adam, stacked", stacked, LAYERS, device),
    ]
    return rows, [
        bound("kernels of 224 leaves, stacked", rows[2]["kernels"], at_most=300),
        bound("conditionals of 224 leaves, stacked", rows[2]["conditionals"], at_most=7),
    ]


def compile_seconds(tx, shapes):
    """Processor seconds to trace, lower and compile an update on this machine."""
    start = time.process_time()
    lowered(tx, shapes).compile()
    return time.process_time() - start


def one_step(tx, grads):
    """A function that takes the next step each time it is called."""
    update, box = jax.jit(tx.update, donate_argnums=1), [jax.jit(tx.init)(grads)]

    def step():
        updates, box[0] = update(grads, box[0])
        return updates

    return step


def on_cpu():
    """Rows and bounds of many small matrices."""
    shapes = {f"w{i}": (SMALL_SIZE, SMALL_SIZE) for i in range(SMALL)}
    ours = lrjax.subspace_adam(1e-3, 32)
    compile_seconds(ours, {"w": (8, 8)})
    rows = [
        {"optimizer": name, "leaves": SMALL, "compile_seconds": compile_seconds(tx, shapes)}
        for name, tx in {
            "adam": optax.adam(1e-3),
            "subspace_adam, leaf by leaf": ours,
            "subspace_adam, stacked": lrjax.stack_leaves(ours),
        }.items()
    ]
    claim = f"CPU seconds to compile {SMALL} leaves, leaf by leaf"
    return rows, [bound(claim, rows[1]["compile_seconds"], at_most=5)]


def step_times():
    """The step of stacked leaves over that of the leaves apart, by their size."""
    rows = []
    for size, count in ((64, 48), (128, 48), (256, 48), (512, 24)):
        keys = jr.split(jr.key(0), count)
        grads = {f"w{i}": jr.normal(k, (size, size)) for i, k in enumerate(keys)}
        ours = lrjax.subspace_adam(1e-3, size // 8)
        seconds = interleaved(
            {
                "apart": one_step(ours, grads),
                "stacked": one_step(lrjax.stack_leaves(ours, max_size=None), grads),
            }
        )
        ratio = median_ratio(seconds, "stacked", "apart")
        rows.append({"side": size, "leaves": count, "stacked_over_apart": ratio})
    return rows


def main():
    rows, bounds = on_cpu()
    rows += step_times()
    absent = missing("h100")
    if absent is None:
        more, held = on_gpu()
        rows, bounds = more + rows, held + bounds
    else:
        print(f"The kernels of a GPU are not counted: {absent}")
    write_results("many_leaves", rows, bounds, "jax-cuda12-pjrt")


if __name__ == "__main__":
    main()

"""How many bytes does a step in a subspace send between eight devices?

Counted from the compiled program, as multiples of the gradient's bytes, for a gradient
that is sharded by rows, by columns, or by the layer of a stack. An SVD basis gathers the
whole gradient; power steps with Cholesky QR add up thin products alone. Stacked layers
exchange one byte: whether any of them has yet to see its first gradient. Nothing is timed.
"""

import math
import os
import re


# Only the program is read: no time is spent to make it fast.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


import jax


jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
from _harness import bound, write_results  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P  # noqa: E402

import lrjax  # noqa: E402


LAYOUTS = {
    "rows": ((512, 1536), P("x", None), 64, 0.15),
    "columns": ((512, 1536), P(None, "x"), 64, 0.15),
    "stack": ((8, 128, 384), P("x"), 16, 1e-6),
}
OPTIMIZERS = {
    "subspace_adam": (lrjax.subspace_adam, (AxisType.Auto, AxisType.Explicit)),
    "galore (SVD)": (lrjax.galore, (AxisType.Auto,)),
}
OPERATION = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
SIZES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}


def collectives(text):
    """Bytes of the results of each kind of collective in a compiled program."""
    total = {}
    for found in re.finditer(rf"= ([^=\n]*?) ({OPERATION})(?:-start)?\(", text):
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", found.group(1))
        size = sum(
            SIZES[t] * math.prod(int(n) for n in s.split(",") if n) for t, s in shapes
        )
        total[found.group(2)] = total.get(found.group(2), 0) + size
    return total


def count(optimizer, shape, spec, axis_type):
    """The collectives of one update of a gradient that is sharded like this."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    on = NamedSharding(mesh, spec)
    with jax.set_mesh(mesh):
        gradient = jax.device_put(jnp.ones(shape), on)
        specs = lrjax.state_specs(optimizer, gradient, on)
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(optimizer.init, jnp.ones(shape)),
            specs,
        )
        update = jax.jit(optimizer.update, out_shardings=(on, specs))
        return collectives(update.lower(gradient, state).compile().as_text())


def main():
    rows, bounds = [], []
    for layout, (shape, spec, rank, limit) in LAYOUTS.items():
        size = 4 * math.prod(shape)
        for name, (recipe, axis_types) in OPTIMIZERS.items():
            for axis_type in axis_types:
                found = count(recipe(1e-3, rank), shape, spec, axis_type)
                share = sum(found.values()) / size
                row = {"sharded by": layout, "shape": str(shape), "rank": rank}
                row |= {"optimizer": name, "mesh": axis_type.name, "share": share}
                rows.append(row | {kind: n / size for kind, n in found.items()})
                if name == "subspace_adam":
                    claim = f"{layout}, {axis_type.name}: bytes over those of the gradient"
                    bounds.append(bound(claim, share, at_most=limit))
    write_results("subspace_collectives", rows, bounds)


if __name__ == "__main__":
    main()

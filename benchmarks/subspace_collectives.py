"""How many bytes does a step in a subspace send between eight devices?

Counted from the compiled program, as multiples of the gradient's bytes, for a gradient
that is sharded by rows, by columns, or by the layer of a stack. An SVD basis gathers the
whole gradient; power steps with Cholesky QR add up thin products alone. Stacked layers
exchange nothing. On an Auto mesh the compiler decides by itself what is exchanged, or
within ``on_mesh``. Nothing is timed.
"""

import math
import os


# Only the program is read: no time is spent to make it fast.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


import jax


jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import _hlo  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from _harness import bound, write_results  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P  # noqa: E402

import lrjax  # noqa: E402


LAYOUTS = {
    "rows": ((512, 1536), P("x", None), 64, 0.15),
    "columns": ((512, 1536), P(None, "x"), 64, 0.15),
    "stack": ((8, 128, 384), P("x"), 16, 1e-6),
}
AUTO, WRAPPED, EXPLICIT = "Auto", "Auto, on_mesh", "Explicit"
OPTIMIZERS = {
    "subspace_adam": (lrjax.subspace_adam, (AUTO, WRAPPED, EXPLICIT)),
    "galore (SVD)": (lrjax.galore, (AUTO, WRAPPED)),
}


def count(optimizer, shape, spec, kind):
    """The collectives of one update of a gradient that is sharded like this."""
    axis_type = AxisType.Explicit if kind == EXPLICIT else AxisType.Auto
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
        if kind == WRAPPED:
            optimizer = lrjax.on_mesh(optimizer, on)
        update = jax.jit(optimizer.update, out_shardings=(on, specs))
        program = update.lower(gradient, state).compile()
        return _hlo.read(program.as_text()).worst.sent


def main():
    rows, bounds = [], []
    for layout, (shape, spec, rank, limit) in LAYOUTS.items():
        size = 4 * math.prod(shape)
        for name, (recipe, kinds) in OPTIMIZERS.items():
            for kind in kinds:
                found = count(recipe(1e-3, rank), shape, spec, kind)
                share = sum(found.values()) / size
                row = {"sharded by": layout, "shape": str(shape), "rank": rank}
                row |= {"optimizer": name, "mesh": kind, "share": share}
                rows.append(row | {what: n / size for what, n in found.items()})
                if name == "subspace_adam":
                    claim = f"{layout}, {kind}: bytes over those of the gradient"
                    bounds.append(bound(claim, share, at_most=limit))
    write_results("subspace_collectives", rows, bounds)


if __name__ == "__main__":
    main()

"""What does an optimizer hold, and what does a step send, where the weights are sharded?

The tree of a 7B transformer, 32 stacked layers in float32, on eight devices, at rank 1024:
one training step of each optimizer is compiled, and read, never run. State and
temporaries are those of one device. Collectives are the bytes of their results, over
those of the gradient: ``steady`` for a step between refreshes, ``worst`` for one that
refreshes all bases. Always compiled for the CPU, and for H100s and TPUs v5e where their
compilers are installed (``pip install 'lrjax[accelerators]'``). On an Auto mesh the
compiler is left alone, or led by ``on_mesh``. Nothing is timed.
"""

import math
import os
import sys


# Only the program is read: no time is spent to make it fast.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax


jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import _hlo  # noqa: E402
import _targets  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from _harness import bound, write_results  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P  # noqa: E402

import lrjax  # noqa: E402


LAYERS, WIDTH, HIDDEN, VOCABULARY, RANK = 32, 4096, 11008, 32000, 1024
SHAPES = {
    **dict.fromkeys(("q", "k", "v", "o"), (LAYERS, WIDTH, WIDTH)),
    **dict.fromkeys(("gate", "up"), (LAYERS, HIDDEN, WIDTH)),
    "down": (LAYERS, WIDTH, HIDDEN),
    **dict.fromkeys(("embed", "lm_head"), (VOCABULARY, WIDTH)),
    "norms": (2 * LAYERS + 1, WIDTH),
}
ROWS, COLUMNS = P(None, "x", None), P(None, None, "x")
OUTPUTS, INPUTS = ("q", "k", "v", "gate", "up"), ("o", "down")  # as tensor parallelism cuts


def cut(outputs, o, down, embeddings):
    """A layout by the specs of a few kinds of leaves."""
    leaves = {**dict.fromkeys(OUTPUTS, outputs), "o": o, "down": down}
    return {**leaves, "embed": embeddings, "lm_head": embeddings, "norms": P()}


LAYOUTS = {
    "rows": cut(ROWS, ROWS, COLUMNS, P("x")),
    "inputs": cut(COLUMNS, COLUMNS, ROWS, P(None, "x")),
    "tensor parallel": cut(ROWS, COLUMNS, COLUMNS, P("x")),
    "2-D": cut(*[P(None, "x", "y"), *[P(None, "y", "x")] * 2], P("x", "y")),
    "layers": cut(*[P("x")] * 4),
}
OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-3),
    "subspace_adam": lambda: lrjax.subspace_adam(1e-3, RANK),
    "galore": lambda: lrjax.galore(1e-3, RANK),
    "fira": lambda: lrjax.fira(1e-3, RANK),
    "apollo": lambda: lrjax.apollo(1e-3, RANK),
    "dion": lambda: lrjax.dion(1e-3, RANK),
    "soap": lambda: lrjax.soap(1e-3),
}
PACKAGES = ("libtpu", "jax-cuda12-pjrt")
SMALL = ("subspace_adam", "galore", "fira", "apollo")
EXPLICIT, AUTO, WRAPPED = "Explicit", "Auto", "Auto, on_mesh"


def mesh_of(devices, layout, axis_type):
    """Eight devices in a row, or four by two."""
    sides = (4, 2) if layout == "2-D" else (8,)
    grid = np.array(devices).reshape(sides)
    return Mesh(grid, ("x", "y")[: len(sides)], axis_types=(axis_type,) * len(sides))


def row(name, layout, target, kind, devices):
    """The figures of one optimizer on one layout."""
    axis_type = AxisType.Explicit if kind == EXPLICIT else AxisType.Auto
    tx, mesh = OPTIMIZERS[name](), mesh_of(devices, layout, axis_type)
    placed = lambda shape, on: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=on)
    specs = {leaf: NamedSharding(mesh, spec) for leaf, spec in LAYOUTS[layout].items()}
    params = {leaf: placed(shape, specs[leaf]) for leaf, shape in SHAPES.items()}
    plain = {leaf: placed(shape, None) for leaf, shape in SHAPES.items()}
    own = lrjax.state_specs(tx, params, specs)
    there = lambda x, on: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on)
    state = jax.tree.map(there, jax.eval_shape(tx.init, plain), own)

    tx = lrjax.on_mesh(tx, specs) if kind == WRAPPED else tx

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    answer = (specs, own) if kind == AUTO else None
    jitted = jax.jit(step, donate_argnums=(1, 2), out_shardings=answer)
    compiled = jitted.lower(params, state, params).compile()
    run, memory = _hlo.read(compiled.as_text()), compiled.memory_analysis()
    gradient = sum(4 * math.prod(shape) for shape in SHAPES.values())
    share = lambda sent: sum(sent.values()) / gradient
    held = sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
        for x in jax.tree.leaves(state)
    )
    return {
        "optimizer": name,
        "sharded by": layout,
        "mesh": kind,
        "compiled for": target,
        "state GB": held / 1e9,
        "temporaries GB": memory.temp_size_in_bytes / 1e9,
        "steady": share(run.always.sent),
        "worst": share(run.worst.sent),
        "gathered at worst": run.worst.sent["all-gather"] / gradient,
    }


def programs():
    """What is compiled: optimizer, layout, target and kind of mesh."""
    for name in OPTIMIZERS:
        for layout in LAYOUTS:
            yield name, layout, "cpu", EXPLICIT
    for kind in (AUTO, WRAPPED):
        for layout in LAYOUTS:
            yield "subspace_adam", layout, "cpu", kind
        yield "galore", "rows", "cpu", kind
    for layout in LAYOUTS:
        yield "subspace_adam", layout, "h100", EXPLICIT
    for name in ("adam", "apollo", "dion"):
        yield name, "rows", "h100", EXPLICIT
    for name in ("adam", "subspace_adam"):  # a minute of a processor each
        yield name, "rows", "v5e", EXPLICIT


def devices_for(target):
    """Eight devices of a kind, or None with a reason where its compiler is missing."""
    if target == "cpu":
        return jax.devices()
    if reason := _targets.missing(target):
        print(reason, file=sys.stderr)
        return None
    return _targets.devices(target)


def bounds_of(rows):
    """What the rows are held to."""
    find = lambda **want: [
        r for r in rows if all(r[key.replace("_", " ")] == v for key, v in want.items())
    ]
    on_mesh = find(mesh=EXPLICIT, compiled_for="cpu")
    whole = max(r["state GB"] for r in on_mesh if r["optimizer"] == "adam")
    largest = lambda name, key: max(r[key] for r in on_mesh if r["optimizer"] == name)
    bounds = [
        bound(
            f"{name}: state over Adam's, the worst layout",
            largest(name, "state GB") / whole,
            at_most=0.35 if name == "dion" else 0.45,
        )
        for name in (*SMALL, "dion")
    ]
    bounds.append(
        bound(
            "soap: GB of state, the worst layout", largest("soap", "state GB"), at_most=13
        )
    )
    for r in find(optimizer="subspace_adam", mesh=EXPLICIT):
        where = f"subspace_adam, {r['sharded by']}, {r['compiled for']}"
        by_layer = r["sharded by"] == "layers"
        limit = (1e-6, 1e-6) if by_layer else (0.10, 0.20)
        for key, at_most in zip(("steady", "worst"), limit, strict=True):
            claim = f"{where}: bytes sent over the gradient's, {key}"
            bounds.append(bound(claim, r[key], at_most=at_most))
        if r["compiled for"] != "cpu":
            claim = f"{where}: GB of state and temporaries"
            both = r["state GB"] + r["temporaries GB"]
            bounds.append(bound(claim, both, at_most=7.5))
    for name, key, limit in (
        ("dion", "worst", 0.15),
        *((name, "gathered at worst", 0.2) for name in ("galore", "fira")),
    ):
        (r,) = find(optimizer=name, sharded_by="rows", mesh=EXPLICIT, compiled_for="cpu")
        what = "gathered" if key.startswith("gathered") else "sent"
        claim = f"{name}, rows: bytes {what} over the gradient's, at worst"
        bounds.append(bound(claim, r[key], at_most=limit))
    for led in find(mesh=WRAPPED):
        same = {k: led[k] for k in ("optimizer", "sharded by", "compiled for")}
        (r,) = (x for x in find(mesh=EXPLICIT) if same.items() <= x.items())
        claim = (
            f"{led['optimizer']}, {led['sharded by']}, in on_mesh: more bytes than Explicit"
        )
        bounds.append(bound(claim, led["worst"] - r["worst"], at_most=1e-6))
    return bounds


def main():
    rows, devices = [], {}
    for name, layout, target, kind in programs():
        if target not in devices:
            devices[target] = devices_for(target)
        if devices[target] is not None:
            rows.append(row(name, layout, target, kind, devices[target]))
            print(rows[-1], flush=True)
            jax.clear_caches()
    write_results("sharded_memory", rows, bounds_of(rows), *PACKAGES)


if __name__ == "__main__":
    main()

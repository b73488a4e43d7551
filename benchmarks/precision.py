"""What does the precision of the products with the gradient cost, and what does it save?

Saved: the products of a step of subspace_adam on a model of 7 billion parameters, counted
in the program as written, at the rates at which an H100 multiplies large matrices, next to
the bytes that the step cannot avoid. Adam moves bytes only.

Cost: short training runs in which the operands of just these products are rounded to TF32
or to bfloat16, as accelerators round them. Everything else is float32; seeds are vmapped.
"""

import functools
import statistics
from unittest import mock

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from _harness import bound, write_results
from _hlo import read

import lrjax


# Leaves of a Llama: shape and number of them.
LEAVES = (((4096, 4096), 128), ((11008, 4096), 64), ((4096, 11008), 32))
RANK = 1024
BANDWIDTH = 3.35e12
# Products of large matrices reach about 70 % of the published peaks.
RATES = {"float32": 0.7 * 67e12, "tf32": 0.7 * 495e12, "bfloat16": 0.7 * 989e12}
SEEDS, STEPS = 5, 300
BITS = {"float32": None, "tf32": 13, "bfloat16": 16}  # of the 23 that are rounded off


def products():
    """Flops of the products of a step with the gradient, and of those at full precision.

    And bytes: of all gradients, and of the state.
    """
    tx = lrjax.subspace_adam(1e-3, RANK)
    with_gradient = full = size = state = 0
    for shape, count in LEAVES:
        grads = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
        start = jax.eval_shape(tx.init, grads)
        text = jax.jit(tx.update).lower(grads, start).compiler_ir("hlo").as_hlo_text()
        for kind, flops in read(text).worst.flops.items():
            if kind.endswith("highest"):
                full += count * flops
            else:
                with_gradient += count * flops
        of = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
        size, state = size + count * of(grads), state + count * of(start)
    return with_gradient, full, size, state


def arithmetic():
    """The least time of a step by precision, over that of Adam."""
    with_gradient, full, size, state = products()
    adam = 7 * size / BANDWIDTH  # gradient read; parameters and two moments read, written
    moved = (3 * size + 2 * state) / BANDWIDTH
    rows = []
    for name, rate in RATES.items():
        multiplied = with_gradient / rate + full / RATES["float32"]
        rows.append(
            {
                "products": name,
                "with_gradient_Tflop": with_gradient / 1e12,
                "full_precision_Tflop": full / 1e12,
                "multiply_ms": 1e3 * multiplied,
                "move_ms": 1e3 * moved,
                "adam_ms": 1e3 * adam,
                "over_adam": max(multiplied, moved) / adam,
            }
        )
    return rows


def rounded(bits):
    """``jnp.einsum`` that rounds operands of products which ask for no precision."""
    exact = jnp.einsum

    def einsum(subscripts, *operands, precision=None, **settings):
        if precision is None and bits is not None:
            operands = [_round(x, bits) for x in operands]
        return exact(subscripts, *operands, precision="highest", **settings)

    return mock.patch.object(jnp, "einsum", einsum)


def _round(x, bits):
    """To the nearest number whose last ``bits`` bits are zero."""
    whole = jax.lax.bitcast_convert_type(x, jnp.int32) + (1 << (bits - 1))
    return jax.lax.bitcast_convert_type(whole & -(1 << bits), jnp.float32)


def teacher(key, batch=64):
    """A network of two hidden layers that is to be learned from noisy outputs."""
    shapes = {"first": (32, 64), "second": (64, 64), "third": (64, 16)}
    keys = dict(zip(shapes, jr.split(key, 3), strict=True))
    draw = lambda key, shape: jr.normal(key, shape) / shape[0] ** 0.5
    truth = {k: draw(jr.fold_in(keys[k], 1), s) for k, s in shapes.items()}
    params = {k: draw(keys[k], s) for k, s in shapes.items()}

    def out(p, x):
        hidden = jax.nn.relu(jax.nn.relu(x @ p["first"]) @ p["second"])
        return hidden @ p["third"]

    def loss(p, key):
        x = jr.normal(key, (batch, 32))
        noise = 0.1 * jr.normal(jr.fold_in(key, 1), (batch, 16))
        return jnp.mean((out(p, x) - out(truth, x) - noise) ** 2)

    return params, loss


def run(tx, key):
    """The mean loss of the last fifty steps."""
    params, loss = teacher(key)

    def step(carry, key):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, key)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    keys = jr.split(jr.fold_in(key, 7), STEPS)
    _, values = jax.lax.scan(step, (params, tx.init(params)), keys)
    return jnp.mean(values[-50:])


def training():
    """Final losses by optimizer and precision, and their ratios to those in float32."""
    recipes = {
        "subspace_adam": lambda: lrjax.subspace_adam(3e-3, 8),
        "galore": lambda: lrjax.galore(3e-2, 8, refresh_every=50),
        "dion": lambda: lrjax.dion(1e-2, 8),
        "soap": lambda: lrjax.soap(3e-3),
    }
    rows = []
    for name, make in recipes.items():
        losses = {}
        for precision, bits in BITS.items():
            with rounded(bits):
                jax.clear_caches()
                every = jax.jit(jax.vmap(functools.partial(run, make())))
                losses[precision] = every(jr.split(jr.key(0), SEEDS))
        ratios = {p: (x / losses["float32"]).tolist() for p, x in losses.items()}
        rows.append(
            {
                "optimizer": name,
                "loss": statistics.median(losses["float32"].tolist()),
                **{
                    f"{p}_over_float32": statistics.median(ratios[p])
                    for p in ("tf32", "bfloat16")
                },
                "largest": max(ratios["tf32"] + ratios["bfloat16"]),
                "smallest": min(ratios["tf32"] + ratios["bfloat16"]),
            }
        )
    return rows


def main():
    saved, cost = arithmetic(), training()
    over = {row["products"]: row["over_adam"] for row in saved}
    bounds = [
        bound("least time of a step over Adam's, tf32", over["tf32"], at_most=2),
        bound("least time of a step over Adam's, bfloat16", over["bfloat16"], at_most=2),
        bound(
            "final loss with rounded products over that in float32, worst of all runs",
            max(row["largest"] for row in cost),
            at_most=1.1,
        ),
    ]
    write_results("precision", saved + cost, bounds)


if __name__ == "__main__":
    main()

"""What an adaptive flow costs against small-step gradient descent, a loop and the compiler.

1. The gradient flow of a 64 × 48 factorization of rank 8 to within 1e-4 of the truth (in
   Frobenius norm; the singular values are between 0.5 and 2): by
   ``gradient_flow`` at the loosest tolerance that does it, and by gradient descent under
   ``lax.scan`` with the largest step that does it. Gradient evaluations are counted.
2. A sweep of 64 flows in one ``vmap``, and as one flow of the sum of their losses, whose
   members then share every step, against the same compiled flow called 64 times.
3. Compiling a flow of a small and of a 64 times larger problem.
"""

import time

import jax
import jax.numpy as jnp
import jax.random as jr
from _harness import bound, interleaved, median_ratio, medians, write_results

from lrjax import flows, gradient_flow, lowrank


jax.config.update("jax_enable_x64", True)

ERROR, T1 = 1e-4, 3.0


def problem(key, shape=(64, 48), rank=8):
    ku, kv = jr.split(key)
    values = jnp.linspace(2.0, 0.5, rank)
    target = lowrank.balanced_init(shape, values, key=ku).materialize()
    return lowrank.gaussian_init(shape, rank, 0.1, key=kv), target


def flow(start, target, tolerance):
    return gradient_flow(
        flows.approximation_loss, start, target, t1=T1, rtol=tolerance, atol=tolerance
    ).params


def descent(start, target, steps):
    eta = T1 / steps

    def step(x, _):
        g = jax.grad(flows.approximation_loss)(x, target)
        return jax.tree.map(lambda p, d: p - eta * d, x, g), None

    return jax.lax.scan(step, start, length=steps)[0]


def distance(x, y):
    return float(jnp.linalg.norm(x.materialize() - y.materialize()))


def count_gradients(start, target, tolerance):
    count = [0]

    def counted(x, target):
        jax.debug.callback(lambda: count.__setitem__(0, count[0] + 1))
        return flows.approximation_loss(x, target)

    jax.block_until_ready(
        gradient_flow(counted, start, target, t1=T1, rtol=tolerance, atol=tolerance).params
    )
    jax.effects_barrier()
    return count[0]


def against_descent():
    start, target = problem(jr.key(0))
    truth = flow(start, target, 1e-13)
    tolerances = (10.0 ** -(k / 2) for k in range(4, 20))
    tolerance = next(
        x for x in tolerances if distance(flow(start, target, x), truth) <= ERROR
    )
    gd = jax.jit(descent, static_argnums=2)
    counts = (int(2 ** (k / 2)) for k in range(14, 48))
    steps = next(n for n in counts if distance(gd(start, target, n), truth) <= ERROR)
    gradients = count_gradients(start, target, tolerance)
    jitted = jax.jit(flow)
    runs = {
        "flow": lambda: jitted(start, target, tolerance),
        "descent": lambda: gd(start, target, steps),
    }
    seconds = interleaved(runs, 20)
    middle = medians(seconds)
    faster = median_ratio(seconds, "descent", "flow")
    rows = [
        {
            "method": "gradient_flow",
            "setting": f"tolerance {tolerance:.1e}",
            "gradients": gradients,
            "error": distance(flow(start, target, tolerance), truth),
            "seconds": middle["flow"],
        },
        {
            "method": "gradient descent",
            "setting": f"step {T1 / steps:.1e}",
            "gradients": steps,
            "error": distance(gd(start, target, steps), truth),
            "seconds": middle["descent"],
        },
    ]
    bounds = [
        bound(
            "gradients of descent over those of the flow", steps / gradients, at_least=50
        ),
        bound("seconds of descent over those of the flow", faster, at_least=1),
    ]
    return rows, bounds


def sweep():
    shape, rank, members = (10, 10), 1, 64
    keys = jr.split(jr.key(1), members)
    _, target = problem(jr.key(2), shape, 2)
    loss = flows.approximation_loss

    def integrate(loss, start, target):
        return gradient_flow(loss, start, target, t1=10.0, rtol=1e-8, atol=1e-11).params

    def start(key):
        return lowrank.gaussian_init(shape, rank, 1e-2, key=key)

    def total(stack, target):
        return jnp.sum(jax.vmap(loss, (0, None))(stack, target))

    single = jax.jit(lambda key, target: integrate(loss, start(key), target))
    batch = jax.jit(jax.vmap(single, (0, None)))
    common = jax.jit(lambda keys, target: integrate(total, jax.vmap(start)(keys), target))
    runs = {
        "loop": lambda: [single(key, target) for key in keys],
        "vmap": lambda: batch(keys, target),
        "common steps": lambda: common(keys, target),
    }
    looped = jax.tree.map(lambda *x: jnp.stack(x), *runs["loop"]())
    seconds = interleaved(runs, 20)
    middle = medians(seconds)
    row = {
        "members": members,
        **middle,
        "difference of vmap": distance(looped, runs["vmap"]()),
        "difference of common steps": distance(looped, runs["common steps"]()),
    }
    gain = {name: median_ratio(seconds, "loop", name) for name in runs}
    return [row], [
        bound("loop over vmap, 64 flows", gain["vmap"], at_least=8),
        bound("loop over common steps, 64 flows", gain["common steps"], at_least=8),
    ]


def compilation():
    rows = []
    for shape, rank in (((16, 12), 4), ((128, 96), 4), ((1024, 768), 4)):
        start, target = problem(jr.key(3), shape, rank)
        begin = time.perf_counter()
        lowered = jax.jit(flow).lower(start, target, 1e-8)
        lowered.compile()
        size = len(lowered.as_text())
        rows.append(
            {
                "shape": shape,
                "trace and compile": time.perf_counter() - begin,
                "program bytes": size,
            }
        )
    largest = max(row["trace and compile"] for row in rows)
    growth = rows[-1]["program bytes"] / rows[0]["program bytes"]
    return rows, [
        bound("seconds to trace and compile a flow", largest, at_most=6),
        bound("program of a 4096 times larger problem", growth, at_most=1.05),
    ]


def main():
    compiled, compile_bounds = compilation()
    compared, compare_bounds = against_descent()
    swept, sweep_bounds = sweep()
    rows = compared + swept + compiled
    write_results("flow_speed", rows, compare_bounds + sweep_bounds + compile_bounds)


if __name__ == "__main__":
    main()

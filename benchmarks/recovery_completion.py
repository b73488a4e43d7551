"""How large a matrix can be completed in the memory of its data, and how well?"""

import functools
import json
import subprocess
import sys
import time
from pathlib import Path

import _harness
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as spl

import lrjax


LARGE = {"m": 20_000, "n": 10_000, "rank": 20, "count": 2_000_000}
SMALL = {"m": 1000, "n": 800, "rank": 5, "count": 80_000}
SEEDS = 5


def entries(m, n, rank, count, noise=0.0, seed=0):
    """Distinct entries of a random matrix with entries of size one, and its factors."""
    rng = np.random.default_rng(seed)
    left = rng.standard_normal((m, rank), np.float32)
    right = rng.standard_normal((n, rank), np.float32) / np.float32(rank**0.5)
    places = rng.choice(m * n, count, replace=False)
    rows, cols = (places // n).astype(np.int32), (places % n).astype(np.int32)
    values = np.zeros(count, np.float32)
    for at in np.array_split(np.arange(count), 50):
        values[at] = np.sum(left[rows[at]] * right[cols[at]], axis=1)
    values += noise * rng.standard_normal(count, np.float32)
    return (rows, cols, values), (left, right)


def relative_error(found, truth):
    """``‖X − X*‖ / ‖X*‖`` from Gram matrices of orthonormalized factors."""
    x, y = (lrjax.LowRank(*map(jnp.asarray, pair)) for pair in (found, truth))
    return float(lrjax.norm(lrjax.add(x, lrjax.LowRank(-y.left, y.right))) / lrjax.norm(y))


@functools.partial(jax.jit, static_argnames=("shape", "rank"))
def fit(rows, cols, values, shape, rank, max_steps):
    """The fit, and the start alone with ``max_steps=0``."""
    return lrjax.fit_completion(
        rows, cols, values, shape, rank=rank, max_steps=max_steps, tol=1e-5
    )


def resident(field):
    """Kilobytes of this process, now (``VmRSS``) or at most (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def large(noise):
    """One completion of the large matrix; in a process of its own, for its memory."""
    data, truth = entries(**LARGE, noise=noise)
    shape = LARGE["m"], LARGE["n"]
    arrays = [jnp.asarray(x) for x in data]
    start = time.perf_counter()
    compiled = fit.lower(*arrays, shape, LARGE["rank"], 100).compile()
    compile_seconds = time.perf_counter() - start
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    start_seconds = _harness.timed(lambda: compiled(*arrays, 0))
    start = time.perf_counter()
    result = jax.block_until_ready(compiled(*arrays, 100))
    seconds = time.perf_counter() - start
    growth = 1024 * (resident("VmHWM") - before)
    memory = compiled.memory_analysis()
    bytes_of_data = sum(x.nbytes for x in data)
    used = memory.temp_size_in_bytes + memory.output_size_in_bytes
    x = result.low_rank
    steps = int(result.steps)
    return {
        "what": f"{shape[0]}x{shape[1]}, {LARGE['count']} entries, noise {noise}",
        "relative_error": relative_error((x.left, x.right), truth),
        "noise_found": float(result.noise),
        "rank_found": int(result.rank),
        "iterations": steps,
        "seconds": seconds,
        "start_seconds": start_seconds,
        "seconds_per_iteration": (seconds - start_seconds) / steps,
        "compile_seconds": compile_seconds,
        "data_bytes": bytes_of_data,
        "temporary_and_output_over_data": used / bytes_of_data,
        "with_the_data_over_data": 1 + used / bytes_of_data,
        "resident_growth_over_data": growth / bytes_of_data,
    }


def in_a_process(noise):
    command = [sys.executable, __file__, "--large", str(noise)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def numpy_als(data, shape, rank, ridge, steps=30):
    """Alternating least squares with one small solve a row, as usually written."""
    rows, cols, values = data
    by_row = sp.csr_array((values, (rows, cols)), shape)
    sides = by_row, by_row.T.tocsr()
    rng = np.random.default_rng(0)
    left = np.zeros((shape[0], rank), np.float32)
    right = rng.standard_normal((shape[1], rank), np.float32)
    eye = ridge * np.eye(rank, dtype=np.float32)
    for _ in range(steps):
        for matrix, to, of in ((sides[0], left, right), (sides[1], right, left)):
            for i in range(matrix.shape[0]):
                at = slice(matrix.indptr[i], matrix.indptr[i + 1])
                v = of[matrix.indices[at]]
                to[i] = np.linalg.solve(v.T @ v + eye, v.T @ matrix.data[at])
    return left, right


def iterative_svd(data, shape, rank, steps=100):
    """Fill what is missing with the best low-rank fit of the filled matrix."""
    rows, cols, values = data
    filled = np.zeros(shape, np.float32)
    for _ in range(steps):
        filled[rows, cols] = values
        u, s, vt = spl.svds(filled, rank, random_state=0)
        filled = (u * s) @ vt
    return u * s, vt.T


def small(noise):
    """Errors and seconds of the methods, each told what its interface needs."""
    shape, rank = (SMALL["m"], SMALL["n"]), SMALL["rank"]
    errors, seconds = {}, {}

    def note(name, run, truth):
        start = time.perf_counter()
        found = run()
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        errors.setdefault(name, []).append(relative_error(found, truth))

    def ours(data):
        x = jax.block_until_ready(fit(*data, shape, 20, 100)).low_rank
        return x.left, x.right

    jax.block_until_ready(fit(*entries(**SMALL)[0], shape, 20, 100))
    for seed in range(SEEDS):
        data, truth = entries(**SMALL, noise=noise, seed=seed)
        note("lrjax.fit_completion", lambda data=data: ours(data), truth)
        if seed < 2:
            ridge = 1e-3 + noise**2
            als = lambda data=data, ridge=ridge: numpy_als(data, shape, rank, ridge)
            note("ALS in numpy", als, truth)
            svd = lambda data=data: iterative_svd(data, shape, rank)
            note("iterative SVD", svd, truth)
    told = {"lrjax.fit_completion": "at most 20 columns", "iterative SVD": "rank"}
    return [
        {
            "what": f"{shape[0]}x{shape[1]}, rank {rank}, noise {noise}",
            "method": name,
            "told": told.get(name, "rank and noise"),
            "relative_error": float(np.median(errors[name])),
            "seconds": float(np.median(seconds[name])),
        }
        for name in errors
    ]


def gradient_memory():
    """The gradient over the factors on the large matrix: blocks and all at once."""
    data, (left, right) = entries(**LARGE)
    problem = lrjax.matrix_completion.from_data(*data, (LARGE["m"], LARGE["n"]))
    x = lrjax.LowRank(jnp.asarray(left), jnp.asarray(right))

    def at_once(problem, x):
        at = problem.operator
        measured = jnp.sum(x.left[at.rows] * x.right[at.cols], axis=-1)
        return problem.objective(measured - problem.targets)

    losses = {"blocks": lambda p, x: p.loss(x), "at once": at_once}
    bytes_of_data = sum(leaf.nbytes for leaf in jax.tree.leaves(problem))
    steps, rows = {}, {}
    for name, loss in losses.items():
        compiled = jax.jit(jax.grad(loss, argnums=1)).lower(problem, x).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        rows[name] = temporary / bytes_of_data
        steps[name] = functools.partial(compiled, problem, x)
    seconds = _harness.medians(_harness.interleaved(steps, repeats=5))
    return [
        {
            "what": "gradient of Entries",
            "method": name,
            "temporary_over_data": rows[name],
            "seconds": seconds[name],
        }
        for name in losses
    ]


def sketches():
    """Seconds of exact and of sketched sweeps of alternating least squares."""
    rows = []
    for rank in (20, 64):
        data, _ = entries(500, 500, rank, 100_000, noise=0.1)
        problem = lrjax.matrix_completion.from_data(*data, (500, 500))
        start = lrjax.spectral_init(problem, rank, key=jr.key(0))

        def run(problem, start, sketch=None):
            return lrjax.alternating_least_squares(
                problem, start, steps=1, ridge=1.0, sketch=sketch, sketch_tol=1e-3
            ).x

        steps = {
            "exact": functools.partial(jax.jit(run), problem, start),
            "sketched": functools.partial(
                jax.jit(functools.partial(run, sketch=2 * rank)), problem, start
            ),
        }
        medians = _harness.medians(_harness.interleaved(steps, repeats=2))
        a, b = (f() for f in steps.values())
        rows.append(
            {
                "what": f"a sweep of width {rank}, 200 entries a row, with the sort",
                "exact_seconds": medians["exact"],
                "sketched_seconds": medians["sketched"],
                "difference": relative_error((a.left, a.right), (b.left, b.right)),
            }
        )
    return rows


def main():
    clean, noisy = in_a_process(0.0), in_a_process(0.1)
    gradients = gradient_memory()
    rows = [clean, noisy, *gradients, *small(0.0), *small(0.3), *sketches()]
    free = LARGE["rank"] * (LARGE["m"] + LARGE["n"] - LARGE["rank"])
    limit = 0.1 * (free / LARGE["count"]) ** 0.5
    memory = max(row["with_the_data_over_data"] for row in (clean, noisy))
    growth = max(row["resident_growth_over_data"] for row in (clean, noisy))
    bounds = [
        _harness.bound("data, temporaries and output over data", memory, at_most=4.0),
        _harness.bound("growth of the process over data", growth, at_most=4.0),
        _harness.bound("clean: relative error", clean["relative_error"], at_most=1e-4),
        _harness.bound(
            "noise 0.1: relative error over that of so many free parameters",
            noisy["relative_error"] / limit,
            at_most=1.3,
        ),
        _harness.bound(
            "gradient of Entries: temporaries over data",
            gradients[0]["temporary_over_data"],
            at_most=2.0,
        ),
    ]
    _harness.write_results("recovery_completion", rows, bounds, "scipy")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--large":
        print(json.dumps(large(float(sys.argv[2]))))
    else:
        main()

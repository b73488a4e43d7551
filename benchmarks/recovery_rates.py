"""Are the linear rates of scaled (sub)gradient descent free of the condition number?"""

import functools

import _harness
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import lrjax
from lrjax import recovery


SIZE, RANK, SEEDS = 40, 4, 5
STEP_SIZES = (0.2, 0.5, 0.6, 2 / 3, 0.7, 0.8, 0.9)


@functools.partial(jax.jit, static_argnames=("rank", "steps"))
def polyak(problem, key, rank, steps):
    """The scaled subgradient method with Polyak's steps from a trimmed spectral start."""
    start = lrjax.spectral_init(problem, rank, key=key, trim=0.1)
    tx = lrjax.scaled_subgradient(f_min=problem.loss(problem.truth))
    return lrjax.solve(problem, tx, start, steps=steps)


def sensing(seed, condition, factor=8, dtype=jnp.float64):
    key = jr.key(seed)
    return key, lrjax.matrix_sensing(
        key,
        (SIZE, SIZE),
        RANK,
        factor * SIZE * RANK,
        outlier_fraction=0.1,
        condition=condition,
        dtype=dtype,
    )


def iterations(errors, level):
    """The first step at whose start the relative error is at most the level."""
    below = np.flatnonzero(np.asarray(errors) <= level)
    return int(below[0]) if len(below) else -1


def robust_sensing():
    rows = []
    for condition in (1.0, 20.0):
        for seed in range(SEEDS):
            key, problem = sensing(seed, condition)
            history = polyak(problem, key, RANK, 200).history
            levels = {
                f"steps to {level:.0e}": iterations(history.relative_error, level)
                for level in (1e-2, 1e-4, 1e-6, 1e-8, 1e-12)
            }
            rows.append({"what": "polyak", "condition": condition, "seed": seed} | levels)
    return rows


def local_rates():
    """The contraction of scaled_gd near the solution of an exact factorization."""
    keys = jr.split(jr.key(0), 4)
    left, right = (
        jnp.linalg.qr(jr.normal(k, (n, 3), jnp.float64))[0]
        for k, n in zip(keys[:2], (20, 15), strict=True)
    )
    truth = lrjax.balance(lrjax.LowRank(left * jnp.array([[100.0, 10.0, 1.0]]), right))
    problem = recovery.Problem(
        recovery.Identity((20, 15)), truth.materialize(), recovery.Squared(), truth
    )
    start = lrjax.LowRank(
        truth.left + 1e-3 * jr.normal(keys[2], truth.left.shape),
        truth.right + 1e-3 * jr.normal(keys[3], truth.right.shape),
    )

    @jax.jit
    def run(step_size):
        tx = lrjax.scaled_gd(step_size)
        return lrjax.solve(problem, tx, start, steps=60).history.relative_error

    rows = []
    for eta in STEP_SIZES:
        errors = np.asarray(run(eta))
        last = min(50, np.flatnonzero(errors > 1e-12)[-1])
        first = last // 2
        rate = (errors[last] / errors[first]) ** (1 / (last - first))
        expected = max(abs(1 - eta), abs(1 - 2 * eta))
        rows.append({"what": "rate", "step size": eta, "rate": rate, "exact": expected})
    return rows


def undamped_float32():
    """No damping at all, twice the rank, single precision, far beyond convergence."""
    rows = []
    for seed in range(SEEDS):
        key, problem = sensing(seed, 20.0, factor=24, dtype=jnp.float32)
        history = polyak(problem, key, 2 * RANK, 2000).history
        rows.append(
            {
                "what": "undamped, width 8, float32",
                "seed": seed,
                "finite": bool(history.finite.all()),
                "final error": float(history.relative_error[-1]),
            }
        )
    return rows


def main():
    jax.config.update("jax_enable_x64", True)
    polyak_rows, rate_rows, undamped = robust_sensing(), local_rates(), undamped_float32()
    steps = [row["steps to 1e-08"] for row in polyak_rows]
    worst_rate = max(abs(row["rate"] - row["exact"]) for row in rate_rows)
    bounds = [
        _harness.bound("fewest steps to 1e-8, κ = 1 and 20", min(steps), at_least=95),
        _harness.bound("most steps to 1e-8, κ = 1 and 20", max(steps), at_most=125),
        _harness.bound("rate off max(|1−η|, |1−2η|)", worst_rate, at_most=1e-2),
        _harness.bound(
            "undamped runs with a number that is not finite",
            sum(not row["finite"] for row in undamped),
            at_most=0,
        ),
        _harness.bound(
            "undamped error after 2,000 steps in float32",
            max(row["final error"] for row in undamped),
            at_most=1e-5,
        ),
    ]
    _harness.write_results("recovery_rates", polyak_rows + rate_rows + undamped, bounds)


if __name__ == "__main__":
    main()

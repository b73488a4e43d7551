"""Does the integrator reproduce what is known exactly, and the laws of local theory?

Errors against the closed forms at four tolerances, the drift of the conserved balance,
the local rates of factorized least squares, and the exponents of the alignment law, each
over several random draws. Then what is claimed of adapters in deep linear networks, of
linear students, of the lazy limit, of stages and of forgetting.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _flow_claims import PARTS
from _harness import bound, write_results

import lrjax
from lrjax import LowRank, flows, gradient_flow, lowrank, metrics


jax.config.update("jax_enable_x64", True)

LADDER = {1e-6: 8e-6, 1e-8: 3e-8, 1e-10: 4e-10, 1e-12: 3e-12}
SIGMA = (3.0, 2.0, 1.0)
SHAPE = (7, 5)


def orthonormal(key, n, r=3):
    return jnp.linalg.qr(jr.normal(key, (n, r)))[0]


def matrix(u, values, v):
    return (u * values[None]) @ v.T


def ladder():
    """Errors in any entry, at 20 final times of flows with one mode started at zero."""
    sigma = jnp.array(SIGMA)
    b0, a0 = jnp.array([0.0, 0.3, -0.2]), jnp.array([0.5, 0.01, 0.4])
    times = jnp.linspace(0.2, 4, 20)

    @jax.jit
    def errors(key, tolerance):
        ku, kv = jr.split(key)
        u, v = orthonormal(ku, SHAPE[0]), orthonormal(kv, SHAPE[1])
        start = LowRank(u * b0[None], v * a0[None])

        def at(t1):
            x = gradient_flow(
                flows.approximation_loss,
                start,
                matrix(u, sigma, v),
                t1=t1,
                rtol=tolerance,
                atol=tolerance,
            ).params
            b, a = flows.aligned_modes(t1, b0, a0, sigma)
            error = jnp.max(jnp.abs(x.materialize() - matrix(u, b * a, v)))
            return error, metrics.balance_drift(x, start)

        return jax.tree.map(jnp.max, jax.vmap(at)(times))

    rows, bounds = [], []
    for tolerance, limit in LADDER.items():
        found = [errors(key, tolerance) for key in jr.split(jr.key(0), 5)]
        error, drift = (max(float(x) for x in xs) for xs in zip(*found, strict=True))
        rows.append({"tolerance": tolerance, "error": error, "drift": drift})
        bounds.append(bound(f"error at {tolerance:.0e}", error, at_most=limit))
        bounds.append(bound(f"drift at {tolerance:.0e}", drift, at_most=10 * tolerance))
    return rows, bounds


def riccati():
    @jax.jit
    def error(key):
        kt, ks = jr.split(key)
        target = jr.normal(kt, (6, 5))
        target = 2 * target / jnp.linalg.norm(target, 2)
        start = lowrank.balanced_init((6, 5), jnp.array([0.1, 0.05, 0.02]), key=ks)
        x = gradient_flow(
            flows.approximation_loss, start, target, t1=2.0, rtol=1e-12, atol=1e-13
        ).params
        exact = flows.riccati(jnp.array(2.0), start, target).product
        return jnp.max(jnp.abs(x.materialize() - exact))

    worst = max(float(error(key)) for key in jr.split(jr.key(1), 5))
    row = {"closed form": "Riccati", "error": worst}
    return [row], [bound("error against the Riccati solution", worst, at_most=1e-11)]


def rates():
    """The rate at which the distance to the limit falls from 1e-4 to 1e-7."""
    sigma = jnp.array(SIGMA)

    def rate(start, target, best, t1, precondition=None):
        ts = jnp.linspace(0, t1, 250)
        gap = gradient_flow(
            flows.approximation_loss,
            start,
            target,
            t1=t1,
            ts=ts,
            rtol=1e-10,
            atol=1e-13,
            precondition=precondition,
            observe=lambda state: jnp.linalg.norm(state.params.materialize() - best),
        ).observed
        until = metrics.crossing_time(ts, gap, 1e-7)
        return metrics.fitted_rate(ts, gap, (gap < 1e-4) & (ts < until))

    def all_rates(key):
        k1, k2, k3 = jr.split(key, 3)
        u, v = orthonormal(k1, SHAPE[0]), orthonormal(k2, SHAPE[1])
        target, shorter = matrix(u, sigma, v), matrix(u[:, :2], sigma[:2], v[:, :2])
        small = lowrank.gaussian_init(SHAPE, 3, 0.01, key=k3)
        smaller = lowrank.gaussian_init(SHAPE, 2, 0.01, key=k3)
        along = lambda b, a, r=3: LowRank(b * u[:, :r], a * v[:, :r])
        gram, tangent = lrjax.scale_by_gram(), lrjax.scale_by_tangent()
        return {
            "generic, rank of the target": (rate(small, target, target, 35.0), 1.0),
            "generic, rank too small": (rate(smaller, target, shorter, 35.0), 1.0),
            "aligned": (rate(along(0.1, 0.1), target, target, 15.0), 2.0),
            "aligned, rank too small": (
                rate(along(0.1, 0.1, 2), target, shorter, 10.0),
                4.0,
            ),
            "aligned, imbalance 3": (rate(along(2.0, 1.0), target, target, 8.0), 13**0.5),
            "aligned, Gram-scaled": (
                rate(along(0.1, 0.3), target, target, 15.0, gram),
                2.0,
            ),
            "aligned, tangent-space": (
                rate(along(0.1, 0.3), target, target, 25.0, tangent),
                1.0,
            ),
        }

    rows, bounds = [], []
    found = jax.jit(jax.vmap(all_rates))(jr.split(jr.key(2), 8))
    for name, (measured, predicted) in found.items():
        want = float(predicted[0])
        off = float(jnp.max(jnp.abs(measured / want - 1)))
        rows.append({"rate": name, "predicted": want, "mean": float(jnp.mean(measured))})
        bounds.append(bound(f"rate, {name}: worst relative deviation", off, at_most=0.02))
    return rows, bounds


def alignment():
    """The least 1 − cos over time is ∝ α^p with p = 4 s/(s + 2 max s), in two layers."""
    alphas = jnp.logspace(-4, -8, 5)
    width, seeds = 10, 24

    def best(key, alpha):
        kt, k1, k2 = jr.split(key, 3)
        task = flows.lora_task(
            jnp.linspace(1.5, 0.5, width),
            jnp.array([2.0]),
            shape=(width, width),
            aligned=False,
            key=kt,
        )
        gradients = (task.base.second.T @ task.change, task.change @ task.base.first.T)
        goals = [lowrank.svd_init(g, 1, power=0.0) for g in gradients]
        speeds = jnp.stack([jnp.linalg.norm(g, 2) for g in gradients])
        stack = lambda x: jnp.concatenate([x.left, x.right])
        t1 = 1.25 * jnp.log(1 / alpha) / jnp.max(speeds) + 2
        start = (lowrank.gaussian_init((width, width), 1, alpha, key=k) for k in (k1, k2))
        apart = gradient_flow(
            flows.two_layer_loss,
            flows.TwoLayers(*start),
            task.base,
            task.target,
            t1=t1,
            ts=jnp.linspace(0, 1, 300) * t1,
            observe=lambda state: jnp.stack(
                [
                    metrics.misalignment(stack(x), stack(goal))
                    for x, goal in zip(state.params, goals, strict=True)
                ]
            ),
        ).observed
        return jnp.min(apart, axis=0), 4 * speeds / (speeds + 2 * jnp.max(speeds))

    over = jax.vmap(jax.vmap(best, (None, 0)), (0, None))
    smallest, law = jax.jit(over)(jr.split(jr.key(3), seeds), alphas)
    log = np.log10(np.asarray(smallest))
    slopes = np.array(
        [np.polyfit(np.log10(alphas), log[seed], 1)[0] for seed in range(seeds)]
    )
    off = slopes - np.asarray(law[:, 0])
    row = {
        "alignment exponents": 2 * seeds,
        "mean deviation": float(off.mean()),
        "median |deviation|": float(np.median(abs(off))),
        "largest |deviation|": float(abs(off).max()),
        "share within 0.05": float((abs(off) <= 0.05).mean()),
    }
    claim = "alignment exponent: |mean deviation| from the law"
    median = "alignment exponent: median |deviation| from the law"
    return [row], [
        bound(claim, abs(off.mean()), at_most=0.05),
        bound(median, float(np.median(abs(off))), at_most=0.05),
    ]


def main():
    rows, bounds = [], []
    for part in (ladder, riccati, rates, alignment, *PARTS):
        more_rows, more_bounds = part()
        rows += more_rows
        bounds += more_bounds
    write_results("flow_theory", rows, bounds)


if __name__ == "__main__":
    main()

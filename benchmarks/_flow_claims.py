"""What theory claims of adapters, students and stages, beside flows and draws."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _harness import bound

from lrjax import LowRank, flows, gradient_flow, lowrank, metrics


def matrix(key, shape):
    return jr.normal(key, shape) / max(shape) ** 0.5


def orthonormal(key, n, r):
    return jnp.linalg.qr(jr.normal(key, (n, r)))[0]


def expressive_power():
    """Adapters of rank R in L layers against the tail of the spectrum from RL on."""
    n, worst, rows = 12, 0.0, []
    for layers in (1, 2, 3, 4):
        for rank in (1, 2, 3):
            off = []
            for key in jr.split(jr.key(layers), 5):
                *keys, last = jr.split(key, layers + 1)
                weights = [jnp.eye(n) + 0.5 * matrix(k, (n, n)) for k in keys]
                target = 2 * matrix(last, (n, n))
                adapters = flows.deep_lora_optimum(weights, target, rank)
                loss = flows.deep_lora_loss(adapters, weights, target)
                floor = flows.deep_lora_floor(weights, target, rank)
                off.append(float(jnp.abs(loss - floor) / jnp.sum(target**2)))
            worst = max(worst, *off)
            rows.append({"layers": layers, "rank": rank, "loss off the floor": max(off)})
    claim = "loss of the adapters off its floor, over the target squared"
    return rows, [bound(claim, worst, at_most=1e-10)]


def bures_wasserstein():
    """Flows of factors of each width from 8 random starts; and along the geodesic."""
    values = 2.0 ** -jnp.arange(6)

    def end(key, rank):
        q = orthonormal(key, 6, 6)
        target = (q * values[None]) @ q.T
        start = orthonormal(jr.fold_in(key, 1), 6, rank)
        t1 = 1.0 if rank == 6 else 80.0
        x = gradient_flow(
            flows.bures_wasserstein_loss, start, target, t1=t1, rtol=1e-9
        ).params
        if rank == 6:
            exact = flows.bures_wasserstein_flow(jnp.array(t1), start, target)
        else:
            exact = flows.bures_wasserstein_limit(target, rank)
        return metrics.relative_change(x @ x.T, exact @ exact.T)

    rows = []
    for rank in (1, 3, 6):
        off = jax.jit(jax.vmap(lambda key, r=rank: end(key, r)))(jr.split(jr.key(4), 8))
        rows.append({"Bures-Wasserstein, rank": rank, "error": float(jnp.max(off))})
    worst = max(row["error"] for row in rows)
    return rows, [bound("Bures-Wasserstein flow off its solution", worst, at_most=1e-6)]


def student():
    """The mean test error of 40 draws at n = 300 against the large limit."""
    n, draws, noise = 300, 40, 0.5
    rows, off, gains = [], [], []
    for ratio in (0.3, 0.6, 1.0, 1.5, 3.0):
        p = round(n / ratio)
        values, weights = flows.marchenko_pastur(n / p, 512)
        limit = (values, weights, weights * n / p * noise)
        best = flows.best_stopping_time(*limit)
        times = best * jnp.logspace(-1, 1, 41)

        @jax.jit
        def errors(key, p=p, times=times):
            kz, kw, kn = jr.split(key, 3)
            inputs, teacher = jr.normal(kz, (p, n)), jr.normal(kw, (n,)) / n**0.5
            outputs = inputs @ teacher + noise**0.5 * jr.normal(kn, (p,))
            found = flows.linear_student(times, inputs, outputs, jnp.zeros(n))
            return jnp.sum((found - teacher[None]) ** 2, axis=1)

        drawn = np.stack([errors(key) for key in jr.split(jr.key(5), draws)])
        mean, predicted = drawn.mean(axis=0), np.asarray(flows.student_error(times, *limit))
        relative = float(np.max(abs(mean / predicted - 1)))
        off.append(relative)
        late = flows.student_error(jnp.array([1e3]) * best, *limit)[0]
        gains.append(float(late / predicted[20]))
        rows.append(
            {
                "n/p": ratio,
                "best time": float(best),
                "best time of the draws": float(times[np.argmin(mean)]),
                "error there": float(predicted[20]),
                "error a thousand times later": float(late),
                "draws off the limit": relative,
                "standard error": float(np.max(drawn.std(axis=0) / mean) / draws**0.5),
            }
        )
    return rows, [
        bound("mean error of 40 students off the large limit", max(off), at_most=0.05),
        bound("gain by stopping at the best time, n = p", gains[2], at_least=2),
    ]


def network(params, inputs):
    return (jnp.tanh(inputs @ params["in"]) @ params["out"]).ravel()


LAZY = flows.lazy_loss(network)


def regimes():
    """How the tangent kernel changes, by the scale of the outputs."""
    scales = jnp.logspace(-1, 4, 6)

    @jax.jit
    @jax.vmap
    def changes(key):
        k1, k2, k3, k4 = jr.split(key, 4)
        params = {"in": jr.normal(k1, (3, 6)), "out": jr.normal(k2, (6, 1))}
        inputs, targets = jr.normal(k3, (4, 3)), jr.normal(k4, (4,))
        kernel = metrics.tangent_kernel(network, params, inputs)
        t1 = 12 / jnp.trace(kernel)
        limit = flows.kernel_flow(t1, kernel, targets)

        def at(scale):
            end = gradient_flow(
                LAZY,
                params,
                params,
                inputs,
                targets,
                scale,
                t1=t1,
                rtol=1e-12,
                atol=1e-15,
            ).params
            outputs = scale * (network(end, inputs) - network(params, inputs))
            change = metrics.kernel_change(network, end, params, inputs)
            return jnp.stack([jnp.linalg.norm(outputs - limit), *change])

        return jax.lax.map(at, scales)

    found = np.asarray(changes(jr.split(jr.key(6), 8)))
    names = ("outputs off the kernel flow", *metrics.KernelChange._fields)
    rows = [
        {"scale": float(scale), **dict(zip(names, row.tolist(), strict=True))}
        for scale, row in zip(scales, np.median(found, axis=0), strict=True)
    ]
    exponents = np.log10(found[:, -2] / found[:, -1])
    off = float(np.max(abs(exponents - [1, 1, 2, 1])))
    return rows, [bound("exponents of the lazy limit: worst deviation", off, at_most=0.02)]


def diagonal(key_query, value_output):
    one = jnp.ones((len(key_query), 1, 1))
    pairs = (LowRank(jnp.asarray(x)[:, None, None], one) for x in (key_query, value_output))
    return flows.Attention(*pairs)


def diagonal_loss(w, sequences, targets):
    return flows.attention_loss(diagonal(*jnp.split(w, 2)), sequences, targets)


def stages():
    """The slope of the time of each stage over ln(1/α) against its limit."""
    d, teacher = 4, diagonal([0.4, 0.0, 0.0, 0.0], [1.0, -0.5, 0.0, 0.0])
    task = flows.attention_task(teacher, examples=64, length=4, key=jr.key(7))
    limit = flows.gradual_stages(diagonal_loss, 2 * d, *task, stages=3)
    order = jnp.argsort(-jnp.abs(limit.weights[-1]))[:3]
    levels = 0.01 * jnp.abs(limit.weights[-1][order])
    sizes = jr.uniform(jr.key(8), (4, d), minval=0.3)

    @jax.jit
    def times(log):
        small = (sizes * jnp.exp(-log))[:, :, None, None]
        start = flows.Attention(LowRank(*small[:2]), LowRank(*small[2:]))
        ts = jnp.linspace(0, 1, 4000) * (limit.times[-1] * log + 40)
        w = gradient_flow(
            flows.attention_loss,
            start,
            *task,
            t1=ts[-1],
            ts=ts,
            observe=lambda state: jnp.concatenate(
                [x.materialize().ravel() for x in state.params]
            ),
        ).observed
        crossing = jax.vmap(metrics.crossing_time, (None, 1, 0))
        return jnp.sort(crossing(ts, 1 / jnp.abs(w[:, order]), 1 / levels))

    logs = (15.0, 30.0, 60.0)
    found = [np.asarray(times(jnp.array(log))) for log in logs]
    slope = (found[2] - found[1]) / (logs[2] - logs[1])
    rows = [
        {
            "stage": k + 1,
            "predicted": float(limit.times[k]),
            "slope": float(slope[k]),
            **{
                f"time / ln(1/α), α = e^-{log:.0f}": float(t[k] / log)
                for log, t in zip(logs, found, strict=True)
            },
        }
        for k in range(3)
    ]
    off = float(np.max(abs(slope / np.asarray(limit.times) - 1)))
    return rows, [bound("stages of attention: deviation from the limit", off, at_most=1e-4)]


def frozen():
    """Expected losses of a frozen right and left factor, by the number of examples."""
    m, n, r, noise = 32, 32, 4, 0.1
    k1, k2, k3 = jr.split(jr.key(9), 3)
    teacher = orthonormal(k1, m, r) @ orthonormal(k2, n, r).T * 2
    covariance = jnp.diag(jnp.logspace(0, -2, n))
    factors = jax.vmap(lambda key: orthonormal(key, n, r))(jr.split(k3, 64))
    before = flows.student_loss(jnp.zeros((m, n)), teacher, covariance)
    rows = []
    for samples in (8, 16, 32, 64, 256, jnp.inf):
        errors = jax.vmap(
            lambda f, samples=samples: flows.frozen_factor_errors(
                LowRank(f, f), teacher, covariance, noise, samples
            )
        )(factors)
        shares = [float(jnp.mean(x) / before) for x in errors]
        rows.append(
            {
                "examples": samples if samples < jnp.inf else "all",
                "right frozen": shares[0],
                # Fewer examples than inputs: any error.
                "left frozen": shares[1] if np.isfinite(shares[1]) else "none",
            }
        )
    off = abs(rows[-1]["left frozen"] - (1 - r / m))
    return rows, [bound("mean loss of a frozen left factor off 1 − r/m", off, at_most=0.02)]


def forgetting():
    """LoRA by rank, and full fine-tuning stopped where it has learnt as much."""
    n = 16
    k1, k2, k3, k4 = jr.split(jr.key(10), 4)
    u, v = orthonormal(k1, n, n), orthonormal(k2, n, n)
    change = (u * jnp.exp(-0.3 * jnp.arange(n))[None]) @ v.T
    root = matrix(k3, (n, n))
    old = root @ root.T + 0.1 * jnp.eye(n)
    ranks = flows.forgetting_by_rank(change, jnp.eye(n), old)
    left = ranks.target[:-1] / ranks.target[0]
    stopped = flows.forgetting_in_time(-jnp.log(left) / 2, change, jnp.eye(n), old)
    start, worst, rows = lowrank.gaussian_init((n, n), 4, 0.1, key=k4), 0.0, []
    end = gradient_flow(
        flows.student_loss, start, change, jnp.eye(n), t1=100.0, rtol=1e-8
    ).params
    for loss, want in (
        (flows.student_loss(end, change, jnp.eye(n)), ranks.target[4]),
        (flows.student_loss(end, 0 * change, old), ranks.source[4]),
    ):
        worst = max(worst, float(jnp.abs(loss / want - 1)))
    for rank in (0, 1, 2, 4, 8, 15):
        rows.append(
            {
                "rank": rank,
                "loss on the new task": float(ranks.target[rank]),
                "on the old task": float(ranks.source[rank]),
                "stopped early, as good on the new": float(stopped.source[rank]),
            }
        )
    claim = "LoRA by gradient flow off the curve of learning and forgetting"
    return rows, [bound(claim, worst, at_most=1e-6)]


PARTS = (
    expressive_power,
    bures_wasserstein,
    student,
    regimes,
    stages,
    frozen,
    forgetting,
)

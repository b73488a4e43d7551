"""LoRA matrix factorization as a gradient flow, against its exact solution."""

import pathlib
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import jax.random as jr

from .. import flows, metrics
from ..flows import gradient_flow
from ..linalg import orthonormalize
from ..lowrank import LowRank
from .report import Check, Report


SIGMA = (3.0, 2.0, 1.0)  # singular values of the target
TOLERANCE = 1e-10
BOUND = 1e-8
# The left and the right factor of a mode at the start. Their product is the same in the
# first two; LoRA's own start has a left factor of zero.
STARTS = {
    "balanced": (0.01, 0.01),
    "imbalanced": (0.0001, 1.0),
    "LoRA (left = 0)": (0.0, 2.0),
}


def run(out: pathlib.Path, quick: bool) -> Report:
    """Integrate three starts in one batch, compare with the closed form, draw both."""
    with _float64():
        shape, points = ((24, 16), 120) if quick else ((64, 48), 240)
        left, right = (jnp.array(x) for x in zip(*STARTS.values(), strict=True))
        solution, exact = jax.jit(_compare, static_argnums=(2, 3))(
            left, right, shape, points
        )
        ts = solution.ts[0]
        error = jnp.max(solution.observed["error"], axis=1)
        drift = jnp.max(solution.observed["drift"], axis=1)
        rates = [_rates(c) for c in left**2 - right**2]
        figure = _draw(out, ts, solution.observed, exact, rates)
        rows = tuple(
            {
                "start": name,
                "imbalance": float(left[k] ** 2 - right[k] ** 2),
                "99 % learnt at": float(_learnt(ts, exact[k])),
                "rate of the slowest mode": float(rates[k][-1]),
                "steps": int(solution.stats.steps[k]),
                "largest error": float(error[k]),
                "drift of the balance": float(drift[k]),
            }
            for k, name in enumerate(STARTS)
        )
        checks = (
            Check("gradient flow against its closed form", float(error.max()), BOUND),
            Check("drift of the conserved balance", float(drift.max()), BOUND),
        )
    return Report(
        "flow: LoRA's gradient flow against its exact solution", rows, checks, (figure,)
    )


@contextmanager
def _float64() -> Iterator[None]:
    before = jnp.result_type(float) == jnp.float64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def _compare(left, right, shape, points):
    """One flow for each start, observed on a grid of times, and the exact modes."""
    ts = jnp.linspace(0, 8, points)
    sigma = jnp.array(SIGMA)
    u, v = (
        orthonormalize(jr.normal(jr.key(seed), (size, len(SIGMA))))
        for seed, size in enumerate(shape)
    )
    target = _matrix(u, sigma, v)

    def member(left, right):
        left, right = left * jnp.ones_like(sigma), right * jnp.ones_like(sigma)
        start = LowRank(u * left[None], v * right[None])

        def observe(state):
            x = state.params
            b, a = flows.aligned_modes(state.t, left, right, sigma)
            return {
                "loss": state.loss,
                "modes": jnp.sum((u.T @ x.left) * (v.T @ x.right), axis=1),
                "error": jnp.max(jnp.abs(x.materialize() - _matrix(u, b * a, v))),
                "drift": metrics.balance_drift(x, start),
            }

        options = {"rtol": TOLERANCE, "atol": TOLERANCE, "observe": observe}
        solution = gradient_flow(_loss, start, target, t1=ts[-1], ts=ts, **options)
        b, a = flows.aligned_modes(ts, left, right, sigma)
        return solution, b * a

    return jax.vmap(member)(left, right)


def _matrix(u, values, v):
    return (u * values[None]) @ v.T


def _loss(x, target):
    return 0.5 * jnp.sum((target - x.materialize()) ** 2)


def _rates(imbalance) -> jax.Array:
    """The exponential rate at which each mode approaches its singular value."""
    return jnp.sqrt(4 * jnp.array(SIGMA) ** 2 + imbalance**2)


def _learnt(ts, modes) -> jax.Array:
    done = jnp.all(modes >= 0.99 * jnp.array(SIGMA)[None], axis=1)
    return ts[jnp.argmax(done)]


def _draw(out: pathlib.Path, ts, observed, exact, rates) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 5.6), sharex=True, sharey="row")
    colors = ["#1b6ca8", "#e07a1f", "#3a8f4d"]
    some = slice(None, None, max(1, len(ts) // 24))
    for k, name in enumerate(STARTS):
        top, bottom = axes[:, k]
        for i, sigma in enumerate(SIGMA):
            top.plot(ts, observed["modes"][k, :, i], color=colors[i], lw=2)
            top.plot(ts[some], exact[k, some, i], "o", color=colors[i], mfc="white", ms=4)
            top.axhline(sigma, color=colors[i], lw=0.6, ls=":")
        top.set_title(name)
        loss = observed["loss"][k]
        bottom.semilogy(ts, jnp.maximum(loss, 1e-17), color="black", lw=2)
        at = int(jnp.argmax(loss < 1e-5 * loss[0]))
        law = loss[at] * jnp.exp(-2 * rates[k][-1] * (ts - ts[at]))
        bottom.semilogy(ts[at:], law[at:], color="crimson", ls="--", lw=1.2)
        bottom.set_ylim(1e-17, 30)
        bottom.set_xlabel("time")
    axes[0, 0].set_ylabel("singular values")
    axes[1, 0].set_ylabel("loss")
    axes[0, 0].plot([], [], color="grey", lw=2, label="gradient_flow")
    axes[0, 0].plot([], [], "o", color="grey", mfc="white", ms=4, label="closed form")
    axes[0, 0].legend(frameon=False, loc="center right", fontsize=9)
    axes[1, 0].plot([], [], color="crimson", ls="--", label="predicted rate")
    axes[1, 0].legend(frameon=False, loc="lower left", fontsize=9)
    figure.suptitle("The more imbalanced the factors, the faster the flow")
    figure.tight_layout()
    path = out / "flow.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path.name

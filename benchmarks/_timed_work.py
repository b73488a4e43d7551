"""Fits, sweeps and adapters on the device of this process, beside those of others."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import _pca_problem
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from _harness import interleaved, medians, timed

import lrjax


REPEATS = 20
MEMBERS, PROBLEM_RANK, STEPS = 32, 4, 120
LAYERS, ADAPTER_RANK = 30, 16


def robust_pca(size: int) -> dict:
    """Our fit of a matrix that came as a whole."""
    clean, observed = _pca_problem.make(size)
    matrix, fit = jax.device_put(observed), jax.jit(lrjax.fit_robust_pca)
    first = timed(lambda: fit(matrix))
    seconds = [timed(lambda: fit(matrix)) for _ in range(5)]
    found = fit(matrix)
    low_rank = jax.jit(lambda fit: fit.low_rank.materialize())(found)
    return {
        "size": size,
        "method": "lrjax",
        "seconds": statistics.median(seconds),
        "steps": int(found.steps),
        "residual": float(found.residual),
        "error": _pca_problem.relative_error(jax.device_get(low_rank), clean),
        "first call": first,
    }


def torch_pca(sizes: list[int], limit: float) -> list[dict]:
    """The fits of PyTorch, in another process; those that are done in time."""
    script = Path(__file__).parent / "_torch_pca.py"
    process = subprocess.Popen(
        [sys.executable, script, *map(str, sizes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if not rows:
        last = (errors.strip().splitlines() or ["it gave nothing in time"])[-1]
        raise RuntimeError(f"PyTorch is not measured: {last}")
    return rows


def sweep(size: int) -> dict:
    """Members of a sweep over one dense operator, over one member and over a loop."""
    key = jr.key(0)
    count = 8 * size * PROBLEM_RANK

    @jax.jit
    def setting(key):
        problem = lrjax.matrix_sensing(
            key, (size, size), PROBLEM_RANK, count, outlier_fraction=0.1, condition=10.0
        )
        return problem, lrjax.spectral_init(problem, PROBLEM_RANK, key=key, trim=0.1)

    problem, start = setting(key)

    def descend(problem, start, first_step, decay):
        tx = lrjax.scaled_subgradient(lambda count: first_step * decay**count)
        found = lrjax.solve(problem, tx, start, steps=STEPS)
        return problem.relative_error(found.x)

    steps, decays = jnp.geomspace(0.01, 1.0, MEMBERS), jnp.full(MEMBERS, 0.95)
    one = jax.jit(descend)
    every = jax.jit(jax.vmap(descend, (None, None, 0, 0)))
    seconds = interleaved(
        {
            "one": lambda: one(problem, start, steps[0], decays[0]),
            "every": lambda: every(problem, start, steps, decays),
        },
        REPEATS // 2,
    )
    middle = medians(seconds)
    return {
        "matrix": f"{size} x {size}, {count} measurements",
        "members": MEMBERS,
        "one ms": 1e3 * middle["one"],
        "all ms": 1e3 * middle["every"],
        "all over one": middle["every"] / middle["one"],
    }


class Stack(eqx.Module):
    """Layers of a residual network, stacked and scanned."""

    layers: eqx.nn.Linear

    def __init__(self, width: int, dtype, key: jax.Array):
        layer = lambda key: eqx.nn.Linear(width, width, dtype=dtype, key=key)
        self.layers = eqx.filter_vmap(layer)(jr.split(key, LAYERS))

    def __call__(self, x):
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def step(x, arrays):
            return x + jnp.tanh(jax.vmap(eqx.combine(arrays, static))(x)), None

        return jax.lax.scan(step, x, arrays)[0]


def lora(width: int, tokens: int, dtype) -> dict:
    """Gradients of adapters of a scanned model, beside those of the model and by hand."""
    key = jr.key(0)
    model = eqx.filter_jit(lambda key: Stack(width, dtype, key))(key)
    adapt = lambda model, key: lrjax.adapt(model, lrjax.LoRA(rank=ADAPTER_RANK), key=key)
    adapters = eqx.filter_jit(adapt)(model, key)
    params, frozen = lrjax.partition(adapters)
    arrays, static = eqx.partition(model, eqx.is_array)
    x = jr.normal(key, (tokens, width), dtype)
    loss = lambda y: jnp.mean(jnp.square(y.astype(jnp.float32) - 1.0))

    def adapted(params, arrays, frozen, x):
        model = lrjax.bind(eqx.combine(arrays, static), eqx.combine(params, frozen))
        return loss(model(x))

    def full(arrays, x):
        return loss(eqx.combine(arrays, static)(x))

    def by_hand(pairs, arrays, x):
        def step(x, layer):
            weight, bias, a, b = layer
            return x + jnp.tanh(x @ weight.T + bias + (x @ a.T) @ b.T), None

        layers = arrays.layers
        return loss(jax.lax.scan(step, x, (layers.weight, layers.bias, *pairs))[0])

    thin = (LAYERS, ADAPTER_RANK, width)
    pairs = jr.normal(key, thin, dtype), jnp.zeros((LAYERS, width, ADAPTER_RANK), dtype)
    gradients = [jax.jit(jax.value_and_grad(f)) for f in (adapted, full, by_hand)]
    forward = jax.jit(full)
    seconds = interleaved(
        {
            "adapted": lambda: gradients[0](params, arrays, frozen, x),
            "full": lambda: gradients[1](arrays, x),
            "by hand": lambda: gradients[2](pairs, arrays, x),
            "forward": lambda: forward(arrays, x),
        },
        REPEATS,
    )
    middle = medians(seconds)
    flops = 4 * LAYERS * tokens * width**2  # forward, and the gradient of activations
    return {
        "model": f"{LAYERS} scanned layers {width} x {width}, {tokens} tokens",
        "dtype": jnp.dtype(dtype).name,
        "forward ms": 1e3 * middle["forward"],
        "full gradient ms": 1e3 * middle["full"],
        "adapters' gradient ms": 1e3 * middle["adapted"],
        "adapters over full": middle["adapted"] / middle["full"],
        "adapters over by hand": middle["adapted"] / middle["by hand"],
        "Tflop a second of the dense products": flops / middle["adapted"] / 1e12,
    }

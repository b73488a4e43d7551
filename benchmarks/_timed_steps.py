"""Steps of optimizers on a model of stacked layers: milliseconds, bytes and kernels.

A state is not made by the optimizer, whose first step may refresh every basis, but filled
with random numbers in the shapes that it has, some steps into a run.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from _hlo import read

import lrjax


NEVER = 10**6  # no refresh of a basis while it is measured
WARM, LONGEST = 3, 4.0  # steps before the first that counts; seconds of all that do
COPIED = 2**28  # numbers in the array whose copy tells the speed of the memory


class Sizes(NamedTuple):
    """Of a model: stacked matrices ``(width, width)`` and ``(width, hidden)``."""

    layers: int
    width: int
    hidden: int
    rank: int
    repeats: int
    copied: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The leaves, stacked by layer."""
        square, wide = (self.width, self.width), (self.width, self.hidden)
        return {"square": (self.layers, *square), "wide": (self.layers, *wide)}

    def apart(self, layers: int) -> dict[str, tuple[int, ...]]:
        """The leaves of some of the layers, each by itself."""
        return {
            f"{name} {i}": shape[1:]
            for name, shape in self.shapes().items()
            for i in range(layers)
        }


LARGE = Sizes(16, 2048, 5504, 256, 24, COPIED)
SMALL = Sizes(2, 32, 48, 8, 3, 2**16)


def matrices(shapes: dict[str, tuple[int, ...]]):
    """The weights of these shapes."""
    return {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in shapes.items()}


def factors(shapes: dict[str, tuple[int, ...]], rank: int):
    """The same weights as pairs of factors."""

    def make():
        return {
            k: lrjax.LowRank(jnp.zeros((*batch, m, rank)), jnp.zeros((*batch, n, rank)))
            for k, (*batch, m, n) in shapes.items()
        }

    return jax.eval_shape(make)


def under_way(shapes, key: jax.Array):
    """Arrays of these shapes, as they are some steps into a run."""

    def fill(key):
        paths, structure = jax.tree.flatten_with_path(shapes)
        made = [_leaf(path, x, jr.fold_in(key, i)) for i, (path, x) in enumerate(paths)]
        return structure.unflatten(made)

    return jax.jit(fill)(key)


def _leaf(path: tuple, x: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return (0.01 * jnp.abs(jr.normal(key, x.shape))).astype(x.dtype)
    # No refresh is due at the count of one, nor waits for a gradient.
    counts = getattr(path[-1], "name", None) == "count"
    return jnp.full(x.shape, int(counts), x.dtype)


class Measured(NamedTuple):
    """Of one optimizer on one model."""

    seconds: list[float]
    least_bytes: int  # what no step of it can avoid: all arrays, once each way
    kernels: int
    branch_kernels: int
    peak: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(tx: optax.GradientTransformation, params, repeats: int) -> Measured:
    """Compile and run the step: update and new parameters, in the memory of the old."""
    tx = optax.with_extra_args_support(tx)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, value=jnp.asarray(1.0), grad=grads)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    moved = 3 * nbytes(params) + 2 * nbytes(state)
    run, memory = read(program.as_text()), program.memory_analysis()
    params, state, grads = under_way((params, state, params), jr.key(0, impl="rbg"))
    seconds = []
    for i in range(WARM + repeats):
        start = time.perf_counter()
        params, state = jax.block_until_ready(program(params, state, grads))
        # A step that takes seconds needs no warm ones before it: it is compiled.
        if i >= WARM or time.perf_counter() - start > 1:
            seconds.append(time.perf_counter() - start)
        if sum(seconds) > LONGEST:
            break
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return Measured(seconds, moved, run.always.kernels, run.branches.kernels, peak)


def nbytes(tree) -> int:
    """Bytes of all arrays of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@functools.cache
def bandwidth(copied: int) -> float:
    """Bytes a second of the memory, measured by a pass over an array in place."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x, seconds = jnp.zeros(copied), []
    for _ in range(13):
        start = time.perf_counter()
        x = jax.block_until_ready(add(x))
        seconds.append(time.perf_counter() - start)
    return 2 * x.nbytes / statistics.median(seconds[WARM:])


def row(name: str, model: str, found: Measured, adam: Measured, speed: float) -> dict:
    """The figures of one optimizer."""
    least = found.least_bytes / speed
    return {
        "optimizer": name,
        "model": model,
        "median ms": 1e3 * found.median,
        "over adam": found.median / adam.median,
        "slowest over median": max(found.seconds) / found.median,
        "least ms of its bytes": 1e3 * least,
        "share of the memory's speed": least / found.median,
        "kernels": found.kernels,
        "branch kernels": found.branch_kernels,
        "peak MB": found.peak / 1e6,
    }


def optimizers(sizes: Sizes) -> dict[str, Callable[[], optax.GradientTransformation]]:
    """On the stacked model, the most important first; no basis is refreshed."""
    rank, of = sizes.rank, lrjax.recipes
    axes = optax.contrib.MuonDimensionNumbers(1, 2)
    every_axis = lambda params: jax.tree.map(lambda _: axes, params)
    fixed = {"refresh_every": NEVER}
    return {
        "subspace_adam": lambda: of.subspace_adam(1e-3, rank),
        "galore": lambda: of.galore(1e-3, rank, **fixed),
        "optax muon": lambda: optax.contrib.muon(
            1e-3, muon_weight_dimension_numbers=every_axis
        ),
        "dion": lambda: of.dion(1e-3, rank),
        "fira": lambda: of.fira(1e-3, rank, **fixed),
        "apollo": lambda: of.apollo(1e-3, rank, **fixed),
        "subspace_adam, products at highest": lambda: of.subspace_adam(
            1e-3, rank, precision="highest"
        ),
        "subspace_adam, products in bfloat16": lambda: of.subspace_adam(
            1e-3, rank, precision="BF16_BF16_F32"
        ),
        "soap, short side": lambda: of.soap(1e-3, side="short", **fixed),
        "normuon": lambda: of.normuon(1e-3),
        "galore, products at highest": lambda: of.galore(
            1e-3, rank, precision="highest", **fixed
        ),
        "mofasgd": lambda: of.mofasgd(1e-3, rank),
        "ldadam": lambda: of.ldadam(1e-3, rank),
        "power_sgd": lambda: of.power_sgd(1e-3, rank),
        "subspace_adam, four times the rank": lambda: of.subspace_adam(1e-3, 4 * rank),
        "psgd_kron": lambda: of.psgd_kron(1e-3),
    }


def of_pairs() -> dict[str, Callable[[], optax.GradientTransformation]]:
    """On factors of the model."""
    of = lrjax.recipes
    return {
        "lora_muon": lambda: of.lora_muon(1e-3),
        "scaled_gd": lambda: of.scaled_gd(1e-3),
        "loro": lambda: of.loro(1e-3),
        "opsa": lambda: of.opsa(1e-3),
    }


def refreshing(sizes: Sizes) -> dict[str, Callable[[int], optax.GradientTransformation]]:
    """By how often they refresh their bases, on the leaves of one layer."""
    rank = sizes.rank
    return {
        "optax galore": lambda every: optax.contrib.galore(
            1e-3, rank, update_proj_gap=every
        ),
        "galore": lambda every: lrjax.galore(1e-3, rank, refresh_every=every),
        "galore, randomized": lambda every: lrjax.galore(
            1e-3, rank, refresh_every=every, method="randomized"
        ),
        "soap": lambda every: lrjax.soap(1e-3, refresh_every=every),
        "coap": lambda every: lrjax.coap(1e-3, rank, refresh_every=every),
    }


def stall(make: Callable[[int], optax.GradientTransformation], sizes: Sizes) -> dict:
    """A step that refreshes every basis over one that refreshes none."""
    params = matrices(sizes.apart(1))
    usual, full = (measure(make(every), params, sizes.repeats) for every in (NEVER, 1))
    return {
        "model": "the leaves of one layer",
        "usual ms": 1e3 * usual.median,
        "refresh ms": 1e3 * full.median,
        "refresh over usual": full.median / usual.median,
    }

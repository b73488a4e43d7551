import time
from pathlib import Path

import jax
import numpy as np

import lrjax

from .report import Check, Report


TITLE = "sweep: step size × decay of a robust sensing problem, 32 runs in one program"
SIZE, RANK, STEPS = 40, 4, 120


def descend(problem, start, *, first_step, decay):
    """The scaled subgradient method with a geometric step: two numbers to tune."""
    tx = lrjax.scaled_subgradient(lambda count: first_step * decay**count)
    solution = lrjax.solve(problem, tx, start, steps=STEPS)
    return problem.relative_error(solution.x)


def setting():
    """The problem and the start that all members share, and the grid."""
    key = jax.random.key(0)
    problem = lrjax.matrix_sensing(
        key, (SIZE, SIZE), RANK, 8 * SIZE * RANK, outlier_fraction=0.1, condition=10.0
    )
    start = lrjax.spectral_init(problem, RANK, key=key, trim=0.1)
    size = float(lrjax.norm(start))
    grid = {
        "first_step": size * np.geomspace(0.01, 1.0, 8).astype(np.float32),
        "decay": np.array([0.85, 0.90, 0.95, 0.98], np.float32),
    }
    return problem, start, grid


def contestants(problem, start, grid):
    """The vmapped sweep and the warm Python loop, as functions without arguments."""

    def vectorized():
        return lrjax.sweep(descend, grid, problem, start, progress=False)

    one = jax.jit(
        lambda problem, start, a, b: descend(problem, start, first_step=a, decay=b)
    )

    def loop():
        points = [(a, b) for a in grid["first_step"] for b in grid["decay"]]
        errors = [one(problem, start, a, b).block_until_ready() for a, b in points]
        return np.array(errors).reshape(8, 4)

    return vectorized, loop


def run(out: Path, quick: bool) -> Report:
    """One vmapped program against the warm Python loop over the same 32 members."""
    problem, start, grid = setting()
    vectorized, loop = contestants(problem, start, grid)
    results, looped = vectorized(), loop()  # compiles both
    contest = {"vmapped sweep": vectorized, "warm Python loop": loop}
    times = {name: [] for name in contest}
    for _ in range(1 if quick else 3):
        for name, function in contest.items():
            begin = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - begin)
    seconds = {name: float(np.median(values)) for name, values in times.items()}
    errors = results["result"]
    solved = int((errors < 1e-4).sum())
    _plot(errors, float(lrjax.norm(start)), out / "sweep.png")
    # Runs that do not converge are chaotic: rounding alone moves where they end.
    both = (errors.values < 1e-4) == (looped < 1e-4)
    return Report(
        title=TITLE,
        rows=tuple(
            {"run as": name, "seconds": own, "speed-up": seconds["warm Python loop"] / own}
            for name, own in seconds.items()
        ),
        checks=(
            Check("members that solve the problem (of 32)", solved, 4, at_most=False),
            Check("members that end otherwise than in the loop", int((~both).sum()), 0),
        ),
        figures=("sweep.png",),
    )


def _plot(errors, size: float, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    image = axes.imshow(np.log10(np.maximum(errors.values, 1e-8)), cmap="viridis_r")
    axes.set_xticks(range(4), [f"{d:.2f}" for d in errors["decay"].values])
    steps = [f"{s / size:.2g}" for s in errors["first_step"].values]
    axes.set_yticks(range(8), steps)
    axes.set_xlabel("decay of the step, per iteration")
    axes.set_ylabel("first step, relative to the start")
    axes.set_title(f"relative error after {STEPS} iterations", fontsize=10)
    axes.set_aspect("auto")
    figure.colorbar(image, label="log10")
    figure.savefig(path, dpi=120)
    plt.close(figure)

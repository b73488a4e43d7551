"""When is SubspaceTracker better than fit.update on rows that come in order, and when not?

A subspace of dimension 3 of 100 numbers moves steadily, into directions that are ever new;
a twentieth of the entries is grossly wrong and a tenth missing. The first 100 rows are
fitted, 400 more come to the tracker one by one, and to ``update``, at twice the width, in
batches: what each returns as clean rows is compared with the truth. The same of the
surveillance clip, whose errors are the pedestrians: background against the temporal median.
It needs ``--data DIRECTORY`` or the variable LRJAX_DATA, as recovery_video; without it that
row is left out. Times are processor time, warm.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import _harness
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import lrjax
from lrjax import recovery


N, RANK, FIRST, LATER, BATCH = 100, 3, 100, 400, 50
ANGLES = (0.0, 0.003, 0.01, 0.03)  # radians a row
FORGET = 0.95
DRAWS = 3
CLIP, CLIP_FIRST, CLIP_BATCH = "vtest_gray_144x192.npz", 98, 50

fit = jax.jit(lrjax.fit_robust_pca, static_argnames=("rank",))
update = jax.jit(recovery.RobustPCAFit.update)
track = jax.jit(recovery.SubspaceTracker.track, static_argnames=("batch",))


@jax.jit
def moving(key, angle):
    """Rows of a subspace that turns by about the angle from one row to the next."""
    keys = jr.split(key, 6)
    count = FIRST + LATER
    square = jr.normal(keys[0], (N, N))
    speed = (square - square.T) / (2 * N) ** 0.5
    basis = jnp.linalg.qr(jr.normal(keys[5], (N, RANK)))[0]

    def turn(basis, coordinates):
        row = basis @ coordinates
        return jnp.linalg.qr(basis + angle * speed @ basis)[0], row

    clean = jax.lax.scan(turn, basis, jr.normal(keys[1], (count, RANK)))[1]
    size = 3 * jnp.max(jnp.abs(clean))
    errors = jr.uniform(keys[2], clean.shape, minval=-size, maxval=size)
    dirty = clean + jnp.where(jr.bernoulli(keys[3], 0.05, clean.shape), errors, 0)
    return clean, jnp.where(jr.bernoulli(keys[4], 0.1, clean.shape), jnp.nan, dirty)


def timed(function):
    begin = time.process_time()
    result = jax.block_until_ready(function())
    return time.process_time() - begin, result


def by_tracker(first, rows, rank, batch):
    tracker = recovery.SubspaceTracker.from_fit(first, rank=rank, forget=FORGET)
    return track(tracker, rows, batch=batch)[1].clean


def by_update(first, rows, batch):
    clean, seen = [], first
    for start in range(0, len(rows), batch):
        seen = update(seen, rows[start : start + batch])
        clean.append(seen.low_rank.materialize())
    return jnp.concatenate(clean)


def relative(x, y):
    return float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))


def synthetic(rows):
    for angle in ANGLES:
        errors, seconds = {"tracker": [], "update": []}, {"tracker": [], "update": []}
        for draw in range(DRAWS):
            clean, dirty = moving(jr.key(draw), angle)
            first = fit(dirty[:FIRST], rank=2 * RANK)
            later = dirty[FIRST:]
            methods = {
                "tracker": lambda f=first, x=later: by_tracker(f, x, RANK, 1),
                "update": lambda f=first, x=later: by_update(f, x, BATCH),
            }
            for name, method in methods.items():
                jax.block_until_ready(method())
                spent, found = timed(method)
                errors[name].append(relative(found, clean[FIRST:]))
                seconds[name].append(spent)
        row = {"case": f"{angle} radians a row"}
        for name in errors:
            row[f"{name}: error"] = statistics.median(errors[name])
            row[f"{name}: microseconds a row"] = (
                1e6 * statistics.median(seconds[name]) / LATER
            )
        rows.append(row)
        print(row, flush=True)


def surveillance(rows, path):
    clip = np.load(path)["frames"]
    frames = jnp.asarray(clip.reshape(len(clip), -1), jnp.float32) / 255
    median = jnp.median(frames, axis=0)
    first = jax.jit(lambda x: lrjax.fit_robust_pca(x, rank=RANK, tol=1e-3))(
        frames[:CLIP_FIRST]
    )
    later = frames[CLIP_FIRST:]
    row = {"case": "clip"}
    methods = {
        "tracker": lambda: by_tracker(first, later, RANK, 1),
        "update": lambda: by_update(first, later, CLIP_BATCH),
    }
    for name, method in methods.items():
        jax.block_until_ready(method())
        spent, found = timed(method)
        row[f"{name}: error"] = float(jnp.sqrt(jnp.mean((found - median) ** 2)))
        row[f"{name}: microseconds a row"] = 1e6 * spent / len(later)
    rows.append(row)
    print(row, flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default=os.environ.get("LRJAX_DATA"))
    path = Path(parser.parse_args().data or ".") / CLIP
    rows = []
    synthetic(rows)
    if path.exists():
        surveillance(rows, path)
    else:
        print(f"left out: no {path}; pass --data DIRECTORY")
    still, turning = rows[0], rows[len(ANGLES) - 2]
    bounds = [
        _harness.bound("tracker: error, at rest", still["tracker: error"], at_most=1e-2),
        _harness.bound(
            f"tracker: error over that of update, {turning['case']}",
            turning["tracker: error"] / turning["update: error"],
            at_most=0.5,
        ),
    ]
    if rows[-1]["case"] == "clip":
        bounds.append(
            _harness.bound(
                "clip, tracker: background to temporal median, RMS",
                rows[-1]["tracker: error"],
                at_most=0.02,
            )
        )
    _harness.write_results("recovery_tracker", rows, bounds)


if __name__ == "__main__":
    main()

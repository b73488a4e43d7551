"""A sweep over two processes that are killed, and go on where they were."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray

import lrjax


WORKER = """
import os
import sys

import jax
import numpy as np

rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
killed = sys.argv[4] == "True"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)

import jax.numpy as jnp
import jax.random as jr

import lrjax

ran = []


def count(size, step, seed):
    if killed and rank == 0 and seed == 3 and step > 0.15:
        os._exit(9)
    ran.append((int(size), round(10 * step), int(seed)))
    return np.float32(0)


def run(data, model, key, factor, parts, *, size, step, seed):
    number = jax.ShapeDtypeStruct((), jnp.float32)
    zero = jax.pure_callback(count, number, size, step, seed, vmap_method="sequential")
    noise = jr.normal(jr.fold_in(key, seed), (size,)) + parts.sum()
    return {"x": data * step + model["act"](noise).sum() * factor + zero, "seed_of": seed}


grid = {"step": [0.1, 0.2], "seed": range(5)}
mesh = jax.make_mesh((4,), ("members",))
# On one device of each process, and spread over those of all.
data = jax.device_put(jnp.arange(3.0), jax.local_devices()[0])
parts = jax.device_put(np.ones(4), jax.NamedSharding(mesh, jax.P("members")))
shared = (data, {"act": jnp.tanh}, jr.key(7), 2.0, parts)
options = {"static": {"size": [2, 3]}, "mesh": mesh, "batch_size": 4}
out = lrjax.sweep(run, grid, *shared, save_to=f"{folder}/sweep.zarr", **options)
np.savez(f"{folder}/{rank}.npz", x=out["x"], seed_of=out["seed_of"], ran=ran)
again = lrjax.sweep(run, grid, *shared, progress=False, **options)
np.testing.assert_array_equal(again["x"], out["x"])
other = grid | {"step": [0.1, 0.3]}
try:
    lrjax.sweep(run, other, *shared, save_to=f"{folder}/sweep.zarr", **options)
except ValueError as error:
    assert "over another grid" in str(error)
else:
    raise AssertionError("a store of another grid was taken")
"""


def start(folder: Path, killed: bool):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(lrjax.__file__).parents[1]
    arguments = [str(port), str(folder), str(killed)]
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), *arguments],
            env=os.environ | {"PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.slow
def test_two_processes_are_killed_and_go_on(tmp_path):
    first = start(tmp_path, killed=True)
    try:
        assert first[0].wait(timeout=120) == 9
    finally:
        for process in first:
            process.kill()
            process.communicate()
    finished = xarray.open_zarr(tmp_path / "sweep.zarr", chunks=None)["finished"].load()
    assert finished.values.reshape(2, -1).sum(axis=1).tolist() == [8, 0]

    second = start(tmp_path, killed=False)
    try:
        reports = [process.communicate(timeout=200)[0] for process in second]
    finally:
        for process in second:
            process.kill()
    for process, report in zip(second, reports, strict=True):
        assert process.returncode == 0, report
    assert "20/20" in reports[0]
    assert "20/20" not in reports[1]  # one progress bar

    each = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    np.testing.assert_array_equal(each[0]["x"], each[1]["x"])
    stored = xarray.open_zarr(tmp_path / "sweep.zarr", chunks=None)
    np.testing.assert_array_equal(stored["x"], each[0]["x"])
    np.testing.assert_array_equal(each[0]["seed_of"][:, :, 3], 3)
    assert bool(stored["finished"].all())
    assert bool(np.isfinite(stored["x"]).all())
    ran = {tuple(member) for part in each for member in part["ran"]}
    assert ran == {(2, 2, 3), (2, 2, 4)} | {
        (3, step, seed) for step in (1, 2) for seed in range(5)
    }
    assert len(each[0]["ran"]) == len(each[1]["ran"])

"""How fast do steps, fits, sweeps and adapters run on the accelerator of this machine?

Steps of optimizers on a model of sixteen stacked layers beside Adam's, and beside the time
that moving their bytes takes at the speed of a copy; what a step takes that refreshes its
bases; robust PCA beside PyTorch's; members of a sweep beside one; gradients of adapters
beside those of the model; then every program of ``accelerators`` beside a step of Adam.

    python benchmarks/accelerator_times.py --seconds 300 --out results.json

measures the most important first, writes after each one, and stops at the limit. What
fails is a row that says why. ``--small`` tries all of it at sizes of no meaning.
"""

import argparse
import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path


# Room for the libraries of PyTorch, whose process shares the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".70")

import _programs
import _timed_steps as steps
import _timed_work as work
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from _harness import (
    RESULTS,
    bound,
    interleaved,
    median_ratio,
    medians,
    store,
)


Rows = dict | list[dict]
LAST = 3.0  # seconds that the end of the script may take


class Recorder:
    """What was measured, written to a file after each measurement.

    Args:
        path: of the file, or None to write nothing.
        seconds: after which nothing more is measured.
        device: that which is measured.
    """

    def __init__(self, path: Path | None, seconds: float, device: jax.Device):
        self.path, self.deadline = path, time.monotonic() + seconds
        self.device = device
        self.rows: list[dict] = []
        self.late: list[str] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic() - LAST

    def measure(self, name: str, function: Callable[[], Rows]) -> None:
        """Call a function, and keep the rows that it returns or why it has none."""
        if self.left <= 0:
            self.late.append(name)
            return
        start = time.monotonic()
        try:
            found = function()
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
        found = found if isinstance(found, list) else [found]
        peak = {"device peak MB so far": self.device_peak() / 1e6}
        self.rows += [{"measured": name, **row, **peak} for row in found]
        print(f"{time.monotonic() - start:5.1f} s  {name}: {found}", flush=True)
        jax.clear_caches()
        self.write()

    def device_peak(self) -> int:
        """The most bytes that this process has had on the device; 0 if it does not say."""
        return (self.device.memory_stats() or {}).get("peak_bytes_in_use", 0)

    def write(self) -> None:
        """Store what there is."""
        if self.path is not None:
            rows = [*self.rows, *({"measured": n, "late": True} for n in self.late)]
            store(self.path, rows, bounds(self.rows), "torch")

    def stop(self) -> None:
        """End the process at the deadline, whatever it waits for."""

        def end():
            print("the time is over in the middle of a measurement", flush=True)
            os._exit(1)

        timer = threading.Timer(self.deadline - time.monotonic(), end)
        timer.daemon = True
        timer.start()


def bounds(rows: list[dict]) -> list[dict]:
    """What has to hold, of what was measured."""
    failed = sum("failed" in row for row in rows)
    held = [bound("measurements that fail", failed, at_most=0)]
    for row in rows:
        if row.get("optimizer") == "subspace_adam":
            claim = "a step of subspace_adam over Adam's"
            held.append(bound(claim, row["over adam"], at_most=2))
        if "all over one" in row:
            claim = f"{row['members']} members of a sweep over one, {row['matrix']}"
            held.append(bound(claim, row["all over one"], at_most=4))
        if "adapters over by hand" in row:
            claim = f"gradient of adapters over that by hand, {row['dtype']}"
            held.append(bound(claim, row["adapters over by hand"], at_most=1.1))
    return held + _against_torch(rows)


def _against_torch(rows: list[dict]) -> list[dict]:
    """The fastest of its fits that found the low-rank part as well as ours, over ours."""
    fits = [row for row in rows if row.get("error") is not None]
    held = []
    for ours in (row for row in fits if row["method"] == "lrjax"):
        as_good = [
            row["seconds"]
            for row in fits
            if row["size"] == ours["size"]
            and row["method"] != "lrjax"
            and row["error"] <= 10 * ours["error"]
        ]
        if as_good:
            claim = f"robust PCA of {ours['size']}²: PyTorch over lrjax"
            held.append(bound(claim, min(as_good) / ours["seconds"], at_least=1))
    return held


class Beside:
    """Measures optimizers on one model, beside a step of Adam on it.

    Args:
        record: where the rows go.
        sizes: of the model.
        params: its parameters.
        model: what it is called.
    """

    def __init__(self, record: Recorder, sizes: steps.Sizes, params, model: str):
        self.record, self.sizes, self.params, self.model = record, sizes, params, model

    @functools.cached_property
    def adam(self) -> steps.Measured:
        """Measured once."""
        return steps.measure(optax.adam(1e-3), self.params, self.sizes.repeats)

    def row(self, name: str, found: steps.Measured) -> dict:
        """The figures of one optimizer."""
        speed = steps.bandwidth(self.sizes.copied)
        return steps.row(name, self.model, found, self.adam, speed)

    def measure(self, makers: dict[str, Callable], names: Iterable[str]) -> None:
        """Some of these optimizers; Adam first."""
        if "adam" not in vars(self):
            self.record.measure(f"Adam, {self.model}", lambda: self.row("adam", self.adam))
        for name in names:
            self.record.measure(f"{name}, {self.model}", lambda n=name: self.one(n, makers))

    def one(self, name: str, makers: dict[str, Callable]) -> dict:
        """The row of one of them."""
        found = steps.measure(makers[name](), self.params, self.sizes.repeats)
        return self.row(name, found)


def measure_programs(record: Recorder, device: jax.Device) -> None:
    """Milliseconds of each program on one device, and how many steps of Adam that is."""
    programs = _programs.programs()
    adam = ready(programs["adam"], device)
    for name, program in programs.items():
        if program.specs is None:
            record.measure(name, lambda p=program: _over_adam(p, adam, device))


def _over_adam(program: _programs.Program, adam: Callable, device: jax.Device) -> dict:
    seconds = interleaved({"adam": adam, "this": ready(program, device)}, work.REPEATS)
    return {
        "milliseconds": 1e3 * medians(seconds)["this"],
        "over adam's program": median_ratio(seconds, "this", "adam"),
    }


def ready(program: _programs.Program, device: jax.Device) -> Callable[[], object]:
    """The program with its arguments on a device, which are kept: nothing is donated."""
    with jax.default_device(device):
        arguments = jax.device_put(jax.jit(program.arguments)(jr.key(0)), device)
    compiled = jax.jit(program.function).lower(*arguments).compile()
    return lambda: compiled(*arguments)


def measure_all(record: Recorder, device: jax.Device, small: bool) -> None:
    """Everything, the most important first."""
    sizes = steps.SMALL if small else steps.LARGE
    pca = [64, 80] if small else [1000, 4000, 8000]
    width, tokens = (16, 32) if small else (2048, 4096)
    speed = lambda: {"bytes a second of a copy": steps.bandwidth(sizes.copied)}
    record.measure("memory", speed)
    shapes, rank = sizes.shapes(), max(sizes.rank // 16, 2)
    name = f"{sizes.layers} layers of {sizes.width} and {sizes.hidden}"
    dense, of_dense = steps.matrices(shapes), steps.optimizers(sizes)
    model = Beside(record, sizes, dense, f"{name}, rank {sizes.rank}")
    thin, of_pairs = steps.factors(shapes, rank), steps.of_pairs()
    pairs = Beside(record, sizes, thin, f"{name} in factors of rank {rank}")
    order = list(of_dense)

    model.measure(of_dense, order[:3])
    for size in pca[:2]:
        record.measure("robust PCA", lambda size=size: work.robust_pca(size))
    record.measure("sweep", lambda: work.sweep(12 if small else 100))
    record.measure("adapters", lambda: work.lora(width, tokens, jnp.float32))
    measure_stalls(record, sizes, ("optax galore", "galore, randomized"))
    for size in pca[2:]:
        record.measure("robust PCA", lambda size=size: work.robust_pca(size))
    record.measure("robust PCA", lambda: work.torch_pca(pca, min(record.left, 80.0)))
    model.measure(of_dense, order[3:9])
    pairs.measure(of_pairs, of_pairs)
    record.measure("adapters", lambda: work.lora(width, tokens, jnp.bfloat16))
    measure_stalls(record, sizes, ("galore", "soap", "coap"))
    model.measure(of_dense, order[9:])
    measure_programs(record, device)


def measure_stalls(record: Recorder, sizes: steps.Sizes, names: Iterable[str]) -> None:
    """Steps that refresh, beside those that do not."""
    makers = steps.refreshing(sizes)
    for name in names:
        record.measure(
            f"refresh of {name}", lambda name=name: steps.stall(makers[name], sizes)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="file for the results")
    parser.add_argument("--seconds", type=float, default=600.0, help="limit of time")
    parser.add_argument("--small", action="store_true", help="a trial: stores nothing")
    parser.add_argument("--platform", default="gpu", help="gpu, tpu or cpu")
    given = parser.parse_args()
    try:
        device = jax.devices(given.platform)[0]
    except RuntimeError as error:
        print(f"nothing is measured: {error}")
        return
    stored = None if given.small else RESULTS / "accelerator_times.json"
    record = Recorder(given.out or stored, given.seconds, device)
    record.stop()
    with jax.default_device(device), contextlib.suppress(KeyboardInterrupt):
        measure_all(record, device, given.small)
    record.write()
    for item in bounds(record.rows):
        print(
            f"{'ok    ' if item['ok'] else 'MISSED'} {item['claim']}: {item['value']:.4g}"
        )
    print(f"not measured for lack of time: {', '.join(record.late) or 'nothing'}")


if __name__ == "__main__":
    main()

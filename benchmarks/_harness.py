"""What every benchmark shares: interleaved timing, compiled cost, and the results file."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax


RESULTS = Path(__file__).parent / "results"


def timed(
    function: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of one call, waiting for its result."""
    start = clock()
    jax.block_until_ready(function())
    return clock() - start


def interleaved(
    functions: dict[str, Callable[[], object]],
    repeats: int = 20,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each function, one after the other in turn, after one warm-up call.

    Turn by turn, so that a busy minute of the machine slows all of them alike. With
    ``time.process_time`` they are seconds of processors, which others' work hardly moves.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(timed(function, clock))
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The median of each list of seconds."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def median_ratio(seconds: dict[str, list[float]], over: str, under: str) -> float:
    """The median of the ratios of neighbouring runs, robust to a machine that drifts."""
    pairs = zip(seconds[over], seconds[under], strict=True)
    return statistics.median(a / b for a, b in pairs)


def compiled_cost(function: Callable, *args) -> dict[str, float]:
    """Flops, temporary bytes and seconds of processor time to compile, from XLA."""
    # A new function each time, or the cache answers.
    lowered = jax.jit(lambda *a: function(*a)).lower(*args)
    start = time.process_time()
    compiled = lowered.compile()
    seconds = time.process_time() - start
    return {
        "flops": compiled.cost_analysis()["flops"],
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_seconds": seconds,
    }


def bound(claim: str, value: float, *, at_most=None, at_least=None) -> dict:
    """One declared bound and whether the measured value keeps it."""
    limit, kind = (at_most, "at most") if at_least is None else (at_least, "at least")
    ok = value <= limit if kind == "at most" else value >= limit
    return {"claim": claim, "value": float(value), kind: limit, "ok": bool(ok)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(*packages: str) -> dict:
    """The device, the versions and the commit that the figures belong to."""
    names = ("jax", "jaxlib", "optax", "equinox", "diffrax", "numpy", *packages)
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    if shutil.which("git") is None:
        return ""
    return subprocess.run(
        command, capture_output=True, text=True, check=False
    ).stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def store(path: Path, rows: list[dict], bounds: list[dict], *packages: str) -> None:
    """Write the figures to a file."""
    result = {"environment": environment(*packages), "rows": rows, "bounds": bounds}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def write_results(name: str, rows: list[dict], bounds: list[dict], *packages: str) -> None:
    """Print and store the figures; exit with status 1 if a declared bound is broken."""
    store(RESULTS / f"{name}.json", rows, bounds, *packages)
    for row in rows:
        print("  ".join(f"{key}={_short(value)}" for key, value in row.items()))
    for item in bounds:
        kind = "at most" if "at most" in item else "at least"
        verdict = "ok    " if item["ok"] else "MISSED"
        print(f"{verdict} {item['claim']}: {_short(item['value'])} ({kind} {item[kind]})")
    sys.exit(0 if all(item["ok"] for item in bounds) else 1)


def _short(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value

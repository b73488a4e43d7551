"""What do the programs do that XLA makes for TPU and GPU, and what do they cost to compile?

Every recipe's train step, fits, adapters, and sharded updates, compiled for one or eight
TPU v5e and H100 without the hardware: kernels that a step starts, conditionals, bytes that
collectives send, memory, code, and processor seconds of the compilation. A loop counts as
often as it turns; conditionals apart, with their longest branch. The size of the code is
known for the TPU alone. Nothing runs.

``python benchmarks/accelerators.py`` measures what changed, on the compilers that are
installed (``pip install 'lrjax[accelerators]'``); with words, only the programs that have
them in their names, and keeps what is known of the others. ``--lower`` lowers the budgets
that were beaten, in tests/accelerators/budgets.json. To raise one, delete its line first.
"""

import json
import os
import sys

import jax


jax.config.update("jax_platforms", "cpu")

import _budgets  # noqa: E402
import _programs  # noqa: E402
import _targets  # noqa: E402
from _harness import RESULTS, bound, write_results  # noqa: E402
from _worker import Worker  # noqa: E402


COMPILERS = ("libtpu", "jax-cuda12-pjrt")
# Processor seconds of compilations for a TPU: of a program over another, at most.
RATIOS = (
    ("subspace_adam at 2048", "adam at 2048", 5),
    ("orthogonalize_updates", "optax muon", 3),
)


def measure(target: str, names: list[str]) -> dict[str, dict]:
    """What is found of each program for a kind of device, printed as it comes."""
    worker, measured = Worker(target), {}
    for name in names:
        measured[name] = worker.measure(name)
        print(f"{target} {name}: {_line(measured[name])}", flush=True)
    worker.close()
    return measured


def _line(found: dict) -> str:
    if "failed" in found:
        return f"FAILED, {found['failed']}"
    return ", ".join(
        f"{key} {value:,}" for key, value in _budgets.amounts(found).items() if value
    )


def row(target: str, name: str, found: dict) -> dict:
    """The amounts in the units in which they are read."""
    place = {"target": target, "program": name}
    if "failed" in found:
        return {**place, "failed": found["failed"]}
    taken = _budgets.amounts(found)
    counts = ("kernels", "branch_kernels", "conditionals", "open_loops")
    kilobytes = ("sent", "branch_sent")
    megabytes = ("argument_bytes", "temporary_bytes", "code_bytes")
    return {
        **place,
        **{name: taken[name] for name in counts},
        **{f"{name} kB": taken[name] / 1e3 for name in kilobytes},
        **{f"{name.removesuffix('_bytes')} MB": taken[name] / 1e6 for name in megabytes},
        "traffic MB": found["traffic"] / 1e6,
        "Mflop": {kind: n / 1e6 for kind, n in found["flops"].items()},
        "compile_seconds": taken["compile_seconds"],
    }


def bounds(rows: list[dict]) -> list[dict]:
    """What has to hold of the programs, from the rows alone."""
    failed = [
        bound(
            f"{target}: programs that do not compile",
            sum("failed" in row for row in rows if row["target"] == target),
            at_most=0,
        )
        for target in _targets.COMPILERS
    ]
    seconds = {
        row["program"]: row["compile_seconds"]
        for row in rows
        if row["target"] == "v5e" and "failed" not in row
    }
    ratios = [
        bound(
            f"v5e: compilation of {one} over {other}",
            seconds[one] / seconds[other],
            at_most=most,
        )
        for one, other, most in RATIOS
        if {one, other} <= {*seconds}
    ]
    return failed + ratios


def lower(target: str, measured: dict[str, dict]) -> None:
    """Lower the budgets of one kind of device where they were beaten."""
    budgets, names = _budgets.load(), list(_programs.programs())
    own = budgets.get(target, {})
    new = _budgets.lower(own, measured, _targets.versions(target), names)
    _budgets.save({**budgets, target: new})
    for name, found in measured.items():
        budget = new["programs"].get(name)
        if budget != own.get("programs", {}).get(name):
            print(f"{target} {name}: a new budget")
        for sentence in _budgets.exceeded(budget or {}, found):
            print(f"{target} {name}: {sentence}")


def with_stored(rows: list[dict], stored: list[dict]) -> list[dict]:
    """What was measured, and of all other programs that there are what was known."""
    place = lambda row: (row["target"], row["program"])
    known = {place(row): row for row in (*stored, *rows)}
    order = [(t, name) for t in _targets.COMPILERS for name in _programs.programs()]
    return [known[at] for at in order if at in known]


def _stored() -> list[dict]:
    path = RESULTS / "accelerators.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    names = [n for n in _programs.programs() if not words or any(w in n for w in words)]
    rows = []
    for target in _targets.COMPILERS:
        if absent := _targets.missing(target):
            print(absent)
            continue
        measured = measure(target, names)
        rows += [row(target, name, found) for name, found in measured.items()]
        if "--lower" in sys.argv:
            lower(target, measured)
    print(f"{sum(os.times()[:4]):.0f} processor seconds")
    if rows:
        rows = with_stored(rows, _stored())
        write_results("accelerators", rows, bounds(rows), *COMPILERS)


if __name__ == "__main__":
    main()

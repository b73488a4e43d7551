"""``python -m lrjax`` as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lrjax.__main__ import PARTS, main
from lrjax._tour.report import Check, Report
from lrjax._tour.show import print_environment, print_report


# The tour on a machine where everything takes hours, and each thing less than the one
# before it: whatever is measured second looks faster.
SLOW_MACHINE = """
import itertools, runpy, time
ticks = itertools.count()
time.perf_counter = lambda: (n := next(ticks)) * (1e6 - n)
runpy.run_module("lrjax", run_name="__main__", alter_sys=True)
"""


def tour_on_a_slow_machine(*arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("XLA_FLAGS")}
    return subprocess.run(
        [sys.executable, "-c", SLOW_MACHINE, *arguments],
        capture_output=True,
        encoding="utf-8",
        check=False,
        env=environment | {"COLUMNS": "80", "PYTHONIOENCODING": "utf-8"},
    )


def assert_fits(printed):
    """Nothing is wider than 80 columns or cut, but for paths and commands to copy."""
    lines = [line.rstrip() for line in printed.splitlines()]
    copied = ("picture:", "skipped:", "all numbers:")
    assert not [x for x in lines if len(x) > 80 and not x.startswith(copied)]
    assert "…" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_part_keeps_its_bounds_on_a_slow_machine(part, tmp_path):
    done = tour_on_a_slow_machine("--quick", "--only", part, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_fits(done.stdout)
    result = json.loads((tmp_path / "tour.json").read_text())
    report = result["parts"][part]
    if report["skipped"]:
        assert "--no-deps" in report["skipped"]
        return
    assert report["seconds"] > 1e4, "the slow clock was not read"
    assert report["rows"]
    assert report["checks"]
    assert all(check["ok"] for check in report["checks"])
    words = done.stdout.split()
    for heading in report["rows"][0]:
        assert set(heading.split()) <= set(words)
    for check in report["checks"]:
        assert check["claim"] in done.stdout
    for figure in report["figures"]:
        assert (tmp_path / figure).stat().st_size > 5_000


def test_a_wide_table_is_printed_whole_in_80_columns(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    row = {
        "start": "LoRA (left = 0)",
        "imbalance": -4.0,
        "99 % learnt at": 1.0708,
        "rate of the slowest mode": 4.4721,
        "steps": 870_000,
        "ms a step": 4863.2,
        "drift of the balance": 3.6721e-09,
    }
    check = Check("merged against bound embeddings, relative", 3.5821e-07, 1e-05)
    print_report(Report("wide", (row,), (check,), ("a.png",)), 12.34, tmp_path)
    print_environment(
        {"device": "cpu (cpu) x 1"} | {f"package{i}": "1.0" for i in range(9)}
    )
    printed = capsys.readouterr().out
    assert_fits(printed)
    words = printed.split()
    for heading in row:
        assert set(heading.split()) <= set(words)
    shown = ("LoRA (left = 0)", "-4", "1.07", "4.47", "870,000", "4,863", "3.67e-09")
    assert all(text in printed for text in shown)
    assert "merged against bound embeddings, relative" in printed
    assert "3.58e-07  at most 1e-05" in printed
    assert "12.3 s" in printed
    assert all(f"package{i} 1.0" in printed for i in range(9))


def test_a_missed_bound_is_the_exit_status(tmp_path, monkeypatch):
    import lrjax._tour.sweep as part

    nan = Check("a number that is not one", float("nan"), 1.0)
    monkeypatch.setattr(part, "run", lambda out, quick: Report("t", checks=(nan,)))
    assert main(["--only", "sweep", "--out", str(tmp_path)]) == 1
    fine = Check("a number", 0.5, 1.0)
    monkeypatch.setattr(part, "run", lambda out, quick: Report("t", checks=(fine,)))
    assert main(["--only", "sweep", "--out", str(tmp_path)]) == 0


def test_a_part_that_breaks_is_reported_and_the_rest_runs(tmp_path, monkeypatch, capsys):
    import lrjax._tour.flow as good
    import lrjax._tour.sweep as bad

    def broken(out, quick):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(bad, "run", broken)
    monkeypatch.setattr(good, "run", lambda out, quick: Report("the other part"))
    assert main(["--only", "sweep", "--only", "flow", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "on purpose" in printed.err
    assert "the other part" in printed.out


def test_wrong_part_names_the_parts(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "nothing"])
    assert "recover" in capsys.readouterr().err


def test_missing_extras_are_named(monkeypatch, capsys, tmp_path):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["--out", str(Path(tmp_path))]) == 1
    assert "lrjax[tour]" in capsys.readouterr().err

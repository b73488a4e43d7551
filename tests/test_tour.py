"""``python -m lrjax`` as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lrjax.__main__ import PARTS, main


def tour(*arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("XLA_FLAGS")}
    return subprocess.run(
        [sys.executable, "-m", "lrjax", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_part_keeps_its_bounds(part, tmp_path):
    done = tour("--quick", "--only", part, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "tour.json").read_text())
    report = result["parts"][part]
    if report["skipped"]:
        assert "--no-deps" in report["skipped"]
        return
    assert report["rows"]
    assert report["checks"]
    assert all(check["ok"] for check in report["checks"])
    for figure in report["figures"]:
        assert (tmp_path / figure).stat().st_size > 5_000


def test_a_missed_bound_is_the_exit_status(tmp_path, monkeypatch):
    import lrjax._tour.sweep as part
    from lrjax._tour.report import Check, Report

    nan = Check("a number that is not one", float("nan"), 1.0)
    monkeypatch.setattr(part, "run", lambda out, quick: Report("t", checks=(nan,)))
    assert main(["--only", "sweep", "--out", str(tmp_path)]) == 1
    fine = Check("a number", 0.5, 1.0)
    monkeypatch.setattr(part, "run", lambda out, quick: Report("t", checks=(fine,)))
    assert main(["--only", "sweep", "--out", str(tmp_path)]) == 0


def test_a_part_that_breaks_is_reported_and_the_rest_runs(tmp_path, monkeypatch, capsys):
    import lrjax._tour.flow as good
    import lrjax._tour.sweep as bad
    from lrjax._tour.report import Report

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

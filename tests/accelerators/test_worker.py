"""The process that compiles: what it answers, and what is said when it ends or hangs."""

import json
import sys

import _worker
import jax
import pytest


@pytest.fixture(autouse=True)
def measured(tmp_path, monkeypatch):
    monkeypatch.setattr(_worker, "MEASURED", tmp_path / "measured")
    (tmp_path / "measured").mkdir()
    return tmp_path / "measured"


def worker(script, **settings):
    """A worker that runs a script instead of a compiler."""
    found = _worker.Worker("v5e", **settings)
    found.command = [sys.executable, "-c", script]
    return found


def test_a_program_is_measured_once(measured):
    ask = lambda anew: _worker.answer("scaled_gd", anew, jax.devices(), {"jax": "this"})
    found = ask(False)
    assert found["kernels"] > 0
    assert found["argument_bytes"] > 0
    (kept,) = measured.glob("*.json")
    kept.write_text(json.dumps({"kernels": -1}))
    assert ask(False) == {"kernels": -1}
    assert ask(True)["kernels"] == found["kernels"]
    _worker.answer("scaled_gd", False, jax.devices(), {"jax": "another"})
    assert len([*measured.glob("*.json")]) == 2


def test_a_program_for_eight_devices_lies_on_all_of_them():
    found = _worker.answer("adam by rows", False, jax.devices(), {})
    assert found["sent"] == {}
    whole = 4 * 256 * 128  # parameters, gradients and two moments, and the count
    assert found["argument_bytes"] == 4 * whole / 8 + 4


def test_what_goes_wrong_is_said_in_one_line():
    found = _worker.answer("nothing", False, jax.devices(), {})
    assert found == {"failed": "KeyError: 'nothing'"}


ECHO = """
import json, sys
for line in sys.stdin:
    print(json.dumps({"got": json.loads(line)}), flush=True)
"""


def test_a_worker_answers_line_by_line():
    one = worker(ECHO)
    assert one.measure("first") == {"got": ["first", False]}
    process = one.process
    assert one.measure("second", anew=True) == {"got": ["second", True]}
    assert one.process is process
    one.close()
    assert process.returncode is not None


def test_a_compiler_that_ends_is_reported_and_started_again(measured):
    script = "import sys; sys.stdin.readline(); sys.exit('out of luck')"
    one = worker(script)
    ended = "the compiler ended with status 1: out of luck"
    assert one.measure("first") == {"failed": ended}
    one.command = [sys.executable, "-c", ECHO]
    assert one.measure("second") == {"got": ["second", False]}
    one.close()
    assert not [*measured.iterdir()]


def test_a_compiler_that_hangs_is_ended():
    one = worker("import time; time.sleep(60)", limit=0.2)
    assert one.measure("first") == {"failed": "no end after 0.2 s"}
    assert one.process is None

"""The programs run, on the processor where there is no accelerator, and are timed."""

import accelerator_times
import jax


def test_programs_are_timed_on_a_device():
    device = jax.devices("cpu")[1]
    names = ["scaled_gd", "polar muon"]
    rows = accelerator_times.measure(device, names, repeats=2)
    assert [row["program"] for row in rows] == names
    assert all(row["milliseconds"] > 0 and row["over adam"] > 0 for row in rows)


def test_arguments_lie_on_the_device_and_are_kept():
    device = jax.devices("cpu")[1]
    program = accelerator_times._programs.programs()["adam"]
    step = accelerator_times._ready(program, device)
    first, second = step(), step()
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert one.devices() == {device}
        assert (one == other).all()


def test_what_does_not_run_is_listed(monkeypatch):
    def broken(*_):
        raise ValueError("too large")

    programs = accelerator_times._programs.programs()
    programs["broken"] = accelerator_times._programs.Program(broken, lambda key: ())
    monkeypatch.setattr(accelerator_times._programs, "programs", lambda: programs)
    (row,) = accelerator_times.measure(jax.devices("cpu")[0], ["broken"], repeats=1)
    assert row == {"program": "broken", "failed": "ValueError: too large"}

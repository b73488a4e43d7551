"""What the benchmark says of the programs that were compiled."""

import accelerators
import pytest


FOUND = {
    **dict.fromkeys(("kernels", "branch_kernels", "conditionals", "open_loops"), 3),
    **dict.fromkeys(("argument_bytes", "temporary_bytes", "code_bytes", "traffic"), 5e6),
    "sent": {"all-reduce": 2000, "all-gather": 500},
    "branch_sent": {},
    "flops": {"f32 highest": 7e6},
    "compile_seconds": 1.5,
}


def test_a_row_has_units():
    row = accelerators.row("v5e", "step", FOUND)
    assert row["target"] == "v5e"
    assert row["kernels"] == row["open_loops"] == 3
    assert row["sent kB"] == 2.5
    assert row["temporary MB"] == row["traffic MB"] == 5
    assert row["Mflop"] == {"f32 highest": 7}
    failed = accelerators.row("h100", "step", {"failed": "why"})
    assert failed == {"target": "h100", "program": "step", "failed": "why"}


def test_what_was_not_measured_stays_as_it_was():
    named = lambda target, name, **more: {"target": target, "program": name, **more}
    stored = [
        named("v5e", "adam", kernels=1),
        named("v5e", "muon", kernels=2),
        named("v5e", "gone", kernels=3),
    ]
    rows = accelerators.with_stored(
        [named("h100", "adam", kernels=4), named("v5e", "muon", kernels=5)], stored
    )
    assert [(row["target"], row["program"], row["kernels"]) for row in rows] == [
        ("v5e", "adam", 1),
        ("v5e", "muon", 5),
        ("h100", "adam", 4),
    ]


def test_failures_and_ratios_are_bounds():
    named = lambda name, seconds: accelerators.row(
        "v5e", name, {**FOUND, "compile_seconds": seconds}
    )
    rows = [
        named("adam at 2048", 2.0),
        named("subspace_adam at 2048", 11.0),
        accelerators.row("h100", "adam at 2048", {"failed": "why"}),
    ]
    v5e, h100, ratio = accelerators.bounds(rows)
    assert (v5e["value"], v5e["ok"]) == (0, True)
    assert (h100["value"], h100["ok"]) == (1, False)
    assert ratio["value"] == pytest.approx(5.5)
    assert not ratio["ok"]

"""What is timed on an accelerator runs, on the processor where there is none."""

import json

import _programs
import _timed_steps as steps
import accelerator_times
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

import lrjax


@pytest.fixture
def record(tmp_path):
    return accelerator_times.Recorder(tmp_path / "times.json", 60, jax.devices("cpu")[1])


def test_arguments_lie_on_the_device_and_are_kept():
    device = jax.devices("cpu")[1]
    step = accelerator_times.ready(_programs.programs()["adam"], device)
    first, second = step(), step()
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert one.devices() == {device}
        assert (one == other).all()


def test_a_program_that_does_not_run_is_listed(record, monkeypatch):
    def broken(*_):
        raise ValueError("too large\nand more")

    programs = {name: _programs.programs()[name] for name in ("adam", "scaled_gd")}
    programs["broken"] = _programs.Program(broken, lambda key: ())
    monkeypatch.setattr(_programs, "programs", lambda: programs)
    accelerator_times.measure_programs(record, record.device)
    adam, scaled, failed = json.loads(record.path.read_text())["rows"]
    assert adam["milliseconds"] > 0
    assert scaled["over adam's program"] > 0
    assert failed["failed"] == "ValueError: too large"
    first, *_ = accelerator_times.bounds(record.rows)
    assert first["value"] == 1
    assert not first["ok"]


def test_nothing_starts_after_the_limit(record):
    record.deadline -= 60
    record.measure("sweep", lambda: pytest.fail("it started"))
    record.write()
    assert json.loads(record.path.read_text())["rows"] == [
        {"measured": "sweep", "late": True}
    ]


def test_a_state_under_way_refreshes_no_basis():
    tx = lrjax.galore(1e-3, 2, refresh_every=steps.NEVER)
    params = steps.matrices({"w": (3, 6, 8)})
    start = jax.eval_shape(tx.init, params)
    params, state = steps.under_way((params, start), jr.key(0))
    assert jax.tree.structure(state) == jax.tree.structure(start)
    assert state[0].count == state[0].inner.count == 1
    _, after = jax.jit(tx.update)(params, state, params)
    for new, old in zip(
        *map(jax.tree.leaves, (after[0].basis, state[0].basis)), strict=True
    ):
        assert (new == old).all()
    assert jnp.all(state[0].inner.nu["w"] > 0)


def test_a_step_is_measured():
    params = steps.factors({"w": (8, 6)}, 2)
    found = steps.measure(optax.adam(1e-3), params, repeats=2)
    assert len(found.seconds) == 2
    # The gradient is read; parameters, two moments and the count are read and written.
    assert found.least_bytes == 7 * 4 * (8 + 6) * 2 + 8
    assert found.kernels > 0
    row = steps.row("adam", "a pair", found, found, speed=1e9)
    assert row["over adam"] == 1
    assert row["share of the memory's speed"] == pytest.approx(
        found.least_bytes / 1e9 / found.median
    )


def test_only_fits_as_good_as_ours_are_compared():
    fit = lambda method, seconds, error: {
        **{"measured": "robust PCA", "size": 9, "method": method},
        **{"seconds": seconds, "error": error},
    }
    rows = [fit("lrjax", 2.0, 1e-6), fit("full", 8.0, 2e-6), fit("randomized", 1.0, 1e-3)]
    held = accelerator_times.bounds(rows)
    assert [item["value"] for item in held[1:]] == [4.0]

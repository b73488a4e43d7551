"""Sweeps that are written as they go, and go on where they were."""

import importlib

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import xarray

import lrjax


GRID = {"step": [0.1, 0.2, 0.3], "start": [0.0, 1.0, 2.0, 3.0]}
ZIP = {"step": np.linspace(0.1, 1.0, 12), "start": np.arange(12.0)}
STATIC = {"rank": [4, 8, 4, 8, 8, 4, 4, 4, 8, 8, 4, 8]}


class Counted:
    """A run that counts its members, and fails as a program where it is told to."""

    def __init__(self, fails_at=None):
        self.fails_at = fails_at
        self.members = []

    def _count(self, step, start, rank):
        if (np.float32(step), start) == self.fails_at:
            raise RuntimeError("killed")
        self.members.append((float(step), float(start), int(rank)))
        return np.float32(0)

    def __call__(self, *, step, start, rank=1):
        zero = jax.pure_callback(
            self._count,
            jax.ShapeDtypeStruct((), jnp.float32),
            step,
            start,
            rank,
            vmap_method="sequential",
        )
        return {
            "path": step * jnp.arange(rank, dtype=jnp.float32).sum() + start * jnp.ones(3),
            "sign": start > 1.5,
            "half": (start + zero).astype(jnp.bfloat16),
            "count": jnp.asarray(start, jnp.int32),
            "complex": step + 1j * start,
        }


SWEEPS = {
    "product": (GRID, {}),
    "zip": (ZIP, {"over": "zip"}),
    "static product": (GRID, {"static": {"rank": [4, 8]}}),
    "static zip": (ZIP, {"over": "zip", "static": STATIC}),
}


KEYS = jax.vmap(jr.key)
KILLED = pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="killed")


@pytest.mark.slow_but("as before-product")
@pytest.mark.parametrize("name", SWEEPS)
@pytest.mark.parametrize("later", ["as before", "other chunks", "a mesh"])
def test_what_was_finished_does_not_run_again(tmp_path, name, later):
    grid, options = SWEEPS[name]
    options = {"progress": False} | options
    want = lrjax.sweep(Counted(), grid, **options)
    path = tmp_path / "sweep.zarr"
    last = (np.float32(grid["step"][-1]), grid["start"][-1])
    with KILLED:
        lrjax.sweep(Counted(last), grid, batch_size=5, save_to=path, **options)
    part = xarray.open_zarr(path, chunks=None)
    finished = part["finished"]
    assert 0 < finished.sum() < finished.size
    for result in ("path", "half"):  # NaN where nothing is, what will be there elsewhere
        xarray.testing.assert_equal(part[result], want[result].where(finished))
    others = {
        "as before": {"batch_size": 5},
        "other chunks": {"batch_size": 7},
        "a mesh": {"mesh": jax.make_mesh((8,), ("members",))},
    }
    rest = Counted()
    got = lrjax.sweep(rest, grid, save_to=path, **options, **others[later])
    xarray.testing.assert_identical(got, want)
    assert len(set(rest.members)) == finished.size - int(finished.sum())
    none = Counted()
    again = lrjax.sweep(none, grid, save_to=path, **options)
    assert not none.members
    xarray.testing.assert_identical(again, want)
    stored = xarray.open_zarr(path, chunks=None)
    assert bool(stored["finished"].all())
    xarray.testing.assert_equal(stored.drop_vars("finished").load(), want)


def test_a_failed_chunk_names_its_points():
    with KILLED as caught:
        lrjax.sweep(Counted((np.float32(0.2), 1.0)), GRID, batch_size=5, progress=False)
    note = caught.value.__notes__[-1]
    # The chunk is that of the places 5 to 9: it starts with the point that fails.
    assert "step=0.2, start=1.0; step=0.2, start=2.0; step=0.2, start=3.0" in note
    assert "and 2 more" in note


def test_it_names_static_values_and_keys_by_their_labels():
    last = float(jr.uniform(jr.key(2)))

    def run(*, key, width):
        fail = jax.pure_callback(
            lambda x: 1 / 0 if width == 8 and x == last else np.float32(x),
            jax.ShapeDtypeStruct((), jnp.float32),
            jr.uniform(key),
            vmap_method="sequential",
        )
        return fail + jnp.zeros(width).sum()

    with pytest.raises(Exception, match="division by zero") as caught:
        lrjax.sweep(
            run,
            {"key": KEYS(jnp.arange(3))},
            static={"width": [4, 8]},
            batch_size=2,
            progress=False,
        )
    assert "a chunk with width=8, key=2." in caught.value.__notes__[-1]


def save(path, grid=GRID, run=None, **options):
    return lrjax.sweep(run or Counted(), grid, save_to=path, progress=False, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"grid": GRID | {"step": [0.1, 0.2, 0.4]}}, r"'step' has .*0\.3\].*0\.4\]"),
        ({}, {"grid": GRID | {"start": range(4)}}, r"'start' .*float32.*int32"),
        ({}, {"grid": {"step": GRID["step"]} | {"start": [0.0]}}, "'start' has"),
        ({"grid": ZIP, "over": "zip"}, {"grid": ZIP}, r"dimensions \['member'\]"),
        ({}, {"static": {"rank": [4, 8]}}, r"\['start', 'step'\]"),
        (
            {"static": {"rank": [4, 8]}},
            {"static": {"rank": [4, 16]}},
            r"'rank' has .*\[4 8\].*\[ 4 16\]",
        ),
        (
            {"grid": {"key": [0, 1]}, "run": lambda key: jr.normal(jr.key(key))},
            {"grid": {"key": KEYS(jnp.arange(2))}, "run": jr.normal},
            "'key' has",
        ),
        (
            {"grid": {"key": KEYS(jnp.arange(2))}, "run": jr.normal},
            {"grid": {"key": KEYS(jnp.arange(1, 3))}, "run": jr.normal},
            "'key' has",
        ),
        (
            {"run": lambda step, start: step * start},
            {"run": lambda step, start: step * jnp.ones(3)},
            r"other results: .*\(3, 4\).* and here .*\(3, 4, 3\)",
        ),
        ({}, {"run": lambda step, start: {"finished": step}}, "cannot be saved"),
        ({}, {"run": lambda step, start: {"a/b": step}}, "with '/' is a folder"),
    ],
)
def test_a_store_of_another_sweep_is_refused_and_left_alone(
    tmp_path, first, second, message
):
    path = tmp_path / "sweep.zarr"
    save(path, **first)
    before = xarray.open_zarr(path, chunks=None).load()
    with pytest.raises(ValueError, match=message):
        save(path, **second)
    xarray.testing.assert_identical(xarray.open_zarr(path, chunks=None).load(), before)


def test_what_no_sweep_has_written_is_left_alone(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="no Zarr store"):
        save(tmp_path / "notes")
    with pytest.raises(ValueError, match="no Zarr store"):
        save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]
    mine = xarray.Dataset({"x": ("step", np.arange(3.0))})
    mine.to_zarr(tmp_path / "mine", zarr_format=2, consolidated=True)
    with pytest.raises(ValueError, match="no store that a sweep has written"):
        save(tmp_path / "mine")


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    real = importlib.import_module

    def without_zarr(name):
        if name == "zarr":
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr("importlib.import_module", without_zarr)
    with pytest.raises(ImportError, match=r"save_to needs zarr.*lrjax\[sweep\]"):
        save(tmp_path / "sweep.zarr")

"""The code of the README runs as it stands, and names only what exists."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import lrjax


README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture(scope="module")
def names():
    # The README's own first lines; pytest turns rank promotion into an error elsewhere.
    scope = {}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), scope)
    return scope


def test_quick_start_trains_every_member(names):
    losses = names["runs"]["losses"]
    assert losses.sizes == {"damping": 3, "learning_rate": 2, "losses_0": 100}
    assert (losses[:, :, -1] < losses[:, :, 0]).all()


def test_quick_start_merges_to_the_same_function(names):
    adapters = names["eqx"].combine(names["best"]["params"], names["frozen"])
    bound = lrjax.bind(names["model"], adapters)
    x = names["x"]
    np.testing.assert_allclose(
        jax.vmap(names["merged"])(x), jax.vmap(bound)(x), rtol=1e-4, atol=1e-5
    )
    assert type(names["merged"]) is type(names["model"])


def test_second_example_recovers(names):
    assert names["problem"].relative_error(names["solution"].x) < 1e-5


def test_third_example_separates(names):
    assert int(names["fit"].rank) == 3
    error = names["fit"].low_rank.materialize() - names["clean"]
    assert np.linalg.norm(error) < 1e-3 * np.linalg.norm(names["clean"])


def test_quick_start_is_short():
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) <= 36


def test_every_call_of_the_table_exists():
    table = TEXT.split("## I want to")[1].split("\n## ")[0]
    for name in re.findall(r"`([\w.]+)`", table):
        name = name.removeprefix("lrjax.")
        if name in (
            "inverse_gram",
            "orthonormalize",
            "polar",
            "truncated_svd",
            "principal_angles",
        ):
            name = f"linalg.{name}"
        value = lrjax
        for part in name.split("."):
            assert hasattr(value, part), name
            value = getattr(value, part)


def test_both_commands_are_there():
    assert "python -m pip install -e '.[tour]' && python -m lrjax" in TEXT
    assert "python -m pip install -e '.[test]' && python -m pytest" in TEXT

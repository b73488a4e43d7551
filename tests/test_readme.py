"""The code of the README and of the guide runs as it stands."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import lrjax


ROOT = Path(lrjax.__file__).parents[1]
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "guide.md"
TEXT = README.read_text()


def blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


def run(path):
    scope = {}
    for block in blocks(path):
        exec(compile(block, str(path), "exec"), scope)
    return scope


@pytest.fixture(scope="module")
def names():
    return run(README)


@pytest.mark.slow
def test_robust_pca_separates(names):
    assert int(names["fit"].rank) == 3
    error = names["fit"].low_rank.materialize() - names["clean"]
    assert np.linalg.norm(error) < 1e-5 * np.linalg.norm(names["clean"])


@pytest.mark.slow
def test_subspace_saves_memory(names):
    hidden = {"hidden": jax.ShapeDtypeStruct((512, 512), np.float32)}
    assert lrjax.metrics.memory_report(hidden, names["tx"]).ratio < 0.2


@pytest.mark.slow
def test_sweep_trains_every_member(names):
    losses = names["runs"]["losses"]
    assert losses.sizes == {"damping": 3, "learning_rate": 2, "losses_0": 100}
    assert (losses[:, :, -1] < losses[:, :, 0]).all()


def test_merged_model_is_the_same_function(names):
    adapters = names["eqx"].combine(names["best"]["params"], names["frozen"])
    bound = lrjax.bind(names["model"], adapters)
    x = names["x"]
    np.testing.assert_allclose(
        jax.vmap(names["merged"])(x), jax.vmap(bound)(x), rtol=1e-4, atol=1e-5
    )
    assert type(names["merged"]) is type(names["model"])


@pytest.mark.slow
def test_guide_recovers():
    names = run(GUIDE)
    assert names["problem"].relative_error(names["solution"].x) < 1e-5


def test_readme_is_short():
    assert len(TEXT.splitlines()) <= 150
    for block in blocks(README):
        assert len([line for line in block.splitlines() if line.strip()]) <= 36


def test_both_commands_are_there():
    assert "python -m pip install -e '.[tour]' && python -m lrjax" in TEXT
    assert "python -m pip install -e '.[test]' && python -m pytest" in TEXT

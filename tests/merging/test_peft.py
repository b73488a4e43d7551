"""Merges that PEFT made: ``benchmarks/merge_exchange.py`` wrote the file."""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import lrjax
from lrjax import merging
from tests.helpers import assert_close


THEIRS = dict(np.load(Path(__file__).parent / "peft_merges.npz"))
DENSITY = 0.5
RULES = {
    "cat": merging.weighted_sum,
    "svd": functools.partial(merging.weighted_sum, rank=2),
    "linear": merging.add_factors,
    "ties": functools.partial(merging.ties, density=DENSITY),
    "ties_frequency": functools.partial(merging.ties, density=DENSITY, by="frequency"),
    "magnitude_prune": lambda changes, weights: merging.add_factors(
        [merging.trim(change, DENSITY) for change in changes], weights
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_the_products_are_those_of_peft(name):
    changes = []
    for k in range(3):
        root = jnp.sqrt(THEIRS[f"scale_{k}"])
        left, right = THEIRS[f"left_{k}"], THEIRS[f"right_{k}"]
        changes.append(lrjax.LowRank(root * left, root * right))
    merged = RULES[name](changes, jnp.asarray(THEIRS["weights"], jnp.float32))
    assert_close(merged.materialize(), jnp.asarray(THEIRS[name]), rtol=2e-5)

"""Merges that PEFT knows as well, by its names: for the benchmark and for the tests."""

import functools

import jax
import jax.numpy as jnp

import lrjax
from lrjax import merging


DENSITY, SVD_RANK = 0.5, 2
RULES = {
    "cat": merging.weighted_sum,
    "svd": functools.partial(merging.weighted_sum, rank=SVD_RANK),
    "linear": merging.add_factors,
    "ties": functools.partial(merging.ties, density=DENSITY),
    "ties_frequency": functools.partial(merging.ties, density=DENSITY, by="frequency"),
    "magnitude_prune": lambda changes, weights: merging.add_factors(
        [merging.trim(change, DENSITY) for change in changes], weights
    ),
}


def merged(name: str, arrays: dict, count: int) -> jax.Array:
    """The product of ``left_k``, ``right_k`` and ``scale_k``, merged by ``weights``."""
    changes = []
    for k in range(count):
        root = jnp.sqrt(arrays[f"scale_{k}"])
        left, right = arrays[f"left_{k}"], arrays[f"right_{k}"]
        changes.append(lrjax.LowRank(root * left, root * right))
    weights = jnp.asarray(arrays["weights"], jnp.float32)
    return RULES[name](changes, weights).materialize()

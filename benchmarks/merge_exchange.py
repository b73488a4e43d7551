"""Do merges of adapters give what PEFT's ``add_weighted_adapter`` does?

``--fixtures`` writes the file that the tests read as well. Needs torch and peft, the extra
``peers``.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
from _harness import bound, write_results
from torch import nn

import lrjax
from lrjax import merging


FILE = Path(__file__).parents[1] / "tests" / "merging" / "peft_merges.npz"
OUT, IN, RANK, ALPHAS = 9, 7, 3, (6.0, 6.0, 6.0)
WEIGHTS = (0.7, -1.3, 0.5)
DENSITY = 0.5
# name: PEFT's settings, and the rule that is to give the same.
MERGES = {
    "cat": ({"combination_type": "cat"}, merging.weighted_sum),
    "svd": (
        {"combination_type": "svd", "svd_rank": 2},
        functools.partial(merging.weighted_sum, rank=2),
    ),
    "linear": ({"combination_type": "linear"}, merging.add_factors),
    "ties": (
        {"combination_type": "ties", "density": DENSITY},
        functools.partial(merging.ties, density=DENSITY),
    ),
    "ties_frequency": (
        {
            "combination_type": "ties",
            "density": DENSITY,
            "majority_sign_method": "frequency",
        },
        functools.partial(merging.ties, density=DENSITY, by="frequency"),
    ),
    "magnitude_prune": (
        {"combination_type": "magnitude_prune", "density": DENSITY},
        lambda changes, weights: merging.add_factors(
            [merging.trim(change, DENSITY) for change in changes], weights
        ),
    ),
}


def theirs() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Factors with their scale, and the products of what PEFT merges them to."""
    torch.manual_seed(0)
    names = [f"adapter_{k}" for k in range(len(ALPHAS))]
    config = lambda alpha: peft.LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["0"])
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(IN, OUT)), config(ALPHAS[0]), names[0]
    )
    for name, alpha in zip(names[1:], ALPHAS[1:], strict=True):
        model.add_adapter(name, config(alpha))
    layer = model.base_model.model[0]
    factors = {}
    with torch.no_grad():
        for k, (name, alpha) in enumerate(zip(names, ALPHAS, strict=True)):
            left, right = layer.lora_B[name].weight, layer.lora_A[name].weight
            left.normal_()
            right.normal_()
            factors |= {f"left_{k}": left.numpy(), f"right_{k}": right.numpy().T}
            factors[f"scale_{k}"] = np.float32(alpha / RANK)
        products = {}
        for name, (settings, _) in MERGES.items():
            model.add_weighted_adapter(names, list(WEIGHTS), name, **settings)
            products[name] = layer.get_delta_weight(name).numpy()
    return factors, products


def ours(factors: dict[str, np.ndarray], rule) -> jax.Array:
    """The product that a rule merges the factors to, as ``adapters.combine`` has them."""
    changes = []
    for k in range(len(ALPHAS)):
        root = jnp.sqrt(factors[f"scale_{k}"])
        left, right = factors[f"left_{k}"], factors[f"right_{k}"]
        changes.append(lrjax.LowRank(root * left, root * right))
    return rule(changes, jnp.array(WEIGHTS)).materialize()


def main():
    factors, products = theirs()
    if "--fixtures" in sys.argv:
        np.savez(FILE, weights=np.array(WEIGHTS), **factors, **products)
    rows, bounds = [], []
    for name, (_, rule) in MERGES.items():
        got, want = np.asarray(ours(factors, rule)), products[name]
        error = np.abs(got - want).max() / np.abs(want).max()
        rows.append({"merge": name, "largest error": float(error)})
        bounds.append(bound(f"{name}: largest error beside PEFT", error, at_most=2e-5))
    write_results("merge_exchange", rows, bounds, "peft", "torch")


if __name__ == "__main__":
    main()

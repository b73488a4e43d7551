"""Do merges of adapters give what PEFT's ``add_weighted_adapter`` does?

``--fixtures`` writes the file that the tests read as well. Needs torch and peft, the extra
``peers``.
"""

import sys
from pathlib import Path

import numpy as np
import peft
import torch
from _harness import bound, write_results
from _merges import DENSITY, RULES, SVD_RANK, merged
from torch import nn


FILE = Path(__file__).parents[1] / "tests" / "merging" / "peft_merges.npz"
OUT, IN, RANK, ALPHAS = 9, 7, 3, (6.0, 6.0, 6.0)
WEIGHTS = (0.7, -1.3, 0.5)
# What add_weighted_adapter is told for each of RULES.
SETTINGS = {
    "cat": {"combination_type": "cat"},
    "svd": {"combination_type": "svd", "svd_rank": SVD_RANK},
    "linear": {"combination_type": "linear"},
    "ties": {"combination_type": "ties", "density": DENSITY},
    "ties_frequency": {
        "combination_type": "ties",
        "density": DENSITY,
        "majority_sign_method": "frequency",
    },
    "magnitude_prune": {"combination_type": "magnitude_prune", "density": DENSITY},
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
    factors = {"weights": np.array(WEIGHTS)}
    with torch.no_grad():
        for k, (name, alpha) in enumerate(zip(names, ALPHAS, strict=True)):
            left, right = layer.lora_B[name].weight, layer.lora_A[name].weight
            left.normal_()
            right.normal_()
            factors |= {f"left_{k}": left.numpy(), f"right_{k}": right.numpy().T}
            factors[f"scale_{k}"] = np.float32(alpha / RANK)
        products = {}
        for name, settings in SETTINGS.items():
            model.add_weighted_adapter(names, list(WEIGHTS), name, **settings)
            products[name] = layer.get_delta_weight(name).numpy()
    return factors, products


def main():
    factors, products = theirs()
    if "--fixtures" in sys.argv:
        np.savez(FILE, **factors, **products)
    rows, bounds = [], []
    for name in RULES:
        got, want = np.asarray(merged(name, factors, len(ALPHAS))), products[name]
        error = np.abs(got - want).max() / np.abs(want).max()
        rows.append({"merge": name, "largest error": float(error)})
        bounds.append(bound(f"{name}: largest error beside PEFT", error, at_most=2e-5))
    write_results("merge_exchange", rows, bounds, "peft", "torch")


if __name__ == "__main__":
    main()

"""Robust PCA in PyTorch as one writes it down, in a process of its own.

The inexact augmented Lagrangian of Lin, Chen and Ma (2010), with the SVD of PyTorch, and
with a randomized one of a fixed width. ``python _torch_pca.py 1000 4000`` prints a line of
JSON for each size and each of the two, as they come.
"""

import json
import sys
import time

import _pca_problem
import torch


TOL, STEPS, WIDTH = 1e-6, 100, 40
LONGEST = 12.0  # seconds, after which a fit is stopped


def full(x):
    """The SVD of all."""
    return torch.linalg.svd(x, full_matrices=False)


def randomized(x):
    """The leading part of it."""
    u, s, v = torch.svd_lowrank(x, q=min(WIDTH, *x.shape), niter=2)
    return u, s, v.T


def fit(matrix, svd):
    """The low-rank part, iterations taken, residual, and seconds."""
    start = time.perf_counter()
    weight = 1 / max(matrix.shape) ** 0.5
    largest, size = torch.linalg.matrix_norm(matrix, 2), torch.linalg.norm(matrix)
    dual = matrix / torch.maximum(largest, torch.abs(matrix).max() / weight)
    penalty, sparse = 1.25 / largest, torch.zeros_like(matrix)
    steps, residual = 0, 1.0
    while residual > TOL and steps < STEPS and time.perf_counter() - start < LONGEST:
        u, s, vt = svd(matrix - sparse + dual / penalty)
        low_rank = (u * torch.clip(s - 1 / penalty, min=0)) @ vt
        rest = matrix - low_rank + dual / penalty
        sparse = torch.sign(rest) * torch.clip(torch.abs(rest) - weight / penalty, min=0)
        gap = matrix - low_rank - sparse
        dual, penalty = dual + penalty * gap, 1.5 * penalty
        steps, residual = steps + 1, float(torch.linalg.norm(gap) / size)
    return low_rank, steps, residual, time.perf_counter() - start


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fit(torch.randn(64, 64, device=device), full)  # loads the libraries
    fit(torch.randn(64, 64, device=device), randomized)
    for size in map(int, sys.argv[1:]):
        clean, observed = _pca_problem.make(size)
        matrix = torch.tensor(observed, device=device)
        # No full SVD of the largest: one takes longer than all of a fit.
        kinds = [randomized] if size > 4000 else [randomized, full]
        for svd in kinds:
            low_rank, steps, residual, seconds = fit(matrix, svd)
            found = {
                "size": size,
                "method": f"PyTorch {torch.__version__}, {svd.__name__} SVD",
                "seconds": seconds,
                "steps": steps,
                "residual": residual,
                "error": _pca_problem.relative_error(low_rank.cpu().numpy(), clean),
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

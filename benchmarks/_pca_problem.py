"""Robust PCA problems in numpy, the same ones in every process that solves them."""

import numpy as np


RANK, OUTLIERS = 10, 0.1


def make(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A low-rank matrix, and it with a tenth of the entries wrong, both float32."""
    rng = np.random.default_rng(size)
    left, right = rng.standard_normal((2, size, RANK), np.float32)
    clean = left @ right.T
    observed = clean.copy()
    wrong = rng.integers(0, clean.size, int(OUTLIERS * clean.size))
    limit = 10 * np.abs(clean).mean()
    observed.flat[wrong] += rng.uniform(-limit, limit, len(wrong)).astype(np.float32)
    return clean, observed


def relative_error(found: np.ndarray, clean: np.ndarray) -> float:
    """Of a low-rank part."""
    return float(np.linalg.norm(found - clean) / np.linalg.norm(clean))

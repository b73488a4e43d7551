"""Robust PCA, slowly: full SVDs, Python loops and sorts in float64."""

import numpy as np


def keep_largest(x, fraction):
    """Entries among the ⌊fraction·n⌋ largest of their row and of their column."""
    m, n = x.shape
    in_row, in_column = int(fraction * n + 1e-9), int(fraction * m + 1e-9)
    out = np.zeros_like(x)
    for i in range(m):
        for j in range(n):
            above_in_row = sum(abs(x[i, k]) > abs(x[i, j]) for k in range(n))
            above_in_column = sum(abs(x[k, j]) > abs(x[i, j]) for k in range(m))
            if above_in_row < in_row and above_in_column < in_column:
                out[i, j] = x[i, j]
    return out

"""Samples of unions of subspaces."""

import numpy as np


def union(rng, dims, d, each, noise=0.0, offset=0.0):
    """``each`` samples of a random subspace of every dimension, and their labels."""
    samples = []
    for r in dims:
        basis = np.linalg.qr(rng.standard_normal((d, r)))[0]
        center = offset * rng.standard_normal(d)
        samples.append(center + rng.standard_normal((each, r)) @ basis.T)
    x = np.concatenate(samples)
    x = x + noise * rng.standard_normal(x.shape) / np.sqrt(d)
    return x, np.repeat(np.arange(len(dims)), each)

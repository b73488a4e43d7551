"""A slow dense reference of SNSM in numpy, one m × n gradient with m <= n."""

import numpy as np


def snsm(grads, rank, every, b1=0.9, b2=0.999, eps=1e-8):
    """Momentum forgotten at each refresh; bias corrections by the running step count."""
    n = grads[0].shape[1]
    squares, out = np.zeros(n), []
    for t, g in enumerate(grads, start=1):
        if (t - 1) % every == 0:
            basis = np.linalg.svd(g, full_matrices=False)[0][:, :rank]
            momentum = np.zeros((rank, n))
        r = basis.T @ g
        momentum = b1 * momentum + (1 - b1) * r
        numerator = basis @ (momentum / (1 - b1**t)) + (g - basis @ r)
        squares = b2 * squares + (1 - b2) * (g**2).sum(axis=0)
        out.append(numerator / (np.sqrt(squares / (1 - b2**t)) + eps))
    return out

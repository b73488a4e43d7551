"""Slow dense references of AdamSN and SNSM in numpy, one m × n gradient with m <= n."""

import numpy as np

from .dense import leading


def over_subset_norms(grads, numerators, *, b2, eps):
    """``N_ij / (√v̂_j + ε)``: one averaged sum of squares for each column."""
    squares, out = np.zeros(grads[0].shape[1]), []
    for t, (g, numerator) in enumerate(zip(grads, numerators, strict=True), start=1):
        squares = b2 * squares + (1 - b2) * (g**2).sum(axis=0)
        out.append(numerator / (np.sqrt(squares / (1 - b2**t)) + eps))
    return np.stack(out)


def adam_sn(grads, *, b1, b2, eps):
    momentum, numerators = np.zeros_like(grads[0]), []
    for t, g in enumerate(grads, start=1):
        momentum = b1 * momentum + (1 - b1) * g
        numerators.append(momentum / (1 - b1**t))
    return over_subset_norms(grads, numerators, b2=b2, eps=eps)


def snsm(grads, due, *, rank, b1, b2, eps):
    """Momentum forgotten at each refresh; bias corrections by the running step count."""
    numerators = []
    for t, g in enumerate(grads):
        if t in due:
            basis = leading(g, rank)
            momentum = np.zeros((rank, g.shape[1]))
        r = basis.T @ g
        momentum = b1 * momentum + (1 - b1) * r
        numerators.append(basis @ (momentum / (1 - b1 ** (t + 1))) + (g - basis @ r))
    return over_subset_norms(grads, numerators, b2=b2, eps=eps)

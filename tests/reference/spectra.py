"""Methods that shape singular values in training, densely, in float64."""

import numpy as np


def spectral(w, f):
    """``U diag(f(σ)) Vᵀ``, for one matrix."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return sum(value * np.outer(u[:, k], vt[k]) for k, value in enumerate(f(s)))


def kept(s, energy):
    """The fewest leading singular values that hold a share of the squares, one by one."""
    total, held, count = np.sum(s**2), 0.0, 0
    while held < energy * total * (1 - 1e-12):
        held += s[count] ** 2
        count += 1
    return count


def keep_energy(w, energy):
    return spectral(w, lambda s: s * (np.arange(len(s)) < kept(s, energy)))


def trp(w, grad, *, rate, energy, period, nuclear_weight, steps):
    """Xu et al. (2020), with the projection at the end of a step."""
    buffer = np.zeros_like(w)
    for t in range(1, steps + 1):
        g = grad(w)
        if t % period == 0:
            ones = lambda s: np.arange(len(s)) < kept(s, energy)
            g = g + nuclear_weight * spectral(w, ones)
        buffer = 0.9 * buffer + g
        w = w - rate * buffer
        if t % period == 0:
            w = keep_energy(w, energy)
        yield w

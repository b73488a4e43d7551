"""Quantized weights as the papers write them, number by number, in float64."""

import numpy as np
from scipy.stats import norm


def normal_floats():
    """Dettmers et al. (2023): quantiles of N(0, 1), zero among them, scaled to [−1, 1]."""
    offset = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([below, [0.0], above]))
    return levels / levels.max()


def blockwise(row, block, levels):
    """A row whose blocks are scaled to the largest level and rounded to the nearest."""
    row, scales, out = np.asarray(row, np.float64), [], []
    for start in range(0, len(row), block):
        part = row[start : start + block]
        scale = np.abs(part).max() / levels[-1]
        unit = part / scale if scale else part
        nearest = [np.abs(levels - u).argmin() for u in unit]
        out.append(scale * levels[nearest])
        scales.append(scale)
    return np.concatenate(out), np.array(scales)


def doubly_quantized(scales, block=256):
    """The scales of one matrix, less the mean of their block, at eight bits."""
    out = []
    for start in range(0, len(scales), block):
        part = scales[start : start + block]
        codes, _ = blockwise(part - part.mean(), block, np.arange(-127.0, 128))
        out.append(part.mean() + codes)
    return np.concatenate(out)


def loftq(weight, quantized, rank, steps, first):
    """Li et al. (2023), algorithm 1; with the factors first QPiSSA (Meng et al., 2024)."""
    base, change = np.zeros_like(weight), np.zeros_like(weight)
    for _ in range(steps):
        for turn in ("weight", "factors") if first == "weight" else ("factors", "weight"):
            if turn == "weight":
                base = np.stack([quantized(row) for row in weight - change])
            else:
                u, s, v = np.linalg.svd(weight - base)
                change = (u[:, :rank] * s[:rank]) @ v[:rank]
    return base, change

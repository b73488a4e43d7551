"""Calibration by loops over examples, in float64."""

import numpy as np


def _probabilities(logits):
    z = np.asarray(logits, np.float64)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _each(logits, labels, weights):
    return zip(
        _probabilities(logits), np.asarray(labels), np.asarray(weights, float), strict=True
    )


def negative_log_likelihood(logits, labels, weights):
    """The mean of minus the logarithm of what the label had."""
    rows = [(-w * np.log(p[y]), w) for p, y, w in _each(logits, labels, weights)]
    return np.sum(rows, axis=0)[0] / np.sum(rows, axis=0)[1]


def brier_score(logits, labels, weights):
    """The mean squared distance to a one among zeros."""
    total = 0.0
    for p, y, w in _each(logits, labels, weights):
        total += w * (np.sum(np.delete(p, y) ** 2) + (1 - p[y]) ** 2)
    return total / np.sum(np.asarray(weights, float))


def reliability_bins(logits, labels, weights, bins, equal_mass):
    """Share, mean confidence and accuracy of each bin."""
    rows = [
        (p.max(), float(p.argmax() == y), w)
        for p, y, w in _each(logits, labels, weights)
        if w > 0
    ]
    total = sum(w for *_, w in rows)
    if equal_mass:
        rows.sort(key=lambda row: row[0])
    before, sums = 0.0, np.zeros((3, bins))
    for confidence, right, w in rows:
        place = (before + w / 2) / total if equal_mass else confidence
        k = int(place * bins) if equal_mass else int(np.ceil(place * bins)) - 1
        sums[:, min(k, bins - 1)] += w, w * confidence, w * right
        before += w
    mass = np.where(sums[0] > 0, sums[0], 1)
    return sums[0] / total, sums[1] / mass, sums[2] / mass


def expected_calibration_error(logits, labels, weights, bins, equal_mass=False):
    """The mean distance of accuracy and confidence."""
    share, confidence, right = reliability_bins(logits, labels, weights, bins, equal_mass)
    return sum(s * abs(a - c) for s, a, c in zip(share, right, confidence, strict=True))


def temperature(logits, labels, weights):
    """By golden section of the logarithm."""
    z = np.asarray(logits, np.float64)
    loss = lambda t: negative_log_likelihood(z / np.exp(t), labels, weights)
    low, high, golden = np.log(1e-2), np.log(1e2), (5**0.5 - 1) / 2
    for _ in range(60):
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return np.exp((low + high) / 2)

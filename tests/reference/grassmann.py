"""Riemannian SGD of subspaces, by SVDs in float64, as Wang, Li and Zhang (2023) have it."""

import numpy as np


def geodesic(s, d):
    """``(S V cos Σ + U sin Σ) Vᵀ`` with the SVD of the part of ``d`` outside of ``s``."""
    u, angles, vt = np.linalg.svd(d - s @ (s.T @ d), full_matrices=False)
    return (s @ vt.T * np.cos(angles) + u * np.sin(angles)) @ vt


def logits(x, subspaces, scale):
    """One after the other."""
    x = x / np.linalg.norm(x)
    return np.array([scale * np.linalg.norm(s.T @ x) for s in subspaces])


def gradient(x, target, subspaces, scale):
    """Of the cross-entropy of one feature, for each basis."""
    x, z = x / np.linalg.norm(x), logits(x, subspaces, scale)
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    slopes = []
    for c, s in enumerate(subspaces):
        inside = s.T @ x
        weight = (p[c] - (c == target)) * scale / np.linalg.norm(inside)
        slopes.append(weight * np.outer(x, inside))
    return np.array(slopes)


def train(xs, targets, subspaces, scale, rate, momentum):
    """One step for each feature."""
    buffer = np.zeros_like(subspaces)
    for x, target in zip(xs, targets, strict=True):
        buffer = momentum * buffer + gradient(x, target, subspaces, scale)
        subspaces = np.array(
            [geodesic(s, -rate * m) for s, m in zip(subspaces, buffer, strict=True)]
        )
    return subspaces

"""Merges of changes as their definitions say, in float64, entry by entry."""

import numpy as np


def trimmed(x, density):
    """The largest entries alone."""
    x = np.asarray(x, np.float64)
    kept = sorted(np.ndindex(x.shape), key=lambda i: -abs(x[i]))[: int(density * x.size)]
    out = np.zeros_like(x)
    for i in kept:
        out[i] = x[i]
    return out


def elected(arrays, weights, by):
    """Of each entry the mean of those with the sign of the majority."""
    arrays = [np.asarray(x, np.float64) for x in arrays]
    out = np.zeros_like(arrays[0])
    for i in np.ndindex(out.shape):
        values = [x[i] for x in arrays]
        vote = sum(values) if by == "total" else sum(map(np.sign, values))
        sign = 1 if vote >= 0 else -1
        agree = [w * v for w, v in zip(weights, values, strict=True) if np.sign(v) == sign]
        out[i] = sum(agree) / len(agree) if agree else 0.0
    return out


def nearest_orthonormal(x):
    """The matrix with orthonormal columns that is nearest to ``x``."""
    u, _, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return u @ vt


def orthogonalized(matrices, weights, rank):
    """The leading triplets of all, with bases made orthonormal together."""
    lefts, values, rights = [], [], []
    for x, w in zip(matrices, weights, strict=True):
        u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
        lefts.append(u[:, :rank])
        values += list(w * s[:rank])
        rights.append(vt[:rank].T)
    left, right = (nearest_orthonormal(np.hstack(side)) for side in (lefts, rights))
    return left @ np.diag(values) @ right.T


def sum_of_distances(point, points):
    """What the geometric median has the least of."""
    return sum(np.linalg.norm(np.asarray(point, np.float64) - x) for x in points)

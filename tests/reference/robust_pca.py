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


def scaled_descent(y, low_rank, rank, fraction, rate, steps):
    """Scaled gradient steps from a given low-rank part; the trajectory."""
    u, s, vt = np.linalg.svd(low_rank)
    left, right = u[:, :rank] * np.sqrt(s[:rank]), vt[:rank].T * np.sqrt(s[:rank])
    path = []
    for _ in range(steps):
        path.append(left @ right.T)
        rest = y - path[-1]
        error = rest - keep_largest(rest, 2 * fraction)
        step_left = error @ right @ np.linalg.inv(right.T @ right)
        step_right = error.T @ left @ np.linalg.inv(left.T @ left)
        left, right = left + rate * step_left, right + rate * step_right
    return np.stack(path)


def alternating_projections(y, low_rank, rank, beta, decay, steps, incoherence=None):
    """Projections on the tangent space as dense matrices; the trajectory."""
    zeta = beta * np.linalg.norm(low_rank, 2)
    path = []
    for step in range(1, steps + 1):
        path.append(low_rank)
        rest = y - low_rank
        z = y - np.where(np.abs(rest) > zeta, rest, 0)
        u, s, vt = np.linalg.svd(low_rank)
        u, v = u[:, :rank], vt[:rank].T
        if incoherence is not None:
            u, v = _trim(u, incoherence), _trim(v, incoherence)
            u, _, vt = np.linalg.svd((u * s[:rank]) @ v.T)
            u, v = u[:, :rank], vt[:rank].T
        tangent = u @ u.T @ z + z @ v @ v.T - u @ u.T @ z @ v @ v.T
        u, s, vt = np.linalg.svd(tangent)
        low_rank = (u[:, :rank] * s[:rank]) @ vt[:rank]
        zeta = beta * (s[rank] + decay**step * s[0])
    return np.stack(path)


def _trim(u, incoherence):
    limit = np.sqrt(incoherence * u.shape[1] / u.shape[0])
    length = np.linalg.norm(u, axis=1, keepdims=True)
    return u * np.minimum(1, limit / length)


def principal_component_pursuit(y, weight, growth, steps):
    """The inexact augmented Lagrangian with its multiplier; the trajectory."""
    soft = lambda x, level: np.sign(x) * np.maximum(np.abs(x) - level, 0)
    largest = np.linalg.norm(y, 2)
    dual = y / max(largest, np.abs(y).max() / weight)
    mu, low_rank, path = 1.25 / largest, np.zeros_like(y), []
    for _ in range(steps):
        path.append(low_rank)
        sparse = soft(y - low_rank + dual / mu, weight / mu)
        u, s, vt = np.linalg.svd(y - sparse + dual / mu, full_matrices=False)
        low_rank = (u * soft(s, 1 / mu)) @ vt
        dual = dual + mu * (y - low_rank - sparse)
        mu = growth * mu
    return np.stack(path)

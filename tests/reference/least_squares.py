"""Least squares from their normal equations, and one sample at a time, in float64."""

import numpy as np


def ridge_regression(x, y, ridge):
    """``(XᵀX + λI)⁻¹ XᵀY``, as ``(outputs, features)``."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y).T


def covariance_recursion(batches, ridge, dtype):
    """Recursive least squares on the inverse itself, all in one dtype."""
    features, outputs = batches[0][0].shape[1], batches[0][1].shape[1]
    inverse, weight = np.eye(features) / ridge, np.zeros((features, outputs))
    for x, y in batches:
        x, y, inverse, weight = (np.asarray(a, dtype) for a in (x, y, inverse, weight))
        seen = np.eye(len(x), dtype=dtype) + x @ inverse @ x.T
        inverse = inverse - inverse @ x.T @ np.linalg.solve(seen, x @ inverse)
        weight = weight + inverse @ x.T @ (y - x @ weight)
    return weight.T


def least_change(weight, keys, values, moment):
    """The least change of a map under constraints, by their Lagrange equations.

    ``[2C Kᵀ; K 0] [Δᵀ; μ] = [0; V − K Wᵀ]`` for every row of the map at once.
    """
    k, n = keys.shape
    system = np.block([[2 * moment, keys.T], [keys, np.zeros((k, k))]])
    wanted = np.concatenate([np.zeros((n, len(weight))), values - keys @ weight.T])
    return np.linalg.solve(system, wanted)[:n].T

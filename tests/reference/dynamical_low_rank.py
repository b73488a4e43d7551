"""The dynamical low-rank family on dense float64 matrices whose ranks have real shapes.

From the equations: no masks, no small cores, every decomposition of a whole matrix.
"""

import numpy as np


def orth(*columns):
    """An orthonormal basis of all columns; at most as many as there are rows."""
    return np.linalg.qr(np.concatenate(columns, axis=1))[0]


def cut(w, tol, cap):
    """The smallest rank whose tail is at most ``tol`` of all, at least one, at most cap."""
    u, s, vt = np.linalg.svd(w)
    s = np.where(s > 1e-15 * s[0], s, 0)
    rank = 1
    while rank < cap and np.sqrt(np.sum(s[rank:] ** 2)) > tol * np.sqrt(np.sum(s**2)):
        rank += 1
    return u[:, :rank], s[:rank], vt[:rank].T


def tangent(u, v, g):
    """``P(G)``."""
    return u @ u.T @ g + g @ v @ v.T - u @ u.T @ g @ v @ v.T


def train(start, gradient, *, method, rate, tol, cap, steps, every=1, momentum=0.0):
    """The matrix and its rank after every step of momentum descent.

    Args:
        start: ``u, s, v``.
        gradient: of the loss, from the matrix.
        method: as of the transform; between the steps of ``every`` the bases rest.
    """
    u, s, v = start
    w, velocity = (u * s) @ v.T, np.zeros((len(u), len(v)))
    history = []
    for step in range(steps):
        g = gradient(w)
        begins, ends = step % every == 0, (step + 1) % every == 0
        if begins:
            wide_u, wide_v = orth(u, g @ v), orth(v, g.T @ u)
            if method == "augmented":
                wide_u, wide_v = wide_u[:, :cap], wide_v[:, :cap]
            seen = g if method == "kls" else tangent(u, v, g)
            u, v = wide_u, wide_v
        else:
            seen = g
        slope = u @ u.T @ seen @ v @ v.T
        velocity = momentum * velocity + slope
        w = w - rate * velocity
        if ends if method == "augmented" else begins:
            u, s, v = cut(w, tol, cap)
            w = (u * s) @ v.T
            velocity = u @ u.T @ velocity @ v @ v.T
        history.append((w, u.shape[1]))
    return history

"""Training of a tensor in Tucker form whose ranks change, with arrays of changing shapes.

In float64, from the equations of Zangrando et al. (2023): a step of
``K_k = U_k S_kᵀ``, with ``C_(k)ᵀ = Q_k S_k``, gives each new basis.
"""

import numpy as np


def unfolded(x, axis):
    """One axis as rows."""
    return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)


def along(x, matrix, axis):
    """A matrix times one axis of a tensor."""
    return np.moveaxis(np.tensordot(matrix, x, axes=(1, axis)), 0, axis)


def value(core, bases, skip=None):
    """The tensor, with one axis left in the coordinates of the core if told so."""
    for axis, u in enumerate(bases):
        if axis != skip:
            core = along(core, u, axis)
    return core


def project(x, bases, skip=None):
    """The coordinates of a tensor in bases, but for one axis."""
    return value(x, [u.T for u in bases], skip)


def truncated(core, bases, tol, caps):
    """The truncated higher-order SVD; each rank from the tail of its unfolding."""
    turns = []
    for axis, cap in enumerate(caps):
        p, d, _ = np.linalg.svd(unfolded(core, axis), full_matrices=False)
        size = np.linalg.norm(d)
        rank = next(r for r in range(1, len(d) + 1) if np.linalg.norm(d[r:]) <= tol * size)
        turns.append(p[:, : min(rank, cap)])
    core = project(core, turns)
    return core, [u @ p for u, p in zip(bases, turns, strict=True)]


def step(core, bases, gradient, rate, tol, caps):
    """New bases from one gradient, a new core from another, and back to smaller ranks."""
    slope = gradient(value(core, bases))
    wide = []
    for axis, u in enumerate(bases):
        q, s = np.linalg.qr(unfolded(core, axis).T)
        k = u @ s.T - rate * unfolded(project(slope, bases, axis), axis) @ q
        wide.append(np.linalg.qr(np.hstack([u, k]))[0])
    core = project(value(core, bases), wide)
    core = core - rate * project(gradient(value(core, wide)), wide)
    return truncated(core, wide, tol, caps)


def tangent_projection(core, bases, gradient):
    """By the derivative of the tensor with respect to its core and bases, as a matrix."""
    parts = [core, *bases]
    columns = []
    for k, part in enumerate(parts):
        for index in np.ndindex(part.shape):
            moved = [np.zeros_like(p) if j == k else p for j, p in enumerate(parts)]
            moved[k][index] = 1
            columns.append(value(moved[0], moved[1:]).ravel())
    q, s, _ = np.linalg.svd(np.array(columns).T, full_matrices=False)
    q = q[:, s > 1e-10 * s[0]]
    return (q @ (q.T @ gradient.ravel())).reshape(gradient.shape)

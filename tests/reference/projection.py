"""Bases of inputs straight from the papers, in NumPy and float64."""

import numpy as np


def gradient_projection_memory(tasks, energies):
    """The basis (in, k) after some tasks, the inputs (samples, in) of each; GPM, eq. 8-9.

    With the criterion of the paper, the smallest k; the published code takes one less.
    """
    basis = np.zeros((tasks[0].shape[1], 0))
    for x, energy in zip(tasks, energies, strict=True):
        rest = x - x @ basis @ basis.T
        total = np.sum(x**2)
        _, s, vt = np.linalg.svd(rest, full_matrices=False)
        held, k = total - np.sum(rest**2), 0
        while held < energy * total:
            held, k = held + s[k] ** 2, k + 1
        basis = np.concatenate([basis, vt[:k].T], axis=1)
    return basis


def null_space(tasks, factor):
    """The null space (in, n - k) of Adam-NSCL, whose moments count by their samples."""
    count = sum(len(x) for x in tasks)
    moment = sum(len(x) * (x.T @ x / len(x)) for x in tasks) / count
    values, vectors = np.linalg.eigh(moment)
    return vectors[:, values <= factor * values[0]]


def federated_basis(clients, basis, energy, width, rng):
    """FOT: a Gaussian combination of each client's inputs (in, samples), their sum's span.

    The share of energy that is missing is that of squared norms, where the published code
    mixes it with one of norms.
    """
    total = sum(np.sum(x**2) for x in clients)
    rests = [x - basis @ (basis.T @ x) for x in clients]
    left = sum(np.sum(x**2) for x in rests)
    sketch = sum(x @ rng.standard_normal((x.shape[1], width)) for x in rests)
    u, s, _ = np.linalg.svd(sketch, full_matrices=False)
    shares = np.cumsum(s**2) / np.sum(s**2)
    needed = 1 - (1 - energy) * total / left
    k = int(np.sum(shares < needed)) + 1 if needed > 0 else 0
    return np.linalg.qr(np.concatenate([basis, u[:, :k]], axis=1))[0]


def patches(image, size):
    """All patches (count, channels · size²) of an image (channels, h, w), zeros around."""
    pad = size // 2
    wide = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    h, w = image.shape[1:]
    cut = lambda i, j: wide[:, i : i + size, j : j + size].ravel()
    return np.stack([cut(i, j) for i in range(h) for j in range(w)])

"""Starts of adapters as their papers write them: dense, slow, in float64.

All give ``B (m, r)`` and ``A (r, n)`` for ``W' = W + s B A``; a residual one is meant with
``W − s B A`` as the base.
"""

import numpy as np


def pissa(w, r, s):
    u, values, vt = np.linalg.svd(w, full_matrices=False)
    root = np.sqrt(values[:r] / s)
    return u[:, :r] * root, root[:, None] * vt[:r]


def milora(w, r, s):
    u, values, vt = np.linalg.svd(w, full_matrices=False)
    root = np.sqrt(values[-r:] / s)
    return u[:, -r:] * root, root[:, None] * vt[-r:]


def olora(w, r):
    q, triangle = np.linalg.qr(w)
    return q[:, :r], triangle[:r]


def lora_ga(gradient, r, gamma):
    u, _, vt = np.linalg.svd(gradient, full_matrices=False)
    size = len(gradient) ** 0.25 / np.sqrt(gamma)
    return size * u[:, r : 2 * r], size * vt[:r]


def lora_one(gradient, r, gamma):
    u, values, vt = np.linalg.svd(-gradient, full_matrices=False)
    root = np.sqrt(values[:r] / values[0] / gamma)
    return u[:, :r] * root, root[:, None] * vt[:r]


def corda(w, moment, r, s, kpm=False, damping=0.01):
    c = moment + damping * np.mean(np.diag(moment)) * np.eye(len(moment))
    u, values, vt = np.linalg.svd(w @ c, full_matrices=False)
    part = slice(-r, None) if kpm else slice(r)
    root = np.sqrt(values[part] / s)
    a = vt[part] @ np.linalg.inv(c)
    return u[:, part] * root, root[:, None] * a


def eva(rows, r):
    """The leading right singular vectors of the centred rows, and shares of variance."""
    centred = rows - rows.mean(axis=0)
    _, values, vt = np.linalg.svd(centred, full_matrices=False)
    return vt[:r], values**2 / np.sum(values**2)


def lora_sb(gradient, r, rate):
    u, values, vt = np.linalg.svd(-rate * np.sign(gradient), full_matrices=False)
    return u[:, :r], np.diag(values[:r]), vt[:r]

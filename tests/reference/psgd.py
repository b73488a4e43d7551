"""Slow dense references of PSGD's preconditioners in numpy.

Of the low-rank one ``Q`` is an N × N matrix and moves by the group's own action, a product
with a matrix near the identity; of its factors only U and V are kept, to know the
directions.
"""

import numpy as np


def balanced(u, v):
    rho = (np.trace(u.T @ u) / np.trace(v.T @ v)) ** 0.25
    u, v = u / rho, v * rho
    uu, vv = u.T @ u, v.T @ v
    e = 0.1 * (uu - vv) / (np.trace(uu) + np.trace(vv))
    turn = np.eye(len(e)) - e + e @ e / 2
    return u @ turn, v @ np.linalg.inv(turn).T


def psgd(u, v, d, pairs, rate):
    """The preconditioners P after each pair (noise v, image h)."""
    limits, out = [0.0, 0.0, 0.0], []
    identity = np.eye(len(d))

    def limited(which, size):
        limits[which] = max(0.9 * limits[which] + 0.1 * size, size)
        return rate / limits[which]

    for count, (noise, h) in enumerate(pairs):
        if count == 0:
            d = d * (np.mean(noise**4) / np.mean(h**4)) ** (1 / 8)
        u, v = balanced(u, v)
        low_rank = identity + u @ v.T
        q = low_rank @ np.diag(d)
        a, b = q @ h, np.linalg.inv(q).T @ noise
        p_h, p_inv_v = q.T @ q @ h, np.linalg.inv(q.T @ q) @ noise
        change = np.outer(a, a) - np.outer(b, b)
        bound = np.abs(p_h * h).max() + np.abs(noise * p_inv_v).max()
        d = d * (1 - limited(0, bound) * (p_h * h - noise * p_inv_v))
        side = v if count % 2 == 0 else u
        square = side @ side.T
        bound = np.linalg.norm(a) * np.linalg.norm(square @ a)
        bound += np.linalg.norm(b) * np.linalg.norm(square @ b)
        if count % 2 == 0:
            low_rank = (identity - limited(1, bound) * change @ square) @ low_rank
            u = (low_rank - identity) @ np.linalg.pinv(v.T)
        else:
            low_rank = (identity - limited(2, bound) * square @ change) @ low_rank
            v = ((np.linalg.pinv(u)) @ (low_rank - identity)).T
        q = low_rank @ np.diag(d)
        out.append(q.T @ q)
    return np.stack(out)


def whitened(u, v, grads, draws, *, rate, damping, clip):
    """``P g`` with P fitted to each gradient first, limited in RMS and in its entries."""
    eps = np.finfo(grads[0].dtype).eps
    images = [g + (damping + eps * abs(g)) * n for g, n in zip(grads, draws, strict=True)]
    fitted = psgd(u, v, np.ones(len(u)), list(zip(draws, images, strict=True)), rate)
    out = []
    for p, g in zip(fitted, grads, strict=True):
        x = p @ g
        x = x / max(1, np.sqrt(np.mean(x**2)) / clip)
        out.append(np.clip(x, -5 * clip, 5 * clip))
    return np.stack(out)


def kron(grads, *, decay, rate, damping, clip, diagonal):
    """``P vec(M)`` with ``P = P_l ⊗ P_r`` fitted to the whole covariance of ``vec(M)``.

    That of one average ``M`` of the gradients and of a noise on it, an mn × mn matrix.
    """
    m, n = grads[0].shape
    roots, limits = [None, None], [0.0, 0.0]
    momentum, out = np.zeros((m, n)), []
    for t, g in enumerate(grads, start=1):
        momentum = decay * momentum + (1 - decay) * g
        x = momentum / (1 - decay**t)
        if t == 1:
            start = np.mean(x**4) ** (-1 / 16)
            roots = [start * np.eye(m), start * np.eye(n)]
        noise = damping + np.finfo(x.dtype).eps * np.sqrt(np.mean(x**2))
        covariance = np.outer(x, x) + noise**2 * np.eye(m * n)
        p = np.kron(roots[0] @ roots[0], roots[1] @ roots[1])
        whitened = (p @ covariance @ p).reshape(m, n, m, n)
        seen = [np.einsum("ikjk->ij", whitened), np.einsum("kikj->ij", whitened)]
        for side, (s, goal) in enumerate(zip(seen, (n, m), strict=True)):
            s = np.diag(np.diag(s)) if diagonal[side] else s
            size = np.diag(s).max() if diagonal[side] else about_norm(s)
            limits[side] = max(0.9 * limits[side] + 0.1 * (size + goal), size + goal)
            step = np.eye(len(s)) - rate / 2 / limits[side] * (s - goal * np.eye(len(s)))
            roots[side] = step @ roots[side] @ step
        p = np.kron(roots[0] @ roots[0], roots[1] @ roots[1])
        u = (p @ x.reshape(-1)).reshape(m, n)
        out.append(u / max(1, np.sqrt(np.mean(u**2)) / clip))
    return np.stack(out)


def about_norm(s):
    """The largest eigenvalue of a positive matrix, by four power steps."""
    v = np.eye(len(s))[np.argmax(np.sum(s**2, axis=0))]
    for _ in range(4):
        v = s @ (v / np.linalg.norm(v))
    return max(np.linalg.norm(v), np.diag(s).max())

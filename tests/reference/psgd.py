"""A slow dense reference of PSGD's low-rank preconditioner in numpy.

``Q`` is an N × N matrix and moves by the group's own action, a product with a matrix near
the identity; of its factors only U and V are kept, to know the directions.
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

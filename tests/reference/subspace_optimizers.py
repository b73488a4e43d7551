"""Slow dense references of LDAdam, Fira and APOLLO in numpy, one matrix, short side.

Each is written from the published equations for an m × n gradient with m <= n, without
sharing a line with the library. They return the list of updates U (before the learning
rate and its sign).
"""

import numpy as np


def adam_step(m, v, r, t, b1, b2, eps):
    m = b1 * m + (1 - b1) * r
    v = b2 * v + (1 - b2) * r * r
    return m, v, (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)


def signed_qr(x):
    q, r = np.linalg.qr(x)
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def leading_left(g, rank):
    return np.linalg.svd(g, full_matrices=False)[0][:, :rank]


def ldadam(grads, rank, rho=0.908, b1=0.908, b2=0.99, eps=1e-8, feedback=True):
    rows, cols = grads[0].shape
    error = np.zeros((rows, cols))
    m = v = np.zeros((rank, cols))
    basis, out = None, []
    for t, g in enumerate(grads, start=1):
        a = g + error
        if basis is None:
            new = leading_left(a, rank)
            moved, spread = m, v
        else:
            m_hat, v_hat = m / (1 - b1 ** (t - 1)), v / (1 - b2 ** (t - 1))
            b = rho * basis @ m_hat + (1 - rho) * a
            new = signed_qr(b @ b.T @ basis)
            c = new.T @ basis
            moved = c @ m
            spread = (1 - b2 ** (t - 1)) * np.abs(
                (c * c) @ (v_hat - m_hat**2) + (c @ m_hat) ** 2
            )
        r = new.T @ a
        next_m, v, step = adam_step(moved, spread, r, t, b1, b2, eps)
        out.append(new @ step)
        if feedback:
            old_momentum = 0.0 if basis is None else basis @ m
            lost = old_momentum - new @ moved
            error = a - new @ r + b1 / (1 - b1) * lost
        m, basis = next_m, new
    return out


def limited(s, previous, growth):
    size = np.linalg.norm(s)
    if previous is not None and size > growth * previous:
        s, size = s * (growth * previous / size), growth * previous
    return s, size


def fira(grads, rank, every, scale=0.25, growth=1.01, b1=0.9, b2=0.999, eps=1e-8):
    m = v = np.zeros((rank, grads[0].shape[1]))
    previous, out = None, []
    for t, g in enumerate(grads):
        if t % every == 0:
            basis = leading_left(g, rank)
        r = basis.T @ g
        m, v, step = adam_step(m, v, r, t + 1, b1, b2, eps)
        phi = np.linalg.norm(step, axis=0) / np.linalg.norm(r, axis=0)
        outside, previous = limited((g - basis @ r) * phi, previous, growth)
        out.append(scale * basis @ step + outside)
    return out


def apollo(grads, basis, scale=1.0, tensor=False, growth=1.01, b1=0.9, b2=0.999):
    m = v = np.zeros((basis.shape[1], grads[0].shape[1]))
    previous, out = None, []
    for t, g in enumerate(grads, start=1):
        r = basis.T @ g
        m, v, step = adam_step(m, v, r, t, b1, b2, 1e-8)
        axis = None if tensor else 0
        phi = np.linalg.norm(step, axis=axis) / np.linalg.norm(r, axis=axis)
        update, previous = limited(g * phi, previous, growth)
        out.append(scale * update)
    return out

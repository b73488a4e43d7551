"""Methods that compress or orthogonalize momentum, with full matrices: slow and dense.

Each returns the stacked updates U, before weight decay, the learning rate and its sign.
"""

import numpy as np

from .dense import Growth, polar, randomized, signed_qr


def dion(grads, *, start, decay, orthonormal):
    """``√(m/n) P Qᵀ`` by a warm power step of the momentum, from a first ``Q (n, r)``."""
    (m, n), q = grads[0].shape, start
    buffer, out = np.zeros((m, n)), []
    for g in grads:
        buffer = buffer + g
        p = signed_qr(buffer @ q)
        right = buffer.T @ p
        q = signed_qr(right) if orthonormal else right / np.linalg.norm(right, axis=0)
        out.append(np.sqrt(m / n) * p @ q.T)
        buffer = buffer - (1 - decay) * p @ right.T
    return np.stack(out)


def dion2(grads, *, count, decay, over_rows, b2=None, eps=0.0):
    """Polar factors of the largest rows, or columns, of a momentum, each its own decay.

    With a ``b2`` their rows are divided by running sizes, at the same norm altogether.
    """
    m, n = grads[0].shape
    buffer, sizes, out = np.zeros((m, n)), np.zeros(m), []
    for g in grads:
        buffer = buffer + g
        lines = buffer if over_rows else buffer.T
        most = sorted(range(len(lines)), key=lambda i: -np.sum(np.abs(lines[i])))[:count]
        step = np.zeros_like(lines)
        step[most] = polar(lines[most])
        lines[most] = decay * lines[most]  # a view of the momentum
        step = step if over_rows else step.T
        if b2 is not None:
            for i in most:
                sizes[i] = b2 * sizes[i] + (1 - b2) * np.mean(step[i] ** 2)
            step = at_norm(step / (np.sqrt(sizes) + eps)[:, None], np.linalg.norm(step))
        out.append(np.sqrt(m / n) * step)
    return np.stack(out)


def normuon(grads, *, decay, b2, eps, rms):
    """Polar factors of a momentum, rows over their running sizes, at one mean square."""
    momentum, sizes, out = 0.0, 0.0, []
    for g in grads:
        momentum = decay * momentum + (1 - decay) * g
        step = polar(momentum)
        sizes = b2 * sizes + (1 - b2) * np.mean(step**2, axis=1)
        step = step / (np.sqrt(sizes) + eps)[:, None]
        out.append(at_norm(step, rms * np.sqrt(step.size)))
    return np.stack(out)


def at_norm(x, norm):
    return x * norm / np.linalg.norm(x)


def power_sgd(grads, *, start, decay):
    """SGD with momentum on what one warm power step sends; the rest waits in the error."""
    error, momentum, q, out = 0.0, 0.0, start, []
    for g in grads:
        error = error + g
        p = signed_qr(error @ q)
        q = error.T @ p
        sent = p @ q.T
        error, momentum = error - sent, decay * momentum + sent
        out.append(sent + momentum)
    return np.stack(out)


def sumo(grads, due, *, rank, sketch, scale, decay, growth):
    """``P polar(M)`` of the momentum in a subspace, which moves with it; p <= q."""
    basis, momentum, limit, out = None, 0.0, Growth(growth), []
    for t, g in enumerate(grads):
        if t in due:
            new = randomized(g, rank, sketch(t), 1)
            momentum = 0.0 if basis is None else new.T @ basis @ momentum
            basis = new
        momentum = decay * momentum + basis.T @ g
        out.append(scale * basis @ limit.limit(polar(momentum)))
    return np.stack(out)


def flora(grads, due, *, basis, decay):
    """``β P C_old + (1−β) G``, ``C ← β C + (1−β) Pᵀ G``, moved from basis to basis."""
    p, out = basis(0), []
    c = np.zeros((p.shape[1], grads[0].shape[1]))
    for t, g in enumerate(grads):
        if t in due:
            c, p = basis(t).T @ p @ c, basis(t)
        out.append(decay * p @ c + (1 - decay) * g)
        c = decay * c + (1 - decay) * p.T @ g
    return np.stack(out)


def adafactor(grads, *, power, eps, least, clip):
    """Gradients over their running root mean square, and that limited in RMS.

    Squares are averaged with a decay of ``1 − t^−power``; of a leaf with two sides of at
    least ``least`` only the means of rows and columns are kept.
    """
    squares, out = np.zeros_like(grads[0]), []
    for t, g in enumerate(grads, start=1):
        decay = 1 - t**-power
        squares = decay * squares + (1 - decay) * (g**2 + eps)
        mean = squares
        if np.sum(np.array(g.shape) >= least) >= 2:
            rows = squares.mean(axis=-1, keepdims=True)
            columns = squares.mean(axis=-2, keepdims=True)
            mean = rows * columns / squares.mean(axis=(-2, -1), keepdims=True)
        u = g / np.sqrt(mean)
        out.append(u / max(1, np.sqrt(np.mean(u**2)) / clip))
    return np.stack(out)

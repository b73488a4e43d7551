"""What all dense references share: Adam, orthonormal bases, schedules. Plain float64 numpy.

Singular vectors have no sign of their own, but moments that are kept through a change of
basis depend on it. Where that matters a reference takes ``signs``, a function of a matrix
that shows its left singular vectors as the implementation under test orients them.
"""

import numpy as np


class Adam:
    """The moments of one array, ``t`` gradients old."""

    def __init__(self, b1, b2, eps):
        self.b1, self.b2, self.eps = b1, b2, eps
        self.m = self.v = 0.0
        self.t = 0

    def step(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g * g
        m_hat, v_hat = self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)
        return m_hat / (np.sqrt(v_hat) + self.eps)


def adam(grads, *, b1, b2, eps):
    moments = Adam(b1, b2, eps)
    return np.stack([moments.step(g) for g in grads])


def momentum(grads, *, decay, nesterov=False):
    """Heavy-ball momentum ``M ← λ M + G``; with ``nesterov`` the update is ``G + M``."""
    m, out = 0.0, []
    for g in grads:
        m = decay * m + g
        out.append(g + m if nesterov else m)
    return np.stack(out)


def average(grads, *, decay):
    """``m ← β m + (1−β) G`` from zero, without bias correction."""
    m, out = 0.0, []
    for g in grads:
        m = decay * m + (1 - decay) * g
        out.append(m)
    return np.stack(out)


class Growth:
    """The norm of a term grows by at most a factor a step; the first one is free."""

    def __init__(self, factor):
        self.factor, self.last = factor, None

    def limit(self, x):
        size = np.linalg.norm(x)
        if self.last is not None and size > self.factor * self.last:
            x = x * (self.factor * self.last / size)
        self.last = np.linalg.norm(x)
        return x


def staggered(period, place, places, steps):
    """When one of several leaves refreshes: at the start, then each in its own turn."""
    lead = place * period // places
    return {0} | {t for t in range(steps) if (t + lead) % period == 0}


def signed_qr(x):
    """The orthonormal factor of QR with a positive diagonal of R."""
    q, r = np.linalg.qr(x)
    return q * np.sign(np.diag(r))


def leading(x, rank, signs=None):
    """The leading left singular vectors."""
    u = np.linalg.svd(x, full_matrices=False)[0]
    if signs is not None:
        u = u * np.sign(np.sum(u * signs(x), axis=0))
    return u[:, :rank]


def randomized(x, rank, sketch, iterations, signs=None):
    """The same from a Gaussian sketch: ``x Ω`` orthonormalized, and a small SVD."""
    image = signed_qr(x @ sketch)
    for _ in range(iterations):
        image = signed_qr(x @ signed_qr(x.T @ image))
    return image @ leading(image.T @ x, rank, signs)


def polar(x):
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def truncated(x, rank):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]

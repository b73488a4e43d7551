"""A slow dense reference of SOAP in numpy, one matrix, written from its equations.

The first moment lives in the original coordinates, where the library keeps it in the
rotated ones. Returns the list of updates U (before the learning rate and its sign).
"""

import numpy as np

from .subspace_optimizers import signed_qr


def eigenvectors(gram):
    return np.linalg.eigh(gram)[1][:, ::-1]


def refreshed(gram, basis, v, axis):
    """Columns in falling order, the second moment along with them, one power step."""
    order = np.argsort(-np.diag(basis.T @ gram @ basis), kind="stable")
    return signed_qr(gram @ basis[:, order]), np.take(v, order, axis=axis)


def soap(grads, *, left=True, right=True, every=10, b1=0.95, b2=0.95, eps=1e-8):
    rows, cols = grads[0].shape
    m, v = np.zeros((rows, cols)), np.zeros((rows, cols))
    gram_l, gram_r = np.zeros((rows, rows)), np.zeros((cols, cols))
    q_l, q_r, out = np.eye(rows), np.eye(cols), []
    for t, g in enumerate(grads):
        if t == 0:
            out.append(np.zeros((rows, cols)))
        else:
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * (q_l.T @ g @ q_r) ** 2
            m_hat = (q_l.T @ m @ q_r) / (1 - b1**t)
            out.append(q_l @ (m_hat / (np.sqrt(v / (1 - b2**t)) + eps)) @ q_r.T)
        gram_l = b2 * gram_l + (1 - b2) * g @ g.T
        gram_r = b2 * gram_r + (1 - b2) * g.T @ g
        if t == 0:
            q_l = eigenvectors(gram_l) if left else q_l
            q_r = eigenvectors(gram_r) if right else q_r
        elif t % every == 0:
            if left:
                q_l, v = refreshed(gram_l, q_l, v, 0)
            if right:
                q_r, v = refreshed(gram_r, q_r, v, 1)
    return out
